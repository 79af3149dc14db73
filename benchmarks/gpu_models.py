"""Models with random weights, rows of random tokens, and training steps on them as a run takes them: for `gpu.py`."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from reft_ray.core.batch import Batch, TokenizedExample, micro_batches
from reft_ray.core.guided import Distillation, guided_step
from reft_ray.core.optimization import optimizer_step
from reft_ray.hf.forward import ModelForward, recompute_above
from reft_ray.hf.lora import LoraSettings, attach
from reft_ray.hf.training import Speed, make_ready, optimizer_of

SHAPES = {
    # Hidden, intermediate, layers, heads, key-value heads, vocabulary.
    "8b": (4096, 14_336, 32, 32, 8, 128_256),
    "0.6b": (1024, 3072, 28, 16, 8, 151_936),
    "135m": (576, 1536, 30, 9, 3, 49_152),
    "tiny": (64, 160, 4, 4, 2, 512),
    "check": (512, 1408, 6, 8, 4, 8192),
}


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    models: tuple[str, ...]
    check: str
    micro_batch: int
    step_tokens: int
    steps: int
    matrix: int
    copy_bytes: int
    prompts: int
    guard_prompts: int


def build(shape: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> PreTrainedModel:
    """A Llama with random weights, made on the device."""
    hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=shape in ("0.6b", "135m"),
    )
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    return model.requires_grad_(False).train()  # type: ignore[no-any-return]


def rows(tokens: int, vocabulary: int, seed: int, most: int) -> list[TokenizedExample]:
    """Rows of `tokens` in all: a prompt and an answer each, a few dozen to `most` tokens long."""
    source, found, left = random.Random(seed), [], tokens
    while left > 0:
        length = min(max(8, int(source.lognormvariate(5.3, 0.8))), most, max(left, 8))
        prompt = max(2, int(length * source.uniform(0.2, 0.6)))
        ids = [source.randrange(vocabulary) for _ in range(length)]
        found.append(TokenizedExample(ids, [False] * prompt + [True] * (length - prompt), prompt - 1, index=len(found)))
        left -= length
    return found


@dataclass
class Setting:
    """One way to train."""

    master: bool = True
    packed: bool = True
    recompute: bool = False
    compiled: bool = False
    whole_logits: bool = False


class Trainee:
    """A model with an adapter, and steps on rows as a run takes them."""

    def __init__(self, model: PreTrainedModel, shape: str, sizes: Sizes, setting: Setting) -> None:
        self.shape, self.sizes, self.setting, self.device = shape, sizes, setting, model.device
        self.model: nn.Module = attach(model, "student", LoraSettings(rank=16, scale=2.0), seed=0)
        if not setting.master:
            for parameter in self.model.parameters():
                parameter.data = parameter.data.to(model.dtype)
        if setting.recompute:
            recompute_above(self.model, 0)
        self.packed = make_ready(self.model, speed=Speed(setting.packed, setting.compiled))
        self.model.train()
        self.forward = ModelForward(self.model)
        self.learned = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = optimizer_of(self.learned, 1e-4, 0.0)
        vocabulary = SHAPES[shape][5]
        self.user = rows(sizes.step_tokens, vocabulary, 1, sizes.micro_batch // 4)
        self.aligned = rows(sizes.step_tokens, vocabulary, 2, sizes.micro_batch // 4)

    def batches(self, chosen: Sequence[TokenizedExample]) -> list[Batch]:
        return micro_batches(chosen, self.sizes.micro_batch, 0, self.device, self.packed)

    def step(self, share: float, distillation: Distillation) -> dict[str, float]:
        """One optimiser step on the user's rows and on alignment rows of `share` times as many tokens."""
        wanted, aligned = share * sum(map(len, self.user)), []
        for row in self.aligned:
            if sum(map(len, aligned)) >= wanted:
                break
            aligned.append(row)
        terms = guided_step(self.forward, self.batches(self.user), self.batches(aligned), distillation)
        return optimizer_step(self.optimizer, self.learned, terms.shares, 1, 1.0)

    def flops(self, share: float) -> float:
        """Operations that a step of the user's and alignment tokens needs."""
        hidden, intermediate, layers, heads, kv_heads, vocabulary = SHAPES[self.shape]
        width = hidden // heads * heads
        weights = layers * (2 * hidden * width + 2 * hidden * (width // heads * kv_heads) + 3 * hidden * intermediate)
        total = 0.0
        for row in self.user:
            total += 4 * weights * len(row) + 4 * hidden * vocabulary * row.trained_tokens
            total += 3 * layers * 2 * len(row) ** 2 * width
        return total * (1 + share)


def restore(model: PreTrainedModel) -> None:
    """Take the adapter and every switch off again, so that one set of weights serves all settings."""
    for module in model.modules():
        for name, child in list(module.named_children()):
            if hasattr(child, "base_layer"):
                setattr(module, name, child.base_layer)
        for name in ("forward", "_compiled_call_impl"):
            module.__dict__.pop(name, None)
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.gradient_checkpointing = False
    model._forward_pre_hooks.clear()
    model._forward_pre_hooks_with_kwargs.clear()
    model.__dict__.pop("peft_config", None)
    model.set_attn_implementation("sdpa")
    model.requires_grad_(False)
    torch._dynamo.reset()
