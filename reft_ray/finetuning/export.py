"""A finished student as files that plain `peft` and `transformers` load."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from reft_ray.atomic import atomic_directory
from reft_ray.core.errors import ReftError
from reft_ray.finetuning.model import STUDENT, TrainableModel
from reft_ray.hf.adapter_files import OutputKind, check_replaceable, sign_product
from reft_ray.hf.lora import is_adapted, save_adapter

EXPORT = "export"
"""Folder of the product in a run's last checkpoint."""

ADAPTER = "adapter"
"""Folder of the adapter in an earlier checkpoint, as it was then, to try it."""


def export_student(trainable_model: TrainableModel, weights: Mapping[str, Tensor], folder: Path) -> None:
    """Write gathered trainable weights as a PEFT directory or a whole model, with tokenizer and chat template.

    The template is the one that was trained, also where the base has none.
    """
    if is_adapted(trainable_model.model):
        save_adapter(trainable_model.model, STUDENT, folder, trainable_model.base.name, dict(weights))
    else:
        trainable_model.base.model.save_pretrained(folder, state_dict=dict(weights))
    trainable_model.chat.save_tokenizer(folder)


def collect_export(checkpoint: Path, out: Path, product: OutputKind) -> Path:
    """Copy a last checkpoint's product to `out`, whole or not at all.

    Raises ReftError if the checkpoint has none, or if `out` is anything but an older product of this kind.
    """
    source = checkpoint / EXPORT
    if not source.is_dir():
        raise ReftError(f"{checkpoint} is not the last checkpoint of a finished run")
    check_replaceable(out, product)
    with atomic_directory(out, replace=True) as made:
        shutil.copytree(source, made, dirs_exist_ok=True)
        sign_product(made)
    return out
