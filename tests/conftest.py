"""Tiny models of three shapes, made on the spot: random weights, real code paths."""

from __future__ import annotations

import gc
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from reft_ray.telemetry import rules
from reft_ray.telemetry.alerts import ALERTS
from reft_ray.telemetry.dashboards import BOARDS

# A machine's cores belong to the tests that measure nothing: one thread keeps tiny models fast and sums reproducible.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests that need rows which the repository does not carry."""
    if SHARED.is_dir():
        return
    skip = pytest.mark.skip(reason=f"real rows are not here: {SHARED} is absent")
    for item in items:
        if "shared_data" in getattr(item, "fixturenames", ()):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    """Take what the imports made out of the garbage collector's rounds: hundreds of tests would walk through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real public rows and the small pretrained base that lie beside the checkout."""
    return SHARED


@contextmanager
def _serving(app: Any) -> Iterator[str]:
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", ws="none"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def serving() -> Callable[[Any], AbstractContextManager[str]]:
    """Serve an application on a real port; the context's value is its address."""
    return _serving


@pytest.fixture(scope="session")
def check_client(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Run `client_contract.py` against an address with a key, by the installed openai client or another version."""

    @cache
    def python_with(version: str | None) -> str:
        if version is None:
            return sys.executable
        home = tmp_path_factory.mktemp(f"openai-{version}")
        venv.create(home, with_pip=True)
        python = str(home / "bin" / "python")
        install = [python, "-m", "pip", "install", "--quiet", f"openai=={version}"]
        installed = subprocess.run(install, capture_output=True, text=True)
        if installed.returncode != 0:
            pytest.skip(f"openai {version} cannot be installed here: {installed.stderr.strip().splitlines()[-1:]}")
        return python

    def check(url: str, key: str, version: str | None = None, limit: float = 240, **world: Any) -> str:
        contract = Path(__file__).parent / "api/service/client_contract.py"
        command = [python_with(version), str(contract), url, key, json.dumps(world)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=limit)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return check


@pytest.fixture(scope="session")
def tiny_bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Llama-, Gemma- and Qwen-shaped bases of random weights with one tokenizer; the last has no chat template."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, Qwen2Config

    from reft_ray.hf.tiny import train_tokenizer

    torch.set_num_threads(1)
    words = [
        "how",
        "can",
        "i",
        "bake",
        "bread",
        "please",
        "tell",
        "me",
        "to",
        "steal",
        "a",
        "car",
        "sure",
        "here",
        "is",
        "no",
        "sorry",
        "cannot",
        "help",
        "with",
        "that",
    ]
    tokenizer = train_tokenizer([" ".join(words)] * 4 + words, vocab_size=340)
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
    }
    configs = {
        "llama": LlamaConfig(**common),
        "gemma": Gemma2Config(**common, head_dim=8, sliding_window=16),
        "qwen": Qwen2Config(**common),
    }
    folders = {}
    for name, config in configs.items():
        folder = tmp_path_factory.mktemp(f"base-{name}")
        with torch.random.fork_rng():
            torch.manual_seed(7)
            model = AutoModelForCausalLM.from_config(config, attn_implementation="eager" if name == "gemma" else "sdpa")
        model.save_pretrained(folder)
        if name == "qwen":
            tokenizer.chat_template = None
        tokenizer.save_pretrained(folder)
        folders[name] = folder
    return folders


@pytest.fixture(scope="session")
def llama(tiny_bases: dict[str, Path]) -> Path:
    """The Llama-shaped base."""
    return tiny_bases["llama"]


@dataclass
class Prometheus:
    """The HTTP API of a running Prometheus."""

    url: str
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=30))

    def get(self, path: str, **params: str) -> Any:
        """The `data` of an API answer; fails the test with Prometheus' own words."""
        answer = self.client.get(f"{self.url}/api/v1/{path}", params=params)
        document = answer.json()
        assert document["status"] == "success", f"{params}: {document}"
        return document["data"]

    def query(self, expr: str) -> list[tuple[dict[str, str], float]]:
        """An instant query: labels and value of each series."""
        return [(series["metric"], float(series["value"][1])) for series in self.get("query", query=expr)["result"]]

    def lately(self, expr: str, seconds: float = 600) -> list[tuple[dict[str, str], float]]:
        """A range query: labels and value of each series at each of its times."""
        end = time.time()
        found = self.get("query_range", query=expr, start=str(end - seconds), end=str(end), step="2")["result"]
        return [(series["metric"], float(value)) for series in found for _, value in series["values"]]

    def silent_panels(self, ask: Callable[[str], Any]) -> list[str]:
        """The dashboards' queries to which `ask` finds no finite value; those that need an accelerator are left out."""
        found = []
        for board in BOARDS:
            for panel in board.panels:
                for line in panel.lines:
                    expr = re.sub(r"\$(cluster|application|teacher|project)", ".*", line.expr)
                    expr = expr.replace("$__rate_interval", "5m")
                    assert "$" not in expr
                    if panel.needs != "gpu" and not _finite(ask(expr)):
                        found.append(f"{board.name} / {panel.title}: {expr}")
        return found

    def silent_signals(self, ask: Callable[[str], Any]) -> list[str]:
        """The alerts' signals to which `ask` finds no finite value, and those of absence that have one now."""
        found = []
        for alert in ALERTS:
            self.query(alert.expr)
            for condition in alert.conditions:
                if _finite((self.query if alert.absent else ask)(condition.signal)) is alert.absent:
                    found.append(f"{alert.name}: {condition.signal}")
        return found

    def wait(self, what: str, holds: Callable[[], bool], seconds: float = 90) -> None:
        """Ask until `holds`; what Prometheus has scraped or computed gives no event to await."""
        self.until_none(lambda: [] if holds() else [f"Prometheus has not {what}"], seconds)

    def until_none(self, left: Callable[[], list[str]], seconds: float = 90) -> None:
        """Ask until nothing is `left`."""
        deadline = time.monotonic() + seconds
        while found := left():
            assert time.monotonic() < deadline, f"after {seconds} s: {found}"
            time.sleep(0.5)


def _finite(series: list[tuple[dict[str, str], float]]) -> bool:
    return any(math.isfinite(value) for _, value in series)


@contextmanager
def _watching(home: Path, targets: dict[str, str]) -> Iterator[Prometheus]:
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed (apt: prometheus)")
    rules.write(home)
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "2s"},
        "rule_files": [str(home / rules.FILE)],
        "scrape_configs": [
            {"job_name": job, "static_configs": [{"targets": [target]}]} for job, target in targets.items()
        ],
    }
    (home / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["prometheus", f"--config.file={home / 'prometheus.yml'}", f"--storage.tsdb.path={home / 'data'}"]
    with (home / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=subprocess.STDOUT
        )
    running = Prometheus(f"http://127.0.0.1:{port}")
    try:
        running.wait("started", lambda: _ready(running, process, home / "log"))
        yield running
    finally:
        running.client.close()
        process.terminate()
        process.wait(30)


def _ready(running: Prometheus, process: subprocess.Popen[bytes], log: Path) -> bool:
    assert process.poll() is None, log.read_text()
    try:
        return running.client.get(f"{running.url}/-/ready").status_code == 200
    except httpx.ConnectError:
        return False


@pytest.fixture(scope="session")
def watching(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[dict[str, str]], AbstractContextManager[Prometheus]]:
    """Start a real Prometheus on loopback that scrapes `{job: host:port}` every second and evaluates our rules."""
    return lambda targets: _watching(tmp_path_factory.mktemp("prometheus"), targets)
