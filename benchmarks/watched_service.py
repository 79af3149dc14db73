"""A demo of the built-in service with a few users and a Prometheus, for pictures of the dashboards.

Needs `prometheus` (Debian: `apt-get install prometheus`). All processes listen on loopback and stop with the context.
"""

from __future__ import annotations

import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import openai
import yaml

from reft_ray.core.conversation import Example
from reft_ray.telemetry import rendering
from reft_ray.telemetry.promql import RELABELING
from reft_ray.testbed.synthetic import SyntheticRows, write_chat_rows
from reft_ray.testbed.tasks import Task

START_TIMEOUT_SECONDS = 600.0


@contextmanager
def watched_service() -> Iterator[tuple[str, str]]:
    """Addresses of the service and of the Prometheus that scrapes it every second."""
    if shutil.which("prometheus") is None:
        raise SystemExit("error: prometheus is not installed (Debian: apt-get install prometheus)")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        home = Path(name)
        port, ray_port, own_port = _free_port(), _free_port(), _free_port()
        command = [str(Path(sys.executable).with_name("reft-ray")), "serve", "--state", str(home / "state")]
        command += ["--port", str(port), "--metrics-port", str(ray_port)]
        rendering.write(home)
        targets = {"reft-ray": ray_port, "reft-gateway": port}
        config = {
            "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "2s"},
            "rule_files": [str(home / rendering.RULE_FILE)],
            "scrape_configs": [
                {
                    "job_name": job,
                    "static_configs": [{"targets": [f"127.0.0.1:{target}"]}],
                    "metric_relabel_configs": [RELABELING],
                }
                for job, target in targets.items()
            ],
        }
        (home / "prometheus.yml").write_text(yaml.safe_dump(config))
        prometheus = ["prometheus", f"--config.file={home / 'prometheus.yml'}", f"--storage.tsdb.path={home / 'data'}"]
        prometheus += [f"--web.listen-address=127.0.0.1:{own_port}", "--log.level=error"]
        with _running(command, signal.SIGINT) as service, _running(prometheus, signal.SIGTERM) as watcher:
            _wait_for(f"http://127.0.0.1:{port}/readyz", service)
            _wait_for(f"http://127.0.0.1:{own_port}/-/ready", watcher)
            yield f"http://127.0.0.1:{port}", f"http://127.0.0.1:{own_port}"


@contextmanager
def _running(command: list[str], end: signal.Signals) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.send_signal(end)
            process.wait(120)


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + START_TIMEOUT_SECONDS
    while time.monotonic() < until and process.poll() is None:
        with suppress(httpx.TransportError):
            if httpx.get(url, timeout=5).status_code == 200:
                return
        time.sleep(0.5)
    raise SystemExit(f"error: {url} does not answer")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def use(url: str) -> None:
    """Moderate and screen rows in the background while users finetune on rows with few and with many harmful ones."""
    synthetic, stop = SyntheticRows.make(0), threading.Event()
    with openai.OpenAI(base_url=f"{url}/v1", api_key="any") as client:
        background = [
            threading.Thread(target=_repeat, args=(stop, 0.2, lambda rng: _moderate(client, synthetic, rng))),
            threading.Thread(target=_repeat, args=(stop, 2.0, lambda rng: _screen(url, synthetic, rng))),
        ]
        for thread in background:
            thread.start()
        try:
            for ratio in (0.1, 0.9, 0.2):
                rows = synthetic.user_rows(300, ratio, Task.SENTIMENT, round(100 * ratio))
                _finetune(client, rows, synthetic.task_test(Task.SENTIMENT)[:50])
        finally:
            stop.set()
            for thread in background:
                thread.join()


def _repeat(stop: threading.Event, pause: float, act: Callable[[random.Random], None]) -> None:
    rng = random.Random(0)
    while not stop.wait(pause):
        with suppress(openai.APIError, httpx.HTTPError):
            act(rng)


def _moderate(client: openai.OpenAI, synthetic: SyntheticRows, rng: random.Random) -> None:
    rows = rng.choices(synthetic.over_refusal_prompts, k=6) + rng.choices(synthetic.hs_prompts, k=2)
    client.moderations.create(input=[row.prompt[-1].content for row in rows])


def _screen(url: str, synthetic: SyntheticRows, rng: random.Random) -> None:
    rows = synthetic.user_rows(60, rng.choice((0.0, 0.1, 0.3)), Task.SENTIMENT, rng.randrange(1000))
    httpx.post(f"{url}/v1/screenings", content=_jsonl(rows), timeout=60).raise_for_status()


def _finetune(client: openai.OpenAI, rows: list[Example], held_out: list[Example]) -> None:
    training, validation = (
        client.files.create(file=("rows.jsonl", _jsonl(part)), purpose="fine-tune").id for part in (rows, held_out)
    )
    job = client.fine_tuning.jobs.create(model="builtin", training_file=training, validation_file=validation)
    while job.status not in ("succeeded", "failed", "cancelled"):
        time.sleep(1)
        job = client.fine_tuning.jobs.retrieve(job.id)
    print(f"job of {len(rows)} rows: {job.status}", flush=True)
    if job.fine_tuned_model:
        messages = [{"role": "user", "content": "How do I bake bread?"}]
        client.chat.completions.create(model=job.fine_tuned_model, messages=messages)  # type: ignore[arg-type]


def _jsonl(rows: list[Example]) -> bytes:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "rows.jsonl"
        write_chat_rows(path, rows)
        return path.read_bytes()
