"""The built-in tiny base: trained from scratch once, then cached."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy

from reft_ray.atomic import atomic_directory
from reft_ray.core.batch import IGNORE_INDEX
from reft_ray.hf.compute import keep_freed_memory
from reft_ray.hf.tiny import TinyShape, encode_chat, tiny_llama, train_tokenizer
from reft_ray.testbed.pretraining import pretraining_rows

Progress = Callable[[int, int], None]
_BATCHES_PER_BUCKET = 32


@dataclass(frozen=True, slots=True)
class Recipe:
    """Everything besides the grammar that determines the model; the default takes about a minute on 2 cores."""

    rows: int = 18_000
    batch_rows: int = 32
    learning_rate: float = 3e-3
    warmup_steps: int = 30
    weight_decay: float = 0.05
    vocab_size: int = 2048
    shape: TinyShape = field(default_factory=TinyShape)


def ensure_base(cache_dir: Path, seed: int = 0, progress: Progress | None = None, recipe: Recipe | None = None) -> Path:
    """The directory of the base model and its tokenizer (`save_pretrained` layout), trained if not cached.

    The directory's name hashes recipe, seed and pretraining text, so that a changed grammar gives a new base.
    `progress(done, total)` is called after every optimizer step. Concurrent callers may train twice, but never see a
    partial model.
    """
    recipe = recipe or Recipe()
    rows = [
        [{"role": turn.role, "content": turn.content} for turn in conversation]
        for conversation in pretraining_rows(recipe.rows, seed)
    ]
    identity = json.dumps([asdict(recipe), seed, rows], sort_keys=True)
    target = Path(cache_dir) / f"base-{hashlib.sha256(identity.encode()).hexdigest()[:16]}"
    if target.is_dir():
        return target
    try:
        with atomic_directory(target) as scratch:
            _train(rows, recipe, seed, progress, scratch)
    except OSError:
        if not target.is_dir():
            raise
    return target


def _train(
    rows: list[list[dict[str, str]]], recipe: Recipe, seed: int, progress: Progress | None, target: Path
) -> None:
    keep_freed_memory()
    tokenizer = train_tokenizer(
        (turn["content"] for row in rows for turn in row), recipe.vocab_size, recipe.shape.max_positions
    )
    ids = [encode_chat(tokenizer, row) for row in rows]
    batches = list(_batches(ids, recipe.batch_rows, random.Random(seed)))  # noqa: S311
    model = tiny_llama(tokenizer, recipe.shape, seed).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * _schedule(step, len(batches), recipe.warmup_steps)
        _loss(model, batch, tokenizer.pad_token_id).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if progress is not None:
            progress(step + 1, len(batches))
    model.eval().save_pretrained(target)
    tokenizer.save_pretrained(target)


def _loss(model: torch.nn.Module, rows: list[list[int]], pad: int) -> torch.Tensor:
    """Mean next-token cross entropy over all tokens of the rows; causal attention needs no mask for right padding."""
    length = max(map(len, rows))
    tokens_BT = torch.tensor([row + [pad] * (length - len(row)) for row in rows])
    labels_BT = torch.tensor([row[1:] + [IGNORE_INDEX] * (length - len(row) + 1) for row in rows])
    logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits
    return cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=IGNORE_INDEX)


def _batches(ids: list[list[int]], size: int, rng: random.Random) -> Iterator[list[list[int]]]:
    """Each row once, in batches of similar length to reduce padding."""
    order = rng.sample(ids, len(ids))
    for start in range(0, len(order), size * _BATCHES_PER_BUCKET):
        bucket = sorted(order[start : start + size * _BATCHES_PER_BUCKET], key=len)
        batches = [bucket[at : at + size] for at in range(0, len(bucket), size)]
        yield from rng.sample(batches, len(batches))


def _schedule(step: int, total: int, warmup: int) -> float:
    """Linear warm-up, then cosine decay to a tenth of the learning rate."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
