"""A finished student as files that plain `peft` and `transformers` load."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from reft_ray.core.errors import ReftError
from reft_ray.finetuning.model import TrainableModel
from reft_ray.hf.lora import is_adapted, save_adapter
from reft_ray.hf.product import OutputKind, check_replaceable

EXPORT = "export"
"""Where in a run's last checkpoint its product lies."""

ADAPTER = "adapter"
"""Where in an earlier checkpoint the adapter lies as it was then, for whoever wants to try it."""


def export_student(trainable_model: TrainableModel, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write gathered trainable weights as a PEFT directory, or as a whole model with its tokenizer."""
    if is_adapted(trainable_model.model):
        save_adapter(trainable_model.model, "student", folder, trainable_model.base.name, dict(weights))
        return
    trainable_model.base.model.save_pretrained(folder, state_dict=dict(weights))
    trainable_model.base.tokenizer.save_pretrained(folder)


def collect_export(checkpoint: Path, out: Path, product: OutputKind) -> Path:
    """Copy a last checkpoint's product to `out` under a temporary name, then rename it.

    Raises ReftError when the checkpoint has none, or `out` holds anything but an older product of this kind.
    """
    source = checkpoint / EXPORT
    if not source.is_dir():
        raise ReftError(f"{checkpoint} is not the last checkpoint of a finished run")
    check_replaceable(out, product)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".export-") as scratch:
        made = Path(scratch) / out.name
        shutil.copytree(source, made)
        if out.exists():
            shutil.rmtree(out)
        made.rename(out)
    return out
