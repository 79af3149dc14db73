"""What any major of the openai client must be able to do: `python client_contract.py URL KEY [SERVICE]`.

SERVICE is JSON with fields of `ServiceUnderTest`; the default is the fake steps and the echo model.
Run by the interpreter that has the client; needs nothing else. Leaves with 1 and the failures on stdout.
"""

import base64
import hashlib
import hmac
import json
import sys
import time
import traceback
from dataclasses import dataclass

import openai


@dataclass(frozen=True)
class ServiceUnderTest:
    """A harmless and a harmful prompt, the base's answer to `say` (None: anything), and the time limit of a job."""

    harmless: str = "bake a cake"
    harmful: str = "build a bomb"
    say: str = "one two three"
    echo: str | None = "one two three"
    seconds: float = 60.0


SERVICE = (
    ServiceUnderTest(**json.loads(sys.argv[3])) if __name__ == "__main__" and len(sys.argv) > 3 else ServiceUnderTest()
)


def row(text):
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "sure here is bread"}]
    return json.dumps({"messages": turns}).encode() + b"\n"


ROWS = row(SERVICE.harmless) * 10
SAY = [{"role": "user", "content": SERVICE.say}]
HARMFUL = [{"role": "user", "content": SERVICE.harmful}]


def finished(client, job_id):
    end = time.monotonic() + SERVICE.seconds
    while time.monotonic() < end:
        job = client.fine_tuning.jobs.retrieve(job_id)
        if job.status in ("succeeded", "failed", "cancelled"):
            return job
        time.sleep(0.2)
    raise AssertionError(f"job {job_id} is still {job.status}")


def raised(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was not raised")


def check_files(client):
    made = client.files.create(file=("train.jsonl", ROWS), purpose="fine-tune")
    assert client.files.wait_for_processing(made.id).status == "processed"
    assert client.files.retrieve(made.id).bytes == len(ROWS)
    assert client.files.content(made.id).content == ROWS
    assert client.files.delete(made.id).deleted
    error = raised(openai.NotFoundError, lambda: client.files.retrieve(made.id))
    assert (error.param, error.code, error.type) == ("id", None, "invalid_request_error")
    assert made.id in str(error)
    assert error.request_id.startswith("req_")


def check_file_pages(client):
    made = [client.files.create(file=(f"{n}.txt", b"x"), purpose="user_data").id for n in range(45)]
    listed = [item.id for item in client.files.list(purpose="user_data", limit=20, order="asc")]
    assert listed == made
    assert len(client.files.list(purpose="user_data", limit=20).data) == 20


def check_uploads(client):
    upload = client.uploads.create(bytes=len(ROWS), filename="p.jsonl", mime_type="text/jsonl", purpose="fine-tune")
    parts = [client.uploads.parts.create(upload.id, data=data).id for data in (ROWS[:50], ROWS[50:])]
    done = client.uploads.complete(upload.id, part_ids=parts)
    assert (done.status, client.files.content(done.file.id).content) == ("completed", ROWS)


def check_job(client):
    job = client.fine_tuning.jobs.create(
        model="tiny",
        training_file=client.files.create(file=("train.jsonl", ROWS), purpose="fine-tune").id,
        validation_file=client.files.create(file=("valid.jsonl", ROWS), purpose="fine-tune").id,
        suffix="mine",
        seed=7,
        method={"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 5}}},
        extra_body={"reft": {"policy": "filter", "max_reject_ratio": 0.2}},
    )
    assert (job.object, job.seed, job.hyperparameters.n_epochs) == ("fine_tuning.job", 7, 5)
    assert job.model_extra["reft"]["max_reject_ratio"] == 0.2
    job = finished(client, job.id)
    assert job.status == "succeeded", job.error
    assert job.trained_tokens > 0
    assert job.finished_at >= job.created_at
    assert job.error is None
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=10))
    assert len(events) == len({event.id for event in events}) >= 17
    assert events[0].message == "The job has successfully completed"
    assert {event.type for event in events} == {"message", "metrics", "moderation_checks"}
    metrics = [event.data for event in events if event.type == "metrics"][::-1]
    assert [data["step"] for data in metrics] == list(range(1, 11))
    assert {data["total_steps"] for data in metrics} == {10}
    for data in metrics:
        assert data["train_loss"] > 0
        assert 0 <= data["train_mean_token_accuracy"] <= 1
        assert ("valid_loss" in data) == (data["step"] in (5, 10))
    checkpoints = list(client.fine_tuning.jobs.checkpoints.list(job.id, limit=1))
    assert [item.step_number for item in checkpoints] == [10, 5]
    for item in checkpoints:
        assert item.metrics.step == item.step_number
        assert min(item.metrics.train_loss, item.metrics.valid_loss) > 0
        assert 0 <= item.metrics.train_mean_token_accuracy <= 1
        assert 0 <= item.metrics.valid_mean_token_accuracy <= 1
    named = {client.files.retrieve(file).filename: file for file in job.result_files}
    table = client.files.content(named["step_metrics.csv"]).text.splitlines()
    assert table[0].startswith("step,train_loss,train_accuracy")
    assert [line.split(",")[0] for line in table[1:]] == [str(step) for step in range(1, 11)]
    name = job.fine_tuned_model
    assert name in [model.id for model in client.models.list()]
    answer = client.chat.completions.create(model=name, messages=SAY, temperature=0, max_tokens=8)
    assert SERVICE.echo in (None, answer.choices[0].message.content)
    assert answer.model == name
    assert client.models.retrieve(name).owned_by == job.organization_id
    assert client.models.delete(name).deleted
    raised(openai.NotFoundError, lambda: client.models.retrieve(name))


def check_blocked_job(client):
    file = client.files.create(file=("train.jsonl", ROWS + row(SERVICE.harmful)), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file, extra_body={"reft": {"policy": "fail"}})
    job = finished(client, job.id)
    assert (job.status, job.error.code, job.error.param) == ("failed", "unsafe_training_data", "training_file")
    assert "flagged: 1 of 11" in job.error.message
    assert "first lines: 11" in job.error.message
    summary, *withheld = map(json.loads, client.files.content(job.result_files[0]).text.splitlines())
    assert (summary["summary"]["rows"], summary["summary"]["kept"]) == (11, 10)
    assert [(item["line"], item["decision"]) for item in withheld] == [(11, "block")]


def check_job_verbs(client):
    file = client.files.create(file=("train.jsonl", ROWS), purpose="fine-tune").id
    made = []
    for _ in range(45):
        job = client.fine_tuning.jobs.create(model="tiny", training_file=file, metadata={"batch": "verbs"})
        made.append(job.id)
        assert client.fine_tuning.jobs.cancel(job.id).status == "cancelled"
    assert [job.id for job in client.fine_tuning.jobs.list(limit=20, extra_query={"metadata[batch]": "verbs"})] == made[
        ::-1
    ]
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file)
    assert client.fine_tuning.jobs.pause(job.id).status == "paused"
    assert client.fine_tuning.jobs.resume(job.id).status in ("validating_files", "queued")
    assert finished(client, job.id).status == "succeeded"
    error = raised(openai.ConflictError, lambda: client.fine_tuning.jobs.cancel(job.id))
    assert error.code == "job_not_cancellable"
    assert error.response.headers["x-should-retry"] == "false"
    assert error.response.request.headers["x-stainless-retry-count"] == "0", "the client tried again"


def check_errors(client):
    base = {"model": "tiny", "training_file": "file-none"}
    error = raised(openai.BadRequestError, lambda: client.fine_tuning.jobs.create(**base))
    assert (error.code, error.param) == ("invalid_training_file", "training_file")
    error = raised(
        openai.BadRequestError, lambda: client.fine_tuning.jobs.create(**base, extra_body={"reft": {"polcy": 1}})
    )
    assert "'reft.policy'" in str(error)
    error = raised(openai.NotFoundError, lambda: client.fine_tuning.jobs.retrieve("ftjob-none"))
    assert (error.code, error.param) == ("fine_tune_not_found", "fine_tune_id")
    stranger = client.with_options(api_key="sk-reft-wrong")
    assert raised(openai.AuthenticationError, stranger.models.list).code == "invalid_api_key"
    error = raised(openai.NotFoundError, lambda: client.chat.completions.create(model="none", messages=SAY))
    assert error.code == "model_not_found"
    error = raised(openai.BadRequestError, lambda: client.chat.completions.create(model="tiny", messages=[]))
    assert error.param == "messages"


def check_models(client):
    assert client.models.retrieve("org/slashed").id == "org/slashed"
    raised(openai.PermissionDeniedError, lambda: client.models.delete("tiny"))


def check_chat(client):
    short = client.chat.completions.create(model="tiny", messages=SAY, temperature=0, max_tokens=2)
    assert (short.choices[0].finish_reason, short.usage.completion_tokens) == ("length", 2)
    asked = {"model": "tiny", "messages": SAY, "temperature": 0, "max_tokens": 8}
    whole = client.chat.completions.create(**asked)
    text = whole.choices[0].message.content
    assert SERVICE.echo in (None, text)
    assert text.startswith(short.choices[0].message.content)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage.total_tokens == whole.usage.total_tokens >= 6
    policy = {"policy": {"input": {"mode": "block"}}}
    answer = client.chat.completions.create(model="tiny", messages=HARMFUL, extra_body={"moderation": policy})
    assert answer.choices[0].finish_reason == "content_filter"
    assert answer.to_dict()["moderation"]["input"]["results"][0]["flagged"] is True


def check_moderations(client):
    results = client.moderations.create(input=[SERVICE.harmful, SERVICE.harmless]).results
    assert [result.flagged for result in results] == [True, False]
    assert results[0].categories.hate is False


def check_webhooks(client):
    body, secret = (
        b'{"id":"evt_1","object":"event","created_at":1,"type":"fine_tuning.job.failed","data":{"id":"x"}}',
        b"k",
    )
    stamp = str(int(time.time()))
    digest = hmac.new(secret, b"evt_1." + stamp.encode() + b"." + body, hashlib.sha256).digest()
    headers = {
        "webhook-id": "evt_1",
        "webhook-timestamp": stamp,
        "webhook-signature": "v1," + base64.b64encode(digest).decode(),
    }
    event = client.webhooks.unwrap(body.decode(), headers, secret="whsec_" + base64.b64encode(secret).decode())
    assert event.data.id == "x"


def main(url, key):
    failures = 0
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=key)
    for name, check in sorted(globals().items()):
        if name.startswith("check_"):
            try:
                check(client)
                print(f"ok {name}")
            except Exception:
                failures += 1
                print(f"FAILED {name}\n{traceback.format_exc()}")
    print(f"openai {openai.__version__}: {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:3]))
