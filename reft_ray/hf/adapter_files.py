"""Files of adapters and models: tensors, directories that a run may replace, and adapters from other storage.

Of an adapter from other storage only the two files of a plain LoRA are fetched, so that nothing else in the directory
can be loaded. Its configuration is untrusted input: whatever would change the shared base is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
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

ADAPTER_CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES = 1 << 20
_COPY_BYTES = 8 << 20

# Each of these changes weights that other adapters share, or does not work in a batch of several adapters.
_FORBIDDEN = (
    "modules_to_save",
    "layer_replication",
    "use_dora",
    "use_rslora_fa",
    "target_parameters",
    "trainable_token_indices",
    "megatron_config",
    "alora_invocation_tokens",
    "auto_mapping",
)


@dataclass(frozen=True, slots=True)
class OutputKind:
    """A kind of output directory: glob patterns of the files that identify it, and of others that a run may write."""

    name: str
    required: tuple[str, ...]
    optional: tuple[str, ...] = ()

    def in_folder(self, folder: str) -> tuple[str, ...]:
        """All patterns, for an output inside another one."""
        return tuple(f"{folder}/{pattern}" for pattern in (*self.required, *self.optional))


ADAPTER = OutputKind("adapter", (ADAPTER_CONFIG, ADAPTER_WEIGHTS))
MODEL = OutputKind(
    "model",
    ("config.json", "*.safetensors"),
    (
        "generation_config.json",
        "model.safetensors.index.json",
        # Tokenizer files, which differ from one kind of tokenizer to the next.
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.*",
        "vocab.*",
        "merges.txt",
        "*.model",
    ),
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

    Raises ReftError if it is missing, larger than `max_bytes`, or not a plain LoRA in safetensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        source, root = fs.FileSystem.from_uri(uri)
        for name, limit in ((ADAPTER_CONFIG, MAX_CONFIG_BYTES), (ADAPTER_WEIGHTS, max_bytes)):
            info = source.get_file_info(f"{root}/{name}")
            if info.type != fs.FileType.File:
                raise ReftError(f"no adapter at {uri}: {name} is missing")
            if info.size > limit:
                raise ReftError(f"the adapter at {uri} is too large: {name} has {info.size:,} bytes, {limit:,} allowed")
            with source.open_input_stream(info.path) as stream, (folder / name).open("wb") as target:
                while chunk := stream.read(_COPY_BYTES):
                    target.write(chunk)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise ReftError(f"the adapter at {uri} cannot be read: {type(error).__name__}") from None
    check_adapter_config(_read_config(folder / ADAPTER_CONFIG, uri), uri)
    return folder


def check_adapter_config(config: dict[str, Any], where: str) -> None:
    """Raise ReftError unless the configuration describes a LoRA that leaves the base unchanged."""
    if config.get("peft_type") != "LORA":
        raise ReftError(f"the adapter at {where} is not a LoRA but {str(config.get('peft_type'))[:40]}")
    used = [name for name in _FORBIDDEN if config.get(name)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    # A string names an initialisation that rewrites base weights (pissa, olora, ...).
    if not isinstance(config.get("init_lora_weights", True), bool):
        used.append("init_lora_weights")
    if used:
        raise ReftError(f"the adapter at {where} uses {', '.join(used)}, which a shared base does not allow")


def _read_config(path: Path, where: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ReftError(f"the adapter at {where} has no readable {ADAPTER_CONFIG}")
    return config
