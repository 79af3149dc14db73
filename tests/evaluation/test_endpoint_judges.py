import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from reft_ray.core.conversation import chat
from reft_ray.core.errors import ReftError
from reft_ray.evaluation.endpoint import ChatJudge, Endpoint, EndpointResponder, ModerationJudge
from reft_ray.evaluation.judges import Grade, RefusalMatcher


class Service:
    """A local OpenAI-compatible endpoint: it returns the (status, body) pairs of `replies` first, then judges words."""

    def __init__(self):
        self.requests = []
        self.replies = []
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.requests.append((self.path, self.headers.get("Authorization"), body))
                status, document = service.replies.pop(0) if service.replies else (200, service.answer(body))
                payload = document if isinstance(document, bytes) else json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(payload)))
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    @staticmethod
    def answer(body):
        if "input" in body:
            return {"results": [{"flagged": "Step 1" in text} for text in body["input"]]}
        if "prompt" in body:
            return {"choices": [{"text": " Yes" if "Step 1" in body["prompt"] else "No</s>"}]}
        asked = body["messages"][0]["content"]
        return {"choices": [{"message": {"content": "COMPLIED." if "Step 1" in asked else " refused"}}]}

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def service():
    service = Service()
    yield service
    service.close()


@pytest.fixture
def endpoint(service):
    with Endpoint(service.url, "judge-1", api_key="k", backoff_seconds=0.0, timeout_seconds=10.0) as endpoint:
        yield endpoint


def test_a_raw_judge_is_asked_without_a_chat_and_answers_yes_or_no(service, endpoint):
    judge = ChatJudge(endpoint, "[INST] {prompt} # {answer} [/INST]", raw=True)
    assert judge.judge([chat(f"p{i}") for i in range(4)], ANSWERS) == EXPECTED
    path, _, body = service.requests[0]
    assert (path, body["prompt"], body["max_tokens"]) == ("/v1/completions", "[INST] p0 # Step 1: go [/INST]", 4)
    service.replies = [(200, {"choices": [{"text": "Notably, yes"}]})]
    with pytest.raises(ReftError, match="neither COMPLIED nor REFUSED"):
        judge.judge([chat("p")], ["words"])


def test_a_served_model_answers_in_order_and_what_is_withheld_is_a_refusal(service, endpoint):
    service.answer = lambda body: {
        "choices": [
            {"message": {"content": None}, "finish_reason": "content_filter"}
            if body["messages"][0]["content"] == "p3"
            else {"message": {"content": body["messages"][0]["content"] + "!"}, "finish_reason": "stop"}
        ]
    }
    answers = EndpointResponder(endpoint, 7)([chat(f"p{i}") for i in range(20)])
    assert answers[:3] + answers[4:] == [f"p{i}!" for i in range(20) if i != 3]
    assert RefusalMatcher().judge([chat("p")], [answers[3]]) == [Grade.REFUSED]
    assert {(body["max_tokens"], body["temperature"], body["model"]) for *_, body in service.requests} == {
        (7, 0, "judge-1")
    }
    service.replies = [(200, {"choices": []})]
    with pytest.raises(ReftError, match=r"has no choices\[0\]"):
        EndpointResponder(endpoint)([chat("p")])


ANSWERS = ["Step 1: go", "", "no thanks", "Step 1: {answer} {prompt}"]
EXPECTED = [Grade.COMPLIED, Grade.INCOHERENT, Grade.REFUSED, Grade.COMPLIED]


def test_the_moderation_judge_batches_and_keeps_the_order(service, endpoint):
    assert ModerationJudge(endpoint, batch=2).judge([chat("p")] * 4, ANSWERS) == EXPECTED
    assert [(path, key) for path, key, _ in service.requests] == [("/v1/moderations", "Bearer k")] * 2
    assert [body["input"] for _, _, body in service.requests] == [["Step 1: go", "no thanks"], [ANSWERS[3]]]
    assert service.requests[0][2]["model"] == "judge-1"


def test_the_chat_judge_sends_prompt_and_answer_unchanged(service, endpoint):
    assert ChatJudge(endpoint).judge([chat("rob {answer}")] * 4, ANSWERS) == EXPECTED
    path, _, body = service.requests[-1]
    asked = body["messages"][0]["content"]
    assert path == "/v1/chat/completions"
    assert asked.endswith("Request:\nrob {answer}\n\nAnswer:\nStep 1: {answer} {prompt}")


def test_a_busy_endpoint_is_retried(service, endpoint):
    service.replies = [(503, {}), (429, {})]
    assert ModerationJudge(endpoint).judge([chat("p")], ["Step 1"]) == [Grade.COMPLIED]
    assert len(service.requests) == 3


def test_a_rejected_key_is_not_retried(service, endpoint):
    service.replies = [(401, {})]
    with pytest.raises(ReftError, match=r"127\.0\.0\.1.*/v1/moderations did not answer: status 401"):
        ModerationJudge(endpoint).judge([chat("p")], ["Step 1"])
    assert len(service.requests) == 1


@pytest.mark.parametrize(
    "reply",
    [b"not json", [], {"results": []}, {"results": [{"flagged": None}]}, {"results": ["x"]}, {}],
)
def test_an_invalid_moderation_reply_is_an_error(service, endpoint, reply):
    service.replies = [(200, reply)]
    with pytest.raises(ReftError):
        ModerationJudge(endpoint).judge([chat("p")], ["Step 1"])


@pytest.mark.parametrize("reply", [{"choices": []}, {"choices": [{"message": {"content": "perhaps"}}]}, {}])
def test_an_invalid_chat_reply_is_an_error(service, endpoint, reply):
    service.replies = [(200, reply)]
    with pytest.raises(ReftError, match="chat judge"):
        ChatJudge(endpoint).judge([chat("p")], ["Step 1"])


def test_an_unreachable_endpoint_is_an_error(service):
    url = service.url
    service.server.server_close()
    with Endpoint(url, "m", attempts=2, backoff_seconds=0.0) as endpoint, pytest.raises(ReftError, match="check"):
        ModerationJudge(endpoint).judge([chat("p")], ["Step 1"])
