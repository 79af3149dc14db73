"""The teacher replica without Ray: judging, replacing teachers, health checks."""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from reft_ray.core.conversation import chat
from reft_ray.core.errors import ReftError
from reft_ray.core.scoring import TextScore
from reft_ray.core.verdict import Decision, Thresholds
from reft_ray.serving import loading, teacher
from reft_ray.serving.app import Teacher
from reft_ray.serving.args import TeacherArgs
from reft_ray.serving.teacher import TeacherReplica
from reft_ray.telemetry import catalog
from reft_ray.telemetry.recorder import MemoryRecorder
from reft_ray.telemetry.tracing import Tracer
from reft_ray.testbed.word_scorer import WordScorer

WORDS = {"scorer": "words"}
ROWS = [chat("Good morning."), chat("Build a bomb."), chat("A knife.", "Here it is."), chat("")]


def run(body: Callable[[TeacherReplica, MemoryRecorder], Coroutine[Any, Any, None]]) -> None:
    async def started() -> None:
        recorder = MemoryRecorder()
        replica = TeacherReplica(recorder)
        await replica.reconfigure(WORDS)
        await body(replica, recorder)

    asyncio.run(started())


async def switched(replica: TeacherReplica, config: dict[str, Any], done: Callable[[Any], bool]) -> Any:
    await replica.reconfigure(config)
    until = time.monotonic() + 60
    while not done(info := await replica.info()):
        assert time.monotonic() < until
        await asyncio.sleep(0.001)
    return info


def test_calls_with_different_thresholds_share_a_batch() -> None:
    async def body(replica: TeacherReplica, recorder: MemoryRecorder) -> None:
        strict = Thresholds(-0.95, 0.05)
        default, tight = await asyncio.gather(
            replica.judge(ROWS, None, 10, True), replica.judge(ROWS, strict, 10, False)
        )
        assert default is not None
        assert tight is not None
        assert default.teacher == tight.teacher == "rt-words"
        assert [verdict.decision for verdict in default.verdicts] == ["allow", "block", "review", "block"]
        assert [verdict.decision for verdict in tight.verdicts] == ["review", "block", "block", "block"]
        assert {verdict.threshold for verdict in tight.verdicts} == {0.05}
        assert default.verdicts[3].windows == 0
        assert sum(recorder.observations(catalog.FILTER_BATCH_ROWS)) == 8

    run(body)


def test_a_row_without_text_is_blocked_under_any_thresholds() -> None:
    async def body(replica: TeacherReplica, recorder: MemoryRecorder) -> None:
        judgement = await replica.judge([chat("  ")], Thresholds(1.0, 1.0), 10, True)
        assert judgement is not None
        assert judgement.verdicts[0].decision is Decision.BLOCK

    run(body)


def test_an_expired_call_has_no_verdict() -> None:
    async def body(replica: TeacherReplica, recorder: MemoryRecorder) -> None:
        assert await replica.judge(ROWS, None, -1, True) is None

    run(body)


def test_a_new_teacher_replaces_the_old_one_and_its_cache() -> None:
    async def body(replica: TeacherReplica, recorder: MemoryRecorder) -> None:
        await replica.judge(ROWS, None, 10, True)
        await replica.judge(ROWS, None, 10, True)
        assert recorder.total(catalog.FILTER_CACHE, result="hit") == 4
        info = await switched(replica, WORDS | {"teacher": "rt-2"}, lambda info: info.id == "rt-2")
        assert info.details.get("refused_update") is None
        judgement = await replica.judge(ROWS, None, 10, True)
        assert judgement is not None
        assert judgement.teacher == "rt-2"
        assert recorder.total(catalog.FILTER_CACHE, result="hit") == 4
        announced = {labels["teacher"]: value for labels, value in recorder.series(catalog.TEACHER_INFO)}
        assert announced == {"rt-2": 1}

    run(body)


def test_a_replica_follows_the_link_to_its_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `reft-ray teacher install` and `rollback` move it; one that is refused is not loaded again and again."""
    link = tmp_path / "current"

    def show(name: str) -> str:
        (tmp_path / name).mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(name, target_is_directory=True)
        return str(tmp_path / name)

    first = show("rt-first")
    loads = []

    def load(args: TeacherArgs) -> loading.LoadedTeacher:
        loads.append(args.teacher)
        if args.teacher.endswith("broken"):
            raise ReftError("it is broken")
        return loading.load_teacher(args)

    monkeypatch.setattr(teacher, "load_teacher", load)

    async def body(replica: TeacherReplica, recorder: MemoryRecorder) -> None:
        await replica.reconfigure({"scorer": "words", "teacher": str(link)})
        assert (await settled(replica)).id == first
        second = show("rt-second")
        await replica.check_health()
        assert (await settled(replica)).id == second
        broken = show("rt-broken")
        for _ in range(3):
            await replica.check_health()
            info = await settled(replica)
            assert (info.id, info.details["refused_update"]) == (second, "it is broken")
        assert loads.count(broken) == 1
        show("rt-first")
        await replica.check_health()
        assert (await settled(replica)).id == first

    async def settled(replica: TeacherReplica) -> Any:
        if replica._replacing is not None:
            await replica._replacing
        return await replica.info()

    run(body)


def test_if_a_new_teacher_fails_to_load_the_old_one_stays(caplog: Any) -> None:
    async def body(replica: TeacherReplica, recorder: MemoryRecorder) -> None:
        info = await switched(replica, {"teacher": "/nowhere"}, lambda info: "refused_update" in info.details)
        assert info.id == "rt-words"
        assert "/nowhere" in str(info.details["refused_update"])
        info = await switched(replica, WORDS, lambda info: "refused_update" not in info.details)
        assert info.id == "rt-words"

    run(body)


def test_a_call_is_traced_with_its_verdicts_and_without_its_text() -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))

    async def body() -> None:
        replica = TeacherReplica(tracer=Tracer(provider))
        await replica.reconfigure(WORDS)
        await replica.judge(ROWS, None, 10, True)

    asyncio.run(body())
    (span,) = exporter.get_finished_spans()
    assert (span.name, span.attributes["reft.stream"]) == ("moderation rt-words", "moderation")
    decisions = [event.attributes["gen_ai.evaluation.score.label"] for event in span.events]
    assert decisions == ["allow", "block", "review", "block"]
    assert "bomb" not in span.to_json()


def test_the_replica_configures_logs_and_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    configured: list[bool] = []
    tracer = Tracer()
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.setattr("reft_ray.telemetry.logs.configure", lambda: configured.append(True))
    monkeypatch.setattr("reft_ray.serving.app.tracer_from_environment", lambda: tracer)
    assert Teacher("reft")._tracer is tracer
    assert configured == [True]


def test_wrong_configuration_is_rejected_at_once() -> None:
    async def body(replica: TeacherReplica, recorder: MemoryRecorder) -> None:
        with pytest.raises(ReftError, match="did you mean teacher"):
            await replica.reconfigure({"techer": "x"})

    run(body)


def test_a_first_teacher_that_misjudges_its_canaries_is_rejected() -> None:
    canary = {"harmful": "Good morning.", "harmless": "Build a bomb."}
    with pytest.raises(ReftError, match="misjudges the canaries"):
        asyncio.run(TeacherReplica().reconfigure(WORDS | {"canary": canary}))


class Drifting(WordScorer):
    """Scores correctly at first, then with an offset."""

    offset = 0.0

    def score(self, texts: Sequence[str]) -> list[TextScore]:
        return [TextScore(result.score + self.offset) for result in super().score(texts)]


@pytest.mark.parametrize("offset", [0.05, -0.05, float("nan")])
def test_the_health_check_fails_when_scores_change(monkeypatch: pytest.MonkeyPatch, offset: float) -> None:
    scorer = Drifting()
    monkeypatch.setattr(loading, "_scorer", lambda args: (scorer, ()))

    async def body(replica: TeacherReplica, recorder: MemoryRecorder) -> None:
        await replica.check_health()
        scorer.offset = offset
        with pytest.raises(ReftError, match="must be replaced"):
            await replica.check_health()

    run(body)


def test_a_health_check_records_the_canary_decisions(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Drifting()
    monkeypatch.setattr(loading, "_scorer", lambda args: (scorer, ()))
    canary = {"canary": {"harmful": "Build a bomb.", "harmless": "Good morning."}}

    async def body(replica: TeacherReplica, recorder: MemoryRecorder) -> None:
        gauges = (catalog.FILTER_CANARY_RECALL, catalog.FILTER_CANARY_FALSE_POSITIVES)
        assert [recorder.series(gauge) for gauge in gauges] == [[], []]
        await switched(replica, WORDS | canary, lambda info: bool(recorder.series(gauges[0])))
        assert [recorder.total(gauge, teacher="rt-words") for gauge in gauges] == [1, 0]
        scorer.offset = 2.0
        with pytest.raises(ReftError, match="must be replaced"):
            await replica.check_health()
        assert [recorder.total(gauge, teacher="rt-words") for gauge in gauges] == [1, 1]
        scorer.offset = -2.0
        with pytest.raises(ReftError, match="must be replaced"):
            await replica.check_health()
        assert [recorder.total(gauge, teacher="rt-words") for gauge in gauges] == [0, 0]
        monkeypatch.setattr(loading, "_scorer", lambda args: (WordScorer("rt-2"), ()))
        await switched(replica, WORDS | {"teacher": "rt-2"}, lambda info: info.id == "rt-2")
        assert [recorder.series(gauge) for gauge in gauges] == [[], []]

    run(body)


def test_scores_that_are_not_cosines_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Drifting()
    scorer.offset = float("nan")
    monkeypatch.setattr(loading, "_scorer", lambda args: (scorer, ()))
    with pytest.raises(ReftError, match="a score is nan"):
        asyncio.run(TeacherReplica().reconfigure(WORDS))


def test_without_a_teacher_nothing_is_healthy() -> None:
    with pytest.raises(ReftError, match="no teacher is configured"):
        asyncio.run(TeacherReplica().check_health())


def test_drift_of_scores_is_monitored_per_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_scorer", lambda args: (WordScorer(), [50, 0, 0, 50]))

    async def body(replica: TeacherReplica, recorder: MemoryRecorder) -> None:
        await replica.judge([chat("Good morning."), chat("A bomb.")] * 500, None, 10, True)
        await replica.judge([chat("A bomb.")] * 1000, None, 10, False)
        drift = {labels["stream"]: value for labels, value in recorder.series(catalog.FILTER_SCORE_PSI)}
        assert drift["moderation"] < 0.1 < 1 < drift["screening"]
        monkeypatch.setattr(loading, "_scorer", lambda args: (WordScorer("rt-2"), ()))
        await switched(replica, WORDS | {"teacher": "rt-2"}, lambda info: info.id == "rt-2")
        assert recorder.series(catalog.FILTER_SCORE_PSI) == []

    run(body)


def test_the_app_module_does_not_load_torch_before_openmp_is_configured() -> None:
    code = (
        "import os, sys, reft_ray.serving.app as app\n"
        "assert 'torch' not in sys.modules\n"
        "app.Teacher('reft')\n"
        "assert 'torch' not in sys.modules and os.environ['GOMP_SPINCOUNT'] == '2000'\n"
    )
    # The variables of `openmp.BRIEF` are set only where none of them was chosen.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)
