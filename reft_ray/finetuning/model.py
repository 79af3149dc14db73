"""The model of a run: base, trainable adapter or full weights, precision, sharding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from reft_ray.core.forward import Forward
from reft_ray.finetuning.config import Training
from reft_ray.finetuning.runtime import Runtime
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.forward import ModelForward, decoder_layers
from reft_ray.hf.loading import Base, load_base
from reft_ray.hf.lora import LoraSettings, attach


@dataclass(frozen=True, slots=True)
class TrainableModel:
    """What a loop trains: `model` is the base wrapped by PEFT, or the base itself with full weights."""

    base: Base
    model: nn.Module
    chat: ChatFormat
    max_tokens: int

    @property
    def forward(self) -> Forward:
        """The model at work."""
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
    else:
        model.requires_grad_(True)
    model.train()
    limit = config.longest_row(base.context)
    return TrainableModel(base, model, ChatFormat(base.tokenizer), limit)


def _dtype(config: Training, device: torch.device) -> torch.dtype:
    """Frozen base weights may be bfloat16 (PEFT keeps adapters in float32); trained ones stay float32."""
    wanted = config.precision
    if wanted == "auto":
        wanted = "bfloat16" if device.type == "cuda" else "float32"
    return torch.bfloat16 if wanted == "bfloat16" and config.weights == "lora" else torch.float32


def shard(model: nn.Module) -> nn.Module:
    """FSDP, a unit per decoder layer; gradients are summed, because the loss already holds the global counts."""
    from torch.distributed.fsdp import FSDPModule, fully_shard

    for layer in decoder_layers(model):
        fully_shard(layer)
    fully_shard(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
    return model
