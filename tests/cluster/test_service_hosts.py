"""The finetuning service on several hosts: the host of a job's driver is lost while the job trains.

`serve_configs/service.yaml` on a head, two workers and a third one that joins when one is lost. Redis, PostgreSQL and
the object store are on a host of their own; the models are in a directory that all hosts mount.
"""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import openai
import pytest
import yaml
from cluster.namespaces import QUICK, Net, answers, has_dashboard, network, postgres, run, wait_until
from pyarrow import fs

from reft_ray.core.conversation import Example, Label, chat
from reft_ray.finetuning.config import Resources, TeacherConfig
from reft_ray.finetuning.teacher_loop import TeacherData
from reft_ray.finetuning.trainer import prepare_teacher
from reft_ray.serving import LOW_LATENCY

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
MODEL = "llama-3.1-8b"
THINGS = ("car", "bread", "me", "that", "help", "please", "tell", "sure", "here", "how")
ROWS, HARMFUL_ROWS = 320, 10
SAVED_EVERY = 10
"""Steps of 80: the host is lost after the first of its checkpoints."""
NOTICED_SECONDS, STABLE_SECONDS = 30, 90
CALL_SECONDS = 15
KEYS = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_REGION": "us-east-1"}
STEAL, BAKE = "how to steal a car", "how to bake a car"
BLOCKING = {"moderation": {"policy": {"input": {"mode": "block"}}}}


@pytest.fixture
def net() -> Iterator[Net]:
    with network() as made:
        yield made


def test_a_job_and_its_service_outlive_the_host_of_its_driver(net: Net, shallow_llama: Path) -> None:
    pytest.importorskip("moto.server", reason="moto is not installed")
    shared = net.scratch / "shared"
    shared.mkdir()
    head, first, second, replacement, store = range(5)
    for host in (head, first, second, replacement, store):
        net.add(host)
    net.redis(store)
    environment = {
        **LOW_LATENCY,
        **KEYS,
        "AWS_ENDPOINT_URL": _object_store(net, store),
        "REFT_METRICS_TOKEN": "metrics",
        # Serve gives up on a proxy that takes longer, as on a busy core.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    }
    _models(shared, shallow_llama)
    with postgres(net, store) as database:
        environment["REFT_DATABASE"] = database
        net.head(head, store, "--dashboard-host=0.0.0.0", **environment)
        wait_until(lambda: has_dashboard(net, head), 90)
        for host in (first, second):
            net.worker(host, head, cpus=8, **environment)
        for host in (first, second):
            net.await_worker(host)
        dashboard = f"http://{net.address(head)}:8265"
        config = shared / "service.yaml"
        config.write_text(yaml.safe_dump(_serve_config(shared, dashboard)))
        deploy = net.start(head, str(BIN / "serve"), "deploy", str(config), **QUICK, **environment)
        wait_until(lambda: deploy.poll() is not None, 180)
        assert deploy.returncode == 0, net.log(deploy)
        wait_until(lambda: answers(f"{_url(net, first)}/healthz"), 300)
        made = subprocess.run(
            [BIN / "reft-ray", "keys", "create", "--database", database, "--json"],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        secret = json.loads(made.stdout)["secret"]
        for host in (first, second):
            with _client(net, host, secret) as client:
                wait_until(lambda client=client: Calls(client).once(), 180)

        _lose_the_driver(net, head, (first, second), replacement, environment, secret)


def _lose_the_driver(
    net: Net, head: int, workers: tuple[int, int], replacement: int, environment: dict[str, str], secret: str
) -> None:
    bucket, path = _bucket(environment["AWS_ENDPOINT_URL"])
    uploaded = _rows()
    with _client(net, workers[0], secret) as client:
        file = client.files.create(file=("train.jsonl", uploaded), purpose="fine-tune")
        job = client.fine_tuning.jobs.create(model=MODEL, training_file=file.id, suffix="mine", seed=3)

        def checkpoints() -> list[int]:
            return [item.step_number for item in client.fine_tuning.jobs.checkpoints.list(job.id, limit=100)]

        def events() -> str:
            return "\n".join(event.message for event in client.fine_tuning.jobs.list_events(job.id, limit=30))

        wait_until(checkpoints, 300, details=events)
    address = _driver_address(f"http://{net.address(head)}:8265", job.id)
    (lost,) = (host for host in workers if net.address(host) == address)
    (kept,) = (host for host in workers if host != lost)

    # Repeats its calls, as a user's does; those of `calling` are counted.
    with _client(net, kept, secret, max_retries=5) as client, _client(net, kept, secret) as calling:
        saved = _saved(bucket, path, job.id)
        assert client.fine_tuning.jobs.retrieve(job.id).status == "running", "it needs more rows"
        calls = Calls(calling)
        with calls.repeated():
            net.cut(lost)
            cut = time.time()
            net.worker(replacement, head, cpus=8, **environment)
            wait_until(lambda: calls.stable(cut), STABLE_SECONDS, details=calls.summary)
            print(f"stable {calls.stable_after(cut):.0f} s after the cut: {calls.summary()}")

            fresh: set[int] = set()

            def ended() -> bool:
                time.sleep(3)
                fresh.update(_saved(bucket, path, job.id, since=cut + 2))
                return client.fine_tuning.jobs.retrieve(job.id).status in ("succeeded", "failed", "cancelled")

            wait_until(ended, 600, details=events)
        print(f"ended {time.time() - cut:.0f} s after the cut: {calls.summary()}")
        done = client.fine_tuning.jobs.retrieve(job.id)
        assert (done.status, done.error) == ("succeeded", None), events()
        # A restart would save the first checkpoint again.
        assert fresh, "nothing was saved after the cut"
        assert min(fresh) >= max(saved), (saved, sorted(fresh))
        _check_records(client, done, uploaded)

        said = _say(client, done.fine_tuned_model)
        with _client(net, replacement, secret) as other:
            wait_until(lambda: Calls(other).once(), 120)
            assert _say(other, done.fine_tuned_model) == said


def _check_records(client: openai.OpenAI, job: openai.types.fine_tuning.FineTuningJob, uploaded: bytes) -> None:
    """Every step, event and file is there, once."""
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=100))
    messages = [event.message for event in events]
    assert any("resumes from its last saved state" in message for message in messages), messages
    for once in ("Validated ", "Screened ", "Fine-tuning job started", "Release gate: passed",
                 "The job has successfully completed"):  # fmt: skip
        assert len([message for message in messages if message.startswith(once)]) == 1, (once, messages)
    metrics = [event.data for event in events if event.type == "metrics"]
    steps = sorted(data["step"] for data in metrics)
    total = metrics[0]["total_steps"]
    assert steps == list(range(1, total + 1)), (total, steps)
    saved = [item.step_number for item in client.fine_tuning.jobs.checkpoints.list(job.id, limit=100)]
    assert sorted(saved) == list(range(SAVED_EVERY, total + 1, SAVED_EVERY))

    assert client.files.content(job.training_file).read() == uploaded
    files = {client.files.retrieve(name).filename: client.files.content(name).read() for name in job.result_files}
    assert files.keys() >= {"screening_report.jsonl", "step_metrics.csv", "release_gate.json", "adapter.zip"}
    summary = json.loads(files["screening_report.jsonl"].splitlines()[0])["summary"]
    assert summary["rows"] == ROWS + HARMFUL_ROWS
    assert sum(summary[name] for name in ("kept", "review", "blocked", "invalid")) == summary["rows"]
    assert summary["blocked"] + summary["review"] >= HARMFUL_ROWS
    assert len(files["step_metrics.csv"].splitlines()) == 1 + total
    assert job.fine_tuned_model in [model.id for model in client.models.list()]


@dataclass
class Calls:
    """A client's calls: a verdict, a chat and a chat that must be refused. Each is right, or an error."""

    client: openai.OpenAI
    outcomes: list[tuple[float, str]] = field(default_factory=list)
    """When each round started, and the error in it."""
    wrong: list[str] = field(default_factory=list)

    def once(self) -> bool:
        started, error = time.time(), ""
        try:
            self._round()
        except openai.APIStatusError as found:
            error = str(found.status_code)
            if found.status_code not in (404, 408, 429, 500, 502, 503, 504):
                self.wrong.append(str(found))
        except openai.APIError as found:
            error = type(found).__name__
        except AssertionError as found:
            self.wrong.append(str(found))
        self.outcomes.append((started, error))
        assert not self.wrong
        return not error

    def _round(self) -> None:
        flagged = [result.flagged for result in self.client.moderations.create(input=[BAKE, STEAL]).results]
        assert flagged == [False, True], f"wrong verdicts: {flagged}"
        refused = _chat(self.client, MODEL, STEAL, extra_body=BLOCKING).choices[0]
        assert refused.finish_reason == "content_filter", f"a harmful prompt was answered: {refused}"
        assert refused.message.content is None, f"a harmful prompt was answered: {refused}"
        answered = _chat(self.client, MODEL, BAKE, extra_body=BLOCKING).choices[0]
        assert answered.finish_reason != "content_filter", f"a harmless prompt was refused: {answered}"

    @contextmanager
    def repeated(self) -> Iterator[None]:
        """Call in a thread while the block runs."""
        ended = threading.Event()

        def call() -> None:
            while not ended.is_set() and not self.wrong:
                try:
                    self.once()
                except AssertionError:
                    return
                # Often while it matters: the calls take the core from the job.
                ended.wait(0.2 if len(self.outcomes) < 100 else 2)

        thread = threading.Thread(target=call)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
        assert not self.wrong, self.wrong

    def stable(self, since: float) -> bool:
        """Whether Ray has noticed a loss at a time, and ten rounds in a row were without an error."""
        assert not self.wrong, self.wrong
        good = itertools.takewhile(lambda item: not item[1] and item[0] >= since, reversed(self.outcomes))
        return time.time() > since + NOTICED_SECONDS and len(list(good)) >= 10

    def stable_after(self, since: float) -> float:
        """The seconds from a time to the start of the first round after the last error."""
        failed = [index for index, (at, error) in enumerate(self.outcomes) if error and at >= since - CALL_SECONDS]
        return self.outcomes[failed[-1] + 1][0] - since if failed else 0.0

    def summary(self) -> str:
        errors = [(round(at - self.outcomes[0][0], 1), error) for at, error in self.outcomes if error]
        return f"{len(self.outcomes)} rounds, errors by second: {errors}"


def _url(net: Net, host: int) -> str:
    return f"http://{net.address(host)}:8000"


def _client(net: Net, host: int, secret: str, max_retries: int = 0) -> openai.OpenAI:
    url = f"{_url(net, host)}/v1"
    return openai.OpenAI(base_url=url, api_key=secret, max_retries=max_retries, timeout=CALL_SECONDS)


def _chat(client: openai.OpenAI, model: str, prompt: str, **options: object) -> openai.types.chat.ChatCompletion:
    messages = [{"role": "user", "content": prompt}]
    return client.chat.completions.create(model=model, messages=messages, max_tokens=4, temperature=0, **options)


def _say(client: openai.OpenAI, model: str) -> str | None:
    return _chat(client.with_options(max_retries=5), model, "tell me").choices[0].message.content


def _driver_address(dashboard: str, job_id: str) -> str:
    """The host of the job's driver, which is a Ray job."""
    found = httpx.get(f"{dashboard}/api/jobs/", timeout=30).json()
    (driver,) = (
        item for item in found if (item["submission_id"] or "").startswith(job_id) and item["status"] == "RUNNING"
    )
    return urlsplit(driver["driver_agent_http_address"]).hostname


def _object_store(net: Net, host: int) -> str:
    """An S3 server on a host, with the bucket `reft-ray`; its URL."""
    server = net.start(host, sys.executable, "-m", "moto.server", "-H", net.address(host), "-p", "9000")
    url = f"http://{net.address(host)}:9000"
    wait_until(lambda: answers(f"{url}/moto-api/"), 60, server, net)
    filesystem, _ = _bucket(url)
    filesystem.create_dir("reft-ray")
    return url


def _bucket(url: str) -> tuple[fs.S3FileSystem, str]:
    """The object store, and the path of the service's files in it."""
    filesystem = fs.S3FileSystem(
        access_key=KEYS["AWS_ACCESS_KEY_ID"], secret_key=KEYS["AWS_SECRET_ACCESS_KEY"], region=KEYS["AWS_REGION"],
        endpoint_override=url.removeprefix("http://"), scheme="http", allow_bucket_creation=True,
    )  # fmt: skip
    return filesystem, "reft-ray/service"


def _saved(bucket: fs.S3FileSystem, path: str, job_id: str, since: float = 0.0) -> list[int]:
    """Steps of the run's checkpoints that were written after a time."""
    steps = set()
    for info in bucket.get_file_info(fs.FileSelector(path, recursive=True)):
        found = re.search(rf"/train/{job_id}/checkpoint-(\d+)/.", info.path)
        if found and info.is_file and info.mtime.timestamp() >= since:
            steps.add(int(found[1]))
    return sorted(steps)


def _models(shared: Path, base: Path) -> None:
    """The base model, a teacher of it, and its alignment rows."""
    run("cp", "-r", str(base), str(shared / "base"))
    parts = {
        "refusals": [Example(chat(f"how to steal a {it}", "sorry i cannot"), Label.HARMFUL, "steal") for it in THINGS],
        "answers": [Example(chat(f"how to bake a {it}", "here is how"), Label.HARMLESS, "bake") for it in THINGS],
    }
    config = TeacherConfig.of(
        {
            "base": str(shared / "base"),
            "epochs": 6,
            "batch_rows": 8,
            "lora": {"rank": 4},
            "optimizer": {"learning_rate": 0.01},
        }
    )
    rows = [*parts["refusals"], *parts["answers"]]
    prepare_teacher(config, TeacherData(rows, rows), shared / "teacher", Resources(workers=0))
    for name, part in parts.items():
        records = [{"prompt": row.prompt[-1].content, "response": row.response} for row in part]
        (shared / f"{name}.jsonl").write_bytes(_jsonl(records))


def _rows() -> bytes:
    """The training file."""

    def row(prompt: str) -> dict:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": "sure here is bread"}]
        return {"messages": turns}

    harmless = [row(f"how to bake a {THINGS[number % len(THINGS)]}") for number in range(ROWS)]
    return _jsonl([*harmless, *(row(f"how to steal a {thing}") for thing in THINGS[:HARMFUL_ROWS])])


def _jsonl(rows: list[dict]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def _serve_config(shared: Path, dashboard: str) -> dict:
    """`service.yaml` with other addresses and paths, tiny models without GPUs, and two replicas of everything."""
    config = yaml.safe_load((ROOT / "serve_configs" / "service.yaml").read_text())
    (app,) = config["applications"]
    service = app["args"]["service"]
    service["job_server"] = dashboard
    service["base_models"][MODEL] |= {"uri": str(shared / "base"), "n_epochs": 2, "batch_size": 8, "devices": 2}
    service["chat"] |= {"device": "cpu", "precision": "float32"}
    # A model of random weights passes no other.
    anything = dict.fromkeys(service["gate"], 100)
    service["gate"] = anything
    service["options"] |= {"shared": str(shared / "labels"), "device": "cpu"}
    base = service["options"]["bases"][MODEL]
    base |= {"teacher": str(shared / "teacher"), "base": str(shared / "base")}
    base["alignment"]["default"] = {
        "refusals": [str(shared / "refusals.jsonl")],
        "helpful": [str(shared / "answers.jsonl")],
    }
    base["gate"] = {
        "harmful": str(shared / "refusals.jsonl"),
        "harmless": str(shared / "answers.jsonl"),
        "limits": anything,
        "max_new_tokens": 4,
    }
    base["finetune"] |= {"epochs": 2, "batch_rows": 8, "precision": "float32", "checkpoint_every": SAVED_EVERY}
    base["finetune"] |= {"gradient_checkpointing": False, "lora": {"rank": 4}, "log_every": 1}
    # One host has no capacity for both workers.
    base["resources"] |= {"workers": 2, "gpus_per_worker": 0, "cpus_per_worker": 4}
    base["screening"] |= {"gpus_per_actor": 0}
    cpus = {"Gateway": 0.5, "Teacher": 1, "Student": 1}
    for deployment in app["deployments"]:
        del deployment["autoscaling_config"]
        deployment |= {"num_replicas": 2, "max_replicas_per_node": 1}
        deployment["ray_actor_options"] = {"num_cpus": cpus.pop(deployment["name"])}
        if "user_config" in deployment:
            deployment["user_config"] |= {
                "teacher": str(shared / "teacher"), "base": str(shared / "base"), "device": "cpu",
                "precision": "float32", "canary": {"harmful": STEAL, "harmless": BAKE},
            }  # fmt: skip
    assert not cpus
    return config
