"""Merging, describing and publishing adapters."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from typer.testing import CliRunner

from reft_ray.cli.main import app
from reft_ray.core.errors import ReftError
from reft_ray.hf.adapter_tools import adapter_card, files_to_publish, merge_adapter, push_to_hub
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.loading import load_base
from reft_ray.hf.lora import LoraSettings, attach, attach_saved, save_adapter
from reft_ray.hf.vllm_responder import uses_vllm


@pytest.fixture
def adapter(llama: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    base = load_base(str(llama))
    model = attach(base.model, "student", LoraSettings(rank=2), seed=3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    save_adapter(model, "student", folder, str(llama))
    ChatFormat(base.tokenizer).save_tokenizer(folder)
    return folder


def test_a_merged_model_answers_as_base_and_adapter(llama: Path, adapter: Path, tmp_path: Path) -> None:
    assert merge_adapter(adapter, tmp_path / "merged", dtype="float32") == str(llama)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        merged = load_base(str(tmp_path / "merged"))
        adapted = attach_saved(load_base(str(llama)).model, "x", adapter)
        assert torch.allclose(merged.model(ids).logits, adapted(ids).logits, atol=1e-4)
    assert merged.tokenizer.chat_template == (adapter / "chat_template.jinja").read_text()
    merge_adapter(adapter, tmp_path / "merged", str(llama))  # an older model is replaced
    with pytest.raises(ReftError, match="--dtype int8: one of float32, bfloat16, float16"):
        merge_adapter(adapter, tmp_path / "other", dtype="int8")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes.txt").write_text("x")
    with pytest.raises(ReftError, match="holds no model: choose another directory"):
        merge_adapter(adapter, tmp_path / "full")


def test_a_card_has_facts_and_measures(llama: Path, adapter: Path, tmp_path: Path) -> None:
    report = tmp_path / "eval.json"
    measured = {"measures": {"harmful_score": {"value": 1.5, "interval": [0.5, 3.0], "n": 200}}}
    report.write_text(json.dumps(measured))
    found = CliRunner().invoke(app, ["adapter", "card", str(adapter), "--measures", str(report), "--licence", "mit"])
    assert found.exit_code == 0, found.output
    card = (adapter / "README.md").read_text()
    assert card == adapter_card(adapter, measured, "mit")
    assert f'base_model: "{llama}"' in card
    assert "| LoRA | rank 2, scale 2 |" in card
    assert "| harmful_score | 1.5 | 0.5 to 3.0 | 200 |" in card
    assert "Measured" not in adapter_card(adapter)


def test_only_the_files_of_an_adapter_are_published(adapter: Path, tmp_path: Path) -> None:
    (adapter / "secret.txt").write_text("x")
    (adapter / "chat_template.link").symlink_to(adapter / "secret.txt")
    found = CliRunner().invoke(app, ["adapter", "push", str(adapter), f"file://{tmp_path}/published"])
    assert found.exit_code == 0, found.output
    published = {path.name for path in (tmp_path / "published").iterdir()}
    assert published == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert published == set(files_to_publish(adapter))
    with pytest.raises(ReftError, match=r"no adapter in .*: adapter_config.json is missing"):
        files_to_publish(tmp_path)


class Hub(BaseHTTPRequestHandler):
    """As much of the hub's API as an upload of small files uses."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.requests.append((self.path, self.headers.get("authorization"), body))
        if self.server.refuses:
            self._answer(403, {"error": "no such right"})
        elif self.path == "/api/repos/create":
            self._answer(200, {"url": f"{self.server.url}/team/mine", "name": "team/mine"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self._answer(
                200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        else:
            self._answer(200, {"success": True, "commitUrl": f"{self.server.url}/team/mine/commit/1", "commitOid": "1"})

    def do_GET(self) -> None:
        self._answer(200, {"id": "team/mine", "sha": "1", "siblings": []})

    def _answer(self, status: int, document: dict) -> None:
        body = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests, server.refuses, server.url = [], False, f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_push_makes_a_private_repository_and_one_commit(adapter: Path, hub: ThreadingHTTPServer) -> None:
    (adapter / "secret.txt").write_text("x")
    assert push_to_hub(adapter, "team/mine").endswith("team/mine")
    made = json.loads(hub.requests[0][2])
    assert (made["name"], made["organization"], made["visibility"]) == ("mine", "team", "private")
    commits = [body for path, _, body in hub.requests if "/commit/" in path]
    assert len(commits) == 1
    committed = {json.loads(line)["value"]["path"] for line in commits[0].splitlines() if b'"file"' in line}
    assert committed == set(files_to_publish(adapter))
    hub.refuses = True
    with pytest.raises(ReftError, match=r"^team/mine was not pushed: .+") as caught:
        push_to_hub(adapter, "team/mine")
    assert "\n" not in str(caught.value)


def test_vllm_is_used_only_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reft_ray.hf.vllm_responder.find_spec", lambda _: None)
    assert not uses_vllm("auto", "cuda")
    with pytest.raises(ReftError, match="vLLM is not installed"):
        uses_vllm("vllm", "cuda")
    with pytest.raises(ReftError, match="--engine x: one of auto, transformers, vllm"):
        uses_vllm("x", "cpu")
    monkeypatch.setattr("reft_ray.hf.vllm_responder.find_spec", lambda name: name)
    assert uses_vllm("auto", "cuda:0")
    assert not uses_vllm("auto", "cpu")
    assert not uses_vllm("transformers", "cuda")


@pytest.mark.gpu
def test_vllm_answers_as_transformers_does(llama: Path, adapter: Path) -> None:
    pytest.importorskip("vllm")
    from reft_ray.core.conversation import chat
    from reft_ray.hf.generate import load_responder
    from reft_ray.hf.vllm_responder import VllmResponder

    asked = [chat("how can i bake bread"), chat("please")]
    assert VllmResponder(str(llama), adapter, 8)(asked) == load_responder(str(llama), adapter, 8, "cuda")(asked)
