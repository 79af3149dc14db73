"""Files of adapters and models: tensors, directories that a run may replace, and adapters from other storage.

Of an adapter from other storage only the two files of a plain LoRA and their signature are fetched, so that nothing
else in the directory can be loaded. Its configuration is untrusted input: what would change the shared base is refused.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePath
from typing import Any

import pyarrow as pa
from pyarrow import fs
from safetensors.torch import load_file, save_file
from torch import Tensor

from reft_ray.core.errors import ReftError
from reft_ray.hf.lora import ADAPTER_WEIGHTS
from reft_ray.hf.signatures import SIGNATURE, sign_if_asked, verify_if_asked

ADAPTER_CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
_COPY_BYTES = 8 << 20

MAX_RANK = 1024
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,200}")


def _is_name(value: object) -> bool:
    return isinstance(value, str) and _NAME.fullmatch(value) is not None


def _are_names(value: object) -> bool:
    return value == "all-linear" or (isinstance(value, list) and all(map(_is_name, value)))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and 1 <= value <= MAX_RANK


def _is_pattern(value: object) -> bool:
    return isinstance(value, dict) and all(_is_name(key) and _is_number(item) for key, item in value.items())


# What a plain LoRA sets. peft compiles names as regular expressions, so they must be names. Any other key changes
# weights that other adapters share, or does not work in a batch of several adapters; new ones of later releases, too.
_PLAIN: dict[str, Callable[[object], bool]] = {
    "r": _is_rank,
    "lora_alpha": _is_number,
    "lora_dropout": _is_number,
    "bias": lambda value: value == "none",
    # A string names an initialisation that rewrites base weights (pissa, olora, ...).
    "init_lora_weights": lambda value: isinstance(value, bool),
    "target_modules": _are_names,
    "exclude_modules": _are_names,
    "layers_to_transform": lambda value: _is_rank(value) or isinstance(value, list),
    "layers_pattern": lambda value: _is_name(value) or _are_names(value),
    "rank_pattern": lambda value: _is_pattern(value) and all(map(_is_rank, value.values())),  # type: ignore[attr-defined]
    "alpha_pattern": _is_pattern,
}
_WITHOUT_EFFECT = frozenset(
    {
        "peft_type", "peft_version", "task_type", "base_model_name_or_path", "revision", "inference_mode",
        "fan_in_fan_out", "use_rslora", "megatron_core", "qalora_group_size",
    }
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class OutputKind:
    """A kind of output directory: glob patterns of the files that identify it, and of others that a run may write."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def in_folder(self, folder: str) -> tuple[str, ...]:
        """All patterns, for an output inside another one."""
        return tuple(f"{folder}/{pattern}" for pattern in (*self.required, *self.optional))


# They differ from one kind of tokenizer to the next.
_TOKENIZER = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "vocab.*",
    "merges.txt",
    "*.model",
)
ADAPTER = OutputKind("adapter", (ADAPTER_CONFIG, ADAPTER_WEIGHTS), ("README.md", SIGNATURE, *_TOKENIZER))
MODEL = OutputKind(
    "model",
    ("config.json", "*.safetensors"),
    ("generation_config.json", "model.safetensors.index.json", SIGNATURE, *_TOKENIZER),
)


def check_replaceable(folder: Path, kind: OutputKind) -> None:
    """Raise ReftError unless `folder` is absent, empty, or holds an older output of this kind and nothing else."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ReftError(f"{folder} is not a directory: choose another name")
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir()]
    if files and not all(any(_matches(file, pattern) for file in files) for pattern in kind.required):
        raise ReftError(f"{folder} exists and holds no {kind.name}: choose another directory")
    for file in files:
        if not any(_matches(file, pattern) for pattern in (*kind.required, *kind.optional)):
            raise ReftError(f"{folder} holds {file} besides its {kind.name}: move it, or choose another directory")


def _matches(file: PurePath, pattern: str) -> bool:
    wanted = PurePath(pattern)
    return file.parent == wanted.parent and fnmatchcase(file.name, wanted.name)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name as safetensors; tensors that share memory are copied."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file onto the CPU."""
    return load_file(path)


def fetch_adapter(uri: str, folder: Path, max_bytes: int) -> Path:
    """Copy an adapter from a directory or `pyarrow.fs` URI into `folder` and return `folder`.

    Raises ReftError if it is missing, larger than `max_bytes`, not a plain LoRA in safetensors, or not signed where
    signatures are asked for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        source, root = fs.FileSystem.from_uri(uri)
        for name, limit in (
            (ADAPTER_CONFIG, MAX_CONFIG_BYTES),
            (ADAPTER_WEIGHTS, max_bytes),
            (SIGNATURE, MAX_CONFIG_BYTES),
        ):
            info = source.get_file_info(f"{root}/{name}")
            if name == SIGNATURE and info.type == fs.FileType.NotFound:
                continue
            if info.type != fs.FileType.File:
                raise ReftError(f"no adapter at {uri}: {name} is missing")
            if info.size > limit:
                raise ReftError(f"the adapter at {uri} is too large: {name} has {info.size:,} bytes, {limit:,} allowed")
            with source.open_input_stream(info.path) as stream, (folder / name).open("wb") as target:
                while chunk := stream.read(_COPY_BYTES):
                    target.write(chunk)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise ReftError(f"the adapter at {uri} cannot be read: {type(error).__name__}") from None
    verify_if_asked(folder)
    check_adapter_config(_read_config(folder / ADAPTER_CONFIG, uri), uri)
    return folder


def sign_product(folder: Path) -> None:
    """Sign a finished student, if that is asked for."""
    sign_if_asked(folder, signed_files(folder))


def signed_files(folder: Path) -> tuple[str, ...]:
    """The files of a directory that its signature covers; none for all of them."""
    return (ADAPTER_CONFIG, ADAPTER_WEIGHTS) if (folder / ADAPTER_CONFIG).is_file() else ()


def check_adapter_config(config: dict[str, Any], where: str) -> None:
    """Raise ReftError unless the configuration describes a LoRA that leaves the base unchanged."""
    if config.get("peft_type") != "LORA":
        raise ReftError(f"the adapter at {where} is not a LoRA but {str(config.get('peft_type'))[:40]}")
    used = [
        name
        for name, value in config.items()
        if value and name not in _WITHOUT_EFFECT and not (name in _PLAIN and _PLAIN[name](value))
    ]
    if used:
        raise ReftError(f"the adapter at {where} uses {', '.join(used)[:200]}, which a shared base does not allow")


def _read_config(path: Path, where: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ReftError(f"the adapter at {where} has no readable {ADAPTER_CONFIG}")
    return config
