"""The model of a run: base, trainable adapter or full weights, starting weights, precision, sharding."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from reft_ray.core.errors import ReftError
from reft_ray.core.forward import Forward
from reft_ray.finetuning.config import FinetuneConfig, Training
from reft_ray.finetuning.runtime import Runtime
from reft_ray.finetuning.sharding import shard
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.forward import ModelForward, bare_model, recompute_above
from reft_ray.hf.loading import Base, load_base
from reft_ray.hf.lora import (
    LoraSettings,
    adapter_scale,
    attach,
    differing,
    load_adapter_state,
    read_adapter,
    saved_scale,
)
from reft_ray.hf.machine import tokens_kept, tokens_that_fit
from reft_ray.hf.ref_teacher import RefTeacher
from reft_ray.hf.training import Speed, make_ready

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
    packed: bool = False

    @property
    def forward(self) -> Forward:
        """Its forward pass."""
        return ModelForward(self.model)


def load_trainable(config: Training, runtime: Runtime, adapter: str, sharded: bool = False) -> TrainableModel:
    """Load the base in the run's precision and attach the trainable part.

    For a `sharded` run rank 0 loads it into the memory of its host and the others its shapes alone; `shard` then moves
    it to the devices.
    """
    if sharded and config.quantize != "none":
        raise ReftError("strategy=fsdp shards whole weights: leave quantize=none")
    if sharded and not dist.is_initialized():
        raise ReftError("strategy=fsdp shards over workers, and workers=0 starts none: set workers")
    device = runtime.device if not sharded else torch.device("meta" if runtime.rank else "cpu")
    base = load_base(config.base, _dtype(config, runtime.device), device, four_bit=config.quantize == "4bit")
    model: nn.Module = base.model
    if config.weights == "lora":
        model = attach(base.model, adapter, LoraSettings(**config.lora.model_dump()), config.seed)
    elif config.weights == "full":
        model.requires_grad_(True)
    model.train()
    chat = ChatFormat(base.tokenizer, isinstance(config, FinetuneConfig) and config.enable_thinking)
    limit = config.longest_row(base.context)
    trainable_model = TrainableModel(base, model, chat, limit, config.micro_batch_tokens or 0)
    return trainable_model if sharded else _made_ready(trainable_model, config, runtime)


def shard_trainable(trainable_model: TrainableModel, config: Training, runtime: Runtime) -> TrainableModel:
    """Spread a model that `load_trainable` loaded for it over the devices of all ranks."""
    shard(trainable_model.model, runtime.rank, runtime.device, compute_dtype(config, runtime.device))
    return _made_ready(trainable_model, config, runtime)


def _made_ready(trainable_model: TrainableModel, config: Training, runtime: Runtime) -> TrainableModel:
    """Precision, packing, and what fits into memory."""
    model, device = trainable_model.model, runtime.device
    where = (bare_model(model), device, runtime.world_size)
    tokens = trainable_model.micro_batch_tokens or tokens_that_fit(*where)
    if config.gradient_checkpointing is not False:
        kept = tokens_kept(*where) if device.type == "cuda" else tokens
        recompute_above(model, 0 if config.gradient_checkpointing else kept)
    packed = config.packing is not False
    dtype = compute_dtype(config, device)
    # A base that is narrow itself needs no cast, and its features stay those of the scorer.
    cast = dtype if config.weights == "full" and dtype is not torch.float32 else None
    reads_packed = make_ready(model, cast, Speed(packed, config.compile, config.kernels == "liger"))
    return replace(trainable_model, micro_batch_tokens=tokens, packed=reads_packed)


def compute_dtype(config: Training, device: torch.device) -> torch.dtype:
    """What products are computed in; trained weights stay float32."""
    wanted = config.precision
    if wanted == "auto":
        wanted = "bfloat16" if device.type == "cuda" else "float32"
    return torch.bfloat16 if wanted == "bfloat16" else torch.float32


def _dtype(config: Training, device: torch.device) -> torch.dtype:
    """Frozen base weights may be bfloat16 (PEFT keeps adapters in float32); trained ones stay float32."""
    return torch.float32 if config.weights == "full" else compute_dtype(config, device)


def start_from(trainable_model: TrainableModel, adapter: Path, name: str = STUDENT) -> None:
    """Start the adapter `name` from saved weights. Raises ReftError if their shape or scale differs."""
    if next(trainable_model.model.parameters()).is_meta:
        # `shard` sends it rank 0's.
        return
    state = read_adapter(adapter)
    if odd := differing(trainable_model.model, name, state):  # type: ignore[arg-type]
        raise ReftError(f"{adapter} does not fit this adapter's rank and layers: {odd} differs")
    scale = saved_scale(adapter)
    if scale != adapter_scale(trainable_model.model, name):  # type: ignore[arg-type]
        raise ReftError(f"{adapter} has the scale {scale:g}: set lora.scale={scale:g} to start from it")
    load_adapter_state(trainable_model.model, name, state)  # type: ignore[arg-type]


def start_from_teacher(trainable_model: TrainableModel, teacher: RefTeacher | None) -> None:
    """Start from the teacher's weights: the safety-aligned start that the method advises against."""
    if teacher is None:
        raise ReftError("init=aligned needs a Ref-Teacher to start from")
    teacher.check(trainable_model.base, trainable_model.chat)
    start_from(trainable_model, teacher.folder / "adapter")
