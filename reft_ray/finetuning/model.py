"""The model of a run: base, trainable adapter or full weights, starting weights, precision, sharding."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from reft_ray.core.errors import ReftError
from reft_ray.core.forward import Forward
from reft_ray.finetuning.config import Training
from reft_ray.finetuning.runtime import Runtime
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.forward import ModelForward, decoder_layers
from reft_ray.hf.loading import Base, load_base
from reft_ray.hf.lora import (
    LoraSettings,
    adapter_scale,
    adapter_state,
    attach,
    load_adapter_state,
    read_adapter,
    saved_scale,
)
from reft_ray.hf.machine import tokens_that_fit
from reft_ray.hf.ref_teacher import RefTeacher

STUDENT = "student"
"""The name of a student's adapter."""


@dataclass(frozen=True, slots=True)
class TrainableModel:
    """What a loop trains: `model` is the base wrapped by PEFT, or the base itself with full weights."""

    base: Base
    model: nn.Module
    chat: ChatFormat
    max_tokens: int
    micro_batch_tokens: int

    @property
    def forward(self) -> Forward:
        """Its forward pass."""
        return ModelForward(self.model)


def load_trainable(config: Training, runtime: Runtime, adapter: str) -> TrainableModel:
    """Load the base in the run's precision and attach the trainable part."""
    base = load_base(config.base, _dtype(config, runtime.device), runtime.device)
    model: nn.Module = base.model
    if config.gradient_checkpointing:
        base.model.activation_checkpointing_enable({"use_reentrant": False})
        base.model.enable_input_require_grads()
    if config.weights == "lora":
        settings = LoraSettings(config.lora.rank, config.lora.scale, config.lora.dropout)
        model = attach(base.model, adapter, settings, config.seed)
    elif config.weights == "full":
        model.requires_grad_(True)
    model.train()
    limit = config.longest_row(base.context)
    tokens = config.micro_batch_tokens or tokens_that_fit(base.model, runtime.device, runtime.world_size)
    return TrainableModel(base, model, ChatFormat(base.tokenizer), limit, tokens)


def _dtype(config: Training, device: torch.device) -> torch.dtype:
    """Frozen base weights may be bfloat16 (PEFT keeps adapters in float32); trained ones stay float32."""
    wanted = config.precision
    if wanted == "auto":
        wanted = "bfloat16" if device.type == "cuda" else "float32"
    return torch.bfloat16 if wanted == "bfloat16" and config.weights == "lora" else torch.float32


def apply_fsdp(model: nn.Module) -> nn.Module:
    """FSDP, a unit per decoder layer; gradients are summed, because the loss already holds the global counts."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    for layer in decoder_layers(model):
        fully_shard(layer)
    fully_shard(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
    return model


def start_from(trainable_model: TrainableModel, adapter: Path) -> None:
    """Start from an adapter's weights. Raises ReftError if its shape or its scale differs."""
    state = read_adapter(adapter)
    mine = adapter_state(trainable_model.model, STUDENT)  # type: ignore[arg-type]
    odd = [name for name in mine.keys() | state.keys() if name not in mine or name not in state]
    odd += [name for name in mine if name in state and mine[name].shape != state[name].shape]
    if odd:
        raise ReftError(f"{adapter} does not fit this adapter's rank and layers: {min(odd)} differs")
    scale = saved_scale(adapter)
    if scale != adapter_scale(trainable_model.model, STUDENT):  # type: ignore[arg-type]
        raise ReftError(f"{adapter} has the scale {scale:g}: set lora.scale={scale:g} to start from it")
    load_adapter_state(trainable_model.model, STUDENT, state)  # type: ignore[arg-type]


def start_from_teacher(trainable_model: TrainableModel, teacher: RefTeacher | None) -> None:
    """Start from the teacher's weights: the safety-aligned start that the method advises against."""
    if teacher is None:
        raise ReftError("init=aligned needs a Ref-Teacher to start from")
    teacher.check(trainable_model.base, trainable_model.chat)
    start_from(trainable_model, teacher.folder / "adapter")
