"""Tiny models of three shapes, made on the spot: random weights, real code paths."""

from __future__ import annotations

import gc
import json
import os
import socket
import subprocess
import sys
import threading
import venv
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

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
