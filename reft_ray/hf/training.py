"""How a loaded model is made ready to train: the numbers it computes in, packing, and compiled layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from reft_ray.hf.forward import bare_model, decoder_layers, head_of
from reft_ray.hf.packing import enable_packing


@dataclass(frozen=True, slots=True)
class Speed:
    """How a model's training passes run: `packed` rows without padding, `compiled` decoder layers."""

    packed: bool = True
    compiled: bool = False


def compute_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Run a model's passes under autocast to `dtype`: weights that are trained stay float32, their products do not.

    PEFT would widen the input of every adapter to its float32 weights, and keep the wide copy for the backward pass.
    Under autocast it need not.
    """
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module.cast_input_dtype_enabled = False  # type: ignore[assignment]
    bare, head = bare_model(model), head_of(model)
    for module in (bare, head):
        # Losses call the head outside the model's pass.
        module.forward = torch.autocast(bare.device.type, dtype)(module.forward)


def mixed(model: nn.Module) -> torch.dtype | None:
    """The narrower type of a model whose trained weights are float32 and the others are not; None if all are alike."""
    types = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    narrow = types - {torch.float32}
    return narrow.pop() if len(types) == 2 and len(narrow) == 1 else None


def make_ready(model: nn.Module, dtype: torch.dtype | None = None, speed: Speed = Speed()) -> bool:
    """Prepare a model for training passes in `dtype`, by default as `mixed` finds.

    Returns whether it reads packed rows; a model that cannot is trained on padded ones.
    """
    if narrow := dtype or mixed(model):
        compute_in(model, narrow)
    packed = speed.packed and enable_packing(bare_model(model))
    if speed.compiled:
        for layer in decoder_layers(model):
            layer.compile()
    return packed
