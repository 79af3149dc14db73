"""How a loaded model is made ready to train: the numbers it computes in, packing, and compiled layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from reft_ray.core.errors import UsageError
from reft_ray.core.optimization import BETAS, adamw, decay_groups
from reft_ray.hf.forward import bare_model, decoder_layers, head_of
from reft_ray.hf.packing import FLOAT32_ATTENTION, enable_packing


@dataclass(frozen=True, slots=True)
class Speed:
    """How a model's training passes run: `packed` rows without padding, `compiled` decoder layers, `liger` kernels."""

    packed: bool = True
    compiled: bool = False
    liger: bool = False


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
    if bare.device.type == "cpu" and bare.config._attn_implementation == "sdpa":
        bare.set_attn_implementation(FLOAT32_ATTENTION)


def _fuse(model: PreTrainedModel) -> None:
    """Replace norms and activations by Liger's fused kernels. Raises UsageError where they cannot run."""
    if model.device.type != "cuda":
        raise UsageError("kernels=liger needs a CUDA GPU, and there is none: leave kernels=torch")
    if find_spec("liger_kernel") is None:
        raise UsageError("kernels=liger needs liger-kernel: pip install 'reft-ray[gpu]'")
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    # The loss stays ours: it keeps the alignment term next to the user's, and computes logits in parts already.
    _apply_liger_kernel_to_instance(model=model, cross_entropy=False, fused_linear_cross_entropy=False)


def optimizer_of(
    parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float, states: str = "float32"
) -> torch.optim.Optimizer:
    """AdamW (`core.optimization`), or bitsandbytes' with moments of 8 bits. Raises UsageError where that cannot run."""
    if states != "8bit":
        return adamw(parameters, learning_rate, weight_decay)
    groups = decay_groups(parameters, weight_decay)
    if not all(p.is_cuda and not isinstance(p, DTensor) for group in groups for p in group["params"]):
        raise UsageError("optimizer.states=8bit needs a CUDA GPU and strategy=data_parallel: leave it at float32")
    if find_spec("bitsandbytes") is None:
        raise UsageError("optimizer.states=8bit needs bitsandbytes: pip install 'reft-ray[gpu]'")
    from bitsandbytes.optim import AdamW8bit

    made: torch.optim.Optimizer = AdamW8bit(groups, lr=learning_rate, betas=BETAS)
    return made


def mixed(model: nn.Module) -> torch.dtype | None:
    """The narrower type of a model whose trained weights are float32 and the others are not; None if all are alike."""
    types = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    narrow = types - {torch.float32}
    return narrow.pop() if len(types) == 2 and len(narrow) == 1 else None


def make_ready(model: nn.Module, dtype: torch.dtype | None = None, speed: Speed = Speed()) -> bool:
    """Prepare a model for training passes in `dtype`, by default as `mixed` finds.

    Returns whether it reads packed rows; a model that cannot is trained on padded ones.
    """
    bare = bare_model(model)
    if speed.liger:
        _fuse(bare)
    # Under sharding its mixed precision does what autocast does elsewhere.
    sharded = isinstance(next(model.parameters()), DTensor)
    if not sharded and (narrow := dtype or mixed(model)):
        compute_in(model, narrow)
    packed = speed.packed and enable_packing(bare, model)
    if speed.compiled:
        for layer in decoder_layers(model):
            layer.compile()
    return packed
