"""From a user's request to its panel and its alert: the real service, a real job, a real Prometheus."""

import json
import socket
import time
from collections import Counter
from functools import partial

import httpx
import openai
import pytest
from openai import NOT_GIVEN

from reft_ray.serving.args import ServeArgs
from reft_ray.serving.local import local_service
from reft_ray.telemetry.recording_rules import RECORDING_RULES

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(900)]

PORT = 8441
EPOCHS = 50
"""Long enough for the training gauges to be scraped."""
HARMLESS, HARMFUL = "how to bake a car", "how to steal a car"
STREAMED = 520
"""Two rounds fill a window of the drift monitor."""


@pytest.fixture(scope="module")
def running(toy, tmp_path_factory):
    """The service's address, and what Prometheus scrapes."""
    root = tmp_path_factory.mktemp("watched")
    with socket.create_server(("127.0.0.1", 0)) as free:
        metrics_port = free.getsockname()[1]
    canary = {"harmful": "how to steal a wallet", "harmless": "how to bake a cake"}
    args = ServeArgs.model_validate(
        {
            "teacher": {"teacher": str(toy.folder / "teacher"), "precision": "float32", "canary": canary},
            "screenings_uri": str(root / "screenings"),
            "service": toy.service(root),
        }
    )
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        with local_service(args, PORT, metrics_port=metrics_port) as url:
            yield url, {"reft-ray": f"127.0.0.1:{metrics_port}", "reft-gateway": f"127.0.0.1:{PORT}"}


@pytest.fixture(scope="module")
def prometheus(running, watching):
    with watching(running[1]) as found:
        yield found


@pytest.fixture(scope="module")
def ledger(running, prometheus):
    """All user actions, twice, so that counters have a rate; what was sent, by series."""
    url, _ = running
    sent: Counter[str] = Counter()
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0) as client:
        for _ in range(2):
            use(client, url, sent)
            prometheus.until_none(lambda: wrong(prometheus, sent), seconds=40)
    prometheus.wait(
        "computed the records", lambda: all(prometheus.query(item.name) for item in RECORDING_RULES), seconds=60
    )
    return sent


def jsonl_of(prompt: str, count: int) -> bytes:
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "sure here is bread"}]
    return (json.dumps({"messages": turns}) + "\n").encode() * count


def use(client, url, sent) -> None:
    """Moderate, screen, finetune with and without success, review withheld rows, chat, and send invalid requests."""
    # New texts each time, because cached scores form no batch.
    polite = " please" * (1 + sent['reft_filter_rows_total{stream="moderation",decision="block"}'])
    results = client.moderations.create(input=[HARMLESS + polite] * 3 + [HARMFUL + polite]).results
    assert [item.flagged for item in results] == [False, False, False, True]
    sent['reft_filter_rows_total{stream="moderation",decision="allow"}'] += 3
    sent['reft_filter_rows_total{stream="moderation",decision="block"}'] += 1

    body = jsonl_of(HARMLESS, STREAMED) + b"no row\n" + jsonl_of(HARMFUL, 5)
    lines = httpx.post(f"{url}/v1/screenings", content=body, timeout=60).text.splitlines()
    assert len(lines) == STREAMED + 7, lines[-1]
    sent['reft_filter_rows_total{stream="screening",decision="allow"}'] += STREAMED
    sent['reft_filter_rows_total{stream="screening",decision="block"}'] += 5

    done = finetune(client, jsonl_of(HARMLESS, 20) + jsonl_of(HARMFUL, 2), sent, held_out=jsonl_of(HARMLESS, 4))
    assert done.status == "succeeded", done.error
    messages = [{"role": "user", "content": "tell me"}]
    client.chat.completions.create(model=done.fine_tuned_model, messages=messages, max_tokens=4)
    done = finetune(client, jsonl_of(HARMFUL, 12), sent)
    assert (done.status, done.error.code) == ("failed", "unsafe_training_data")
    sent['reft_job_failures_total{code="unsafe_training_data"}'] += 1

    paused = finetune(client, jsonl_of(HARMLESS, 20) + jsonl_of(HARMFUL, 2), sent, policy="review")
    assert paused.status == "paused"
    rows = client.get("/reviews", cast_to=dict, options={"params": {"job": paused.id, "kind": "withheld"}})["data"]
    for row, action, code in zip(rows, ("approve", "reject"), ("harmless", "harmful_request"), strict=True):
        client.post(f"/reviews/{row['id']}/decision", cast_to=dict, body={"action": action, "code": code})
    assert ended(client, paused.id).status == "succeeded"
    sent['reft_jobs{job="reft-gateway",status="succeeded"}'] += 1
    sent['reft_gate_results_total{result="passed"}'] += 1
    sent['reft_review_decisions_total{outcome="approved"}'] += 1
    sent['reft_review_decisions_total{outcome="rejected"}'] += 1

    with pytest.raises(openai.NotFoundError):
        client.files.retrieve("file-none")
    sent['reft_api_requests_total{route="/v1/files/{file_id}",code="404"}'] += 1


def finetune(client, rows: bytes, sent, held_out: bytes | None = None, policy: str = "filter"):
    """A job, once it has ended or waits for review."""
    upload = partial(client.files.create, purpose="fine-tune")
    file = upload(file=("train.jsonl", rows))
    validation = upload(file=("held_out.jsonl", held_out)).id if held_out else NOT_GIVEN
    job = client.fine_tuning.jobs.create(
        model="toy",
        training_file=file.id,
        validation_file=validation,
        hyperparameters={"n_epochs": EPOCHS},
        extra_body={"reft": {"policy": policy}},
    )
    done = ended(client, job.id)
    sent["reft_screening_rows_total{}"] += rows.count(b"\n")
    if done.status != "paused":
        sent[f'reft_jobs{{job="reft-gateway",status="{done.status}"}}'] += 1
    if done.status == "succeeded":
        sent['reft_gate_results_total{result="passed"}'] += 1
    return done


def ended(client, job_id: str):
    while (job := client.fine_tuning.jobs.retrieve(job_id)).status not in ("succeeded", "failed", "paused"):
        time.sleep(0.2)
    return job


def wrong(prometheus, sent) -> list[str]:
    """The series whose values in Prometheus differ."""
    found = []
    for series, count in sent.items():
        name, selector = series.split("{", 1)
        expr = f"sum({name}{{{selector})"
        value = next((value for _, value in prometheus.query(expr)), None)
        if value != count:
            found.append(f"{series} is {value}, sent {count}")
    return found


def test_what_was_sent_is_counted_exactly(prometheus, ledger):
    assert wrong(prometheus, ledger) == []


def test_every_panel_holds_data(prometheus, ledger):
    assert prometheus.silent_panels(prometheus.lately) == []


def test_every_alert_sees_its_signals(prometheus, ledger):
    assert prometheus.silent_signals(prometheus.lately) == []


def test_no_rule_is_in_error_and_no_invariant_is_broken(prometheus, ledger):
    rules = [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]
    assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"] == []
    firing = {rule["name"] for rule in rules if rule.get("state") == "firing"}
    assert not firing & {"ReftUnscreenedRows", "ReftUnaccountedRows", "ReftAuditChainBroken", "ReftCanaryRecallLow"}
