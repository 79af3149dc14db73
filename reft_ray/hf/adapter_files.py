"""Adapters that come from elsewhere: which files are taken, and what their configuration may say.

Only the two files of a plain LoRA adapter are fetched, so that nothing else in the directory can be loaded. The
configuration is data of a customer's job: whatever would change the shared base is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from reft_ray.core.errors import ReftError
from reft_ray.hf.lora import ADAPTER_WEIGHTS

ADAPTER_CONFIG = "adapter_config.json"
MOST_CONFIG_BYTES = 1 << 20
_COPY_BYTES = 8 << 20

# Each of these touches weights that other adapters share, or cannot act in a batch of several adapters.
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


def fetch_adapter(uri: str, folder: Path, most_bytes: int) -> Path:
    """Copy an adapter from a directory or `pyarrow.fs` URI into `folder`; gives `folder`.

    Raises ReftError when it is not there, larger than `most_bytes`, or no plain LoRA in safetensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        source, root = fs.FileSystem.from_uri(uri)
        for name, most in ((ADAPTER_CONFIG, MOST_CONFIG_BYTES), (ADAPTER_WEIGHTS, most_bytes)):
            info = source.get_file_info(f"{root}/{name}")
            if info.type != fs.FileType.File:
                raise ReftError(f"no adapter at {uri}: {name} is missing")
            if info.size > most:
                raise ReftError(f"the adapter at {uri} is too large: {name} has {info.size:,} bytes, {most:,} allowed")
            with source.open_input_stream(info.path) as stream, (folder / name).open("wb") as target:
                while chunk := stream.read(_COPY_BYTES):
                    target.write(chunk)
    except (OSError, pa.ArrowException, ValueError) as error:
        raise ReftError(f"the adapter at {uri} cannot be read: {type(error).__name__}") from None
    check_adapter_config(_read(folder / ADAPTER_CONFIG, uri), uri)
    return folder


def check_adapter_config(config: dict[str, Any], where: str) -> None:
    """Raises ReftError unless the configuration is that of a LoRA that leaves the base as it is."""
    if config.get("peft_type") != "LORA":
        raise ReftError(f"the adapter at {where} is no LoRA but {str(config.get('peft_type'))[:40]}")
    used = [name for name in _FORBIDDEN if config.get(name)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    # A string names an initialisation that rewrites base weights (pissa, olora, ...).
    if not isinstance(config.get("init_lora_weights", True), bool):
        used.append("init_lora_weights")
    if used:
        raise ReftError(f"the adapter at {where} uses {', '.join(used)}, which a shared base does not allow")


def _read(path: Path, where: str) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ReftError(f"the adapter at {where} has no readable {ADAPTER_CONFIG}")
    return config
