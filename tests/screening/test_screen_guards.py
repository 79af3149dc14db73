"""Teacher and guard: which of them decides, in which order, and that no row passes when a guard fails."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow.parquet as pq
import pytest

from reft_ray.core.cascade import Combine, Guard, Opinion, Order
from reft_ray.core.conversation import chat
from reft_ray.core.errors import ReftError, UsageError
from reft_ray.core.verdict import Decision, Thresholds
from reft_ray.evaluation.endpoint import Endpoint
from reft_ray.guards.moderations import ModerationGuard
from reft_ray.screening.config import ScreenConfig
from reft_ray.screening.dataset import screen
from reft_ray.screening.guards import GuardEnsemble
from reft_ray.testbed.word_scorer import WordScorer

ALLOW, REVIEW, BLOCK = Decision.ALLOW, Decision.REVIEW, Decision.BLOCK
TEA, KNIFE, BOMB = (chat(f"{word} please", "ok") for word in ("tea", "knife", "bomb"))


class WordGuard:
    """Flags rows with one of its words."""

    guard_id = "words"
    threshold = 0.5

    def __init__(self, *words):
        self.words = words
        self.asked = []

    def opinions(self, conversations):
        self.asked += [turns[0].content for turns in conversations]
        return [self.opinion(any(word in turns[0].content for word in self.words)) for turns in conversations]

    def opinion(self, flagged):
        return Opinion(0.9, ("illicit",), ("nvc",)) if flagged else Opinion(0.2)


def judged(guard, combine, order=Order.AFTER):
    verdicts = GuardEnsemble(WordScorer(), [guard], combine, order).judge([TEA, KNIFE, BOMB])
    return [verdict.decision for verdict in verdicts], [verdict.decided_by for verdict in verdicts]


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize(
    ("combine", "words", "decisions"),
    [
        (Combine.ANY, ["tea"], [BLOCK, REVIEW, BLOCK]),
        (Combine.ANY, ["knife"], [ALLOW, BLOCK, BLOCK]),
        (Combine.ANY, [], [ALLOW, REVIEW, BLOCK]),
        (Combine.ALL, ["tea"], [ALLOW, ALLOW, ALLOW]),
        (Combine.ALL, ["knife", "bomb"], [ALLOW, REVIEW, BLOCK]),
    ],
)
def test_both_orders_give_the_same_decisions(combine, words, decisions, order):
    assert judged(WordGuard(*words), combine, order)[0] == decisions


def test_the_guard_decides_only_about_the_grey_band():
    guard = WordGuard("knife", "tea")
    assert judged(guard, Combine.GREY_BAND) == ([ALLOW, BLOCK, BLOCK], ["rt-words", "words", "rt-words"])
    assert guard.asked == ["knife please"]
    assert judged(WordGuard(), Combine.GREY_BAND)[0] == [ALLOW, ALLOW, BLOCK]
    with pytest.raises(UsageError, match="grey-band"):
        GuardEnsemble(WordScorer(), [guard], Combine.GREY_BAND, Order.BEFORE)


def test_the_verdict_names_the_deciding_model_and_the_other_is_skipped():
    guard = WordGuard("tea")
    assert judged(guard, Combine.ANY)[1] == ["words", "rt-words", "rt-words"]
    assert guard.asked == ["tea please", "knife please"]
    assert judged(WordGuard("bomb"), Combine.ALL)[1] == ["rt-words", "words", "rt-words+words"]


class Named(WordGuard):
    def __init__(self, name, *words):
        super().__init__(*words)
        self.guard_id = name


@pytest.mark.parametrize("order", Order)
@pytest.mark.parametrize(
    ("combine", "decisions"),
    [
        (Combine.ANY, [BLOCK, BLOCK, BLOCK]),
        # The teacher allows tea, and one guard clears each of the others.
        (Combine.ALL, [ALLOW, ALLOW, ALLOW]),
        # Tea has two of four votes, a knife three, a bomb two.
        (Combine.MAJORITY, [REVIEW, BLOCK, REVIEW]),
    ],
)
def test_any_number_of_guards_votes(combine, order, decisions):
    guards = [Named("a", "tea", "knife"), Named("b", "tea", "knife"), Named("c", "bomb")]
    verdicts = GuardEnsemble(WordScorer(), guards, combine, order).judge([TEA, KNIFE, BOMB])
    assert [verdict.decision for verdict in verdicts] == decisions
    assert verdicts[1].categories == (() if combine is Combine.ALL else ("illicit",))


def test_with_a_clear_majority_nobody_else_is_asked():
    guards = [Named("a", "knife"), Named("b", "knife"), Named("c"), Named("d")]
    (verdict,) = GuardEnsemble(WordScorer(), guards, Combine.MAJORITY).judge([KNIFE])
    assert (verdict.decision, verdict.decided_by) == (BLOCK, "rt-words+a+b")
    assert guards[3].asked == []


def test_the_policy_has_a_version_that_any_model_threshold_or_rule_changes():
    def version(*guards, **options):
        return GuardEnsemble(WordScorer(), guards, **options).rules.version

    stricter = Named("a")
    stricter.threshold = 0.4
    versions = [
        version(),
        version(Named("a")),
        version(stricter),
        version(Named("a"), combine=Combine.ALL),
        version(Named("a"), order=Order.BEFORE),
        version(Named("a"), thresholds=Thresholds(0.0, 0.1)),
    ]
    assert len(set(versions)) == len(versions)
    assert version(Named("a", "tea")) == versions[1]
    with pytest.raises(UsageError, match="two guards are called a"):
        version(Named("a"), Named("a"))


@pytest.mark.parametrize("answer", [[], [0.1, 0.2], [float("nan")], [1.5]])
def test_a_guard_with_invalid_answers_stops_the_run(answer):
    guard = WordGuard()
    guard.opinions = lambda conversations: [Opinion(value) for value in answer]
    with pytest.raises(ReftError, match=r"words: (1 rows|expected probabilities)"):
        GuardEnsemble(WordScorer(), [guard]).judge([TEA])


@pytest.fixture
def endpoint():
    """A moderation service that flags "tea"; `failures` are status codes of the first responses."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            texts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["input"]
            server.calls.append(len(texts))
            status = server.failures.pop(0) if server.failures else 200
            results = [
                {
                    "flagged": "tea" in text,
                    "categories": {"illicit": "tea" in text, "hate": False},
                    "category_scores": {"illicit": 0.4 if "tea" in text else 0.1, "hate": 0.2},
                }
                for text in texts
            ]
            body = server.body or json.dumps({"results": results}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.calls, server.failures, server.body = [], [], b""
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def moderations(endpoint, **options):
    client = Endpoint(endpoint.url, None, attempts=4, backoff_seconds=0, called="guard moderations")
    return ModerationGuard("moderations", client, **options)


def probabilities(guard, rows):
    return [found.probability for found in guard.opinions(rows)]


def test_a_moderation_endpoint_is_a_guard(endpoint):
    guard = moderations(endpoint)
    assert isinstance(guard, Guard)
    tea, bomb = guard.opinions([TEA, BOMB])
    assert tea == Opinion(0.5, ("illicit",), ("nvc",), "messages[0].user")
    assert bomb == Opinion(0.2, part="messages[0].user")
    assert probabilities(guard, [()]) == [1.0]
    assert probabilities(guard, [chat(f"cup {index}") for index in range(70)]) == [0.2] * 70
    assert endpoint.calls == [3, 32, 32, 6]
    assert probabilities(moderations(endpoint, categories=["hate"]), [TEA]) == [0.2]


def test_overload_is_retried_and_errors_end_the_run(endpoint):
    guard = moderations(endpoint)
    endpoint.failures = [503, 429]
    assert probabilities(guard, [TEA]) == [0.5]
    for status, failures in ((401, [401]), (500, [500] * 9)):
        endpoint.failures = failures
        with pytest.raises(ReftError, match=rf"guard moderations.*status {status}"):
            guard.opinions([TEA])
    endpoint.failures = []
    nan = b'{"results": [{"flagged": false, "category_scores": {"hate": NaN}}, {"flagged": false}]}'
    for endpoint.body in (b"no", b"{}", b'{"results": [{}, {}]}', b'{"results": [1, 2]}', nan):
        with pytest.raises(ReftError, match="guard moderations"):
            guard.opinions([TEA])


def test_the_report_names_the_deciding_guard(endpoint, tmp_path):
    path, out = tmp_path / "rows.jsonl", tmp_path / "out"
    path.write_text("".join(f'{{"prompt": "{word} now", "response": "x"}}\n' for word in ("tea", "bomb", "milk")))
    report = screen([str(path)], str(out), WordScorer, ScreenConfig(guards=lambda: [moderations(endpoint)]))
    assert report.judges["guards"] == [{"guard_id": "moderations", "threshold": 0.5}]
    assert report.decided_by == {"moderations": 1, "rt-words": 1}
    (part,) = (out / "quarantine").iterdir()
    rows = pq.read_table(part).to_pylist()
    assert [(row["reason"], row["decided_by"], row["guard_score"]) for row in rows] == [
        ("flagged_by_guard", "moderations", 0.5),
        ("score_above_block", "rt-words", None),
    ]
    assert [(row["categories"], row["hazards"]) for row in rows] == [(["illicit"], ["nvc"]), ([], [])]
    assert {row["policy"] for row in rows} == {report.judges["policy"]}
    assert rows[1]["span"] == [0, len("bomb now")]


def test_another_threshold_of_the_guard_is_another_judge(tmp_path):
    data, out = tmp_path / "rows.jsonl", str(tmp_path / "out")
    data.write_text('{"prompt": "tea please", "response": "ok"}\n')
    screen([str(data)], out, WordScorer, ScreenConfig(guards=lambda: [WordGuard()]))
    stricter = type("Stricter", (WordGuard,), {"threshold": 0.1})
    with pytest.raises(ReftError, match="different teachers or thresholds"):
        screen([str(data)], out, WordScorer, ScreenConfig(guards=lambda: [stricter()]))
