"""What a job will cost before it is launched: tokens, steps, time and device hours, from measured speed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from reft_ray.jobs.job import Hyperparameters

BYTES_PER_TOKEN = 4.0


@dataclass(frozen=True, slots=True)
class Speed:
    """What was measured on the devices that jobs of one base model run on.

    `training_tokens` and `screening_rows` are per second over all devices of one job; `start_seconds` is what a job
    takes whatever its size: starting, loading models, the gate's own prompts; `overhead` is the share of training time
    that comes on top. A file too small for the preset's least steps takes those, `step_seconds` each. See `jobs.speeds`
    for how they are measured.
    """

    training_tokens: float
    screening_rows: float
    start_seconds: float = 30.0
    devices: int = 1
    overhead: float = 0.1
    step_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Defaults:
    """What `auto` means in the operator's preset."""

    n_epochs: int = 3
    batch_size: int = 8
    min_steps: int = 0


@dataclass(frozen=True, slots=True)
class Size:
    """A training file: its rows, the tokens in them, and whether the tokens were counted or guessed from bytes."""

    rows: int
    tokens: int
    exact: bool


class Counter(Protocol):
    """Measures a training file for a base model; the real one uses the model's tokenizer."""

    def __call__(self, model: str, chunks: Iterable[bytes]) -> Size:
        """The size of a JSONL file."""
        ...


@dataclass(frozen=True, slots=True)
class Estimate:
    """The prediction. Times are seconds and None without a measured speed."""

    rows: int
    tokens_per_epoch: int
    trained_tokens: int
    steps: int
    exact_tokens: bool
    seconds: float | None
    device_hours: float | None


def count_bytes(model: str, chunks: Iterable[bytes]) -> Size:
    """A Counter without a tokenizer: lines, and four bytes of message text per token."""
    rows = size = 0
    for line in _lines(chunks):
        if line.strip():
            rows += 1
            size += _text_bytes(line)
    return Size(rows, math.ceil(size / BYTES_PER_TOKEN), exact=False)


def estimate(size: Size, hyperparameters: Hyperparameters, defaults: Defaults, speed: Speed | None) -> Estimate:
    """The cost of training on a file of this size; queueing is not in it."""
    epochs = defaults.n_epochs if hyperparameters.n_epochs == "auto" else hyperparameters.n_epochs
    batch = defaults.batch_size if hyperparameters.batch_size == "auto" else hyperparameters.batch_size
    tokens = size.tokens * epochs
    filled = math.ceil(size.rows / batch) * epochs
    steps = max(filled, defaults.min_steps)
    seconds = hours = None
    if speed is not None:
        training = tokens / speed.training_tokens
        if steps > filled:
            training = max(training, steps * speed.step_seconds)
        seconds = speed.start_seconds + size.rows / speed.screening_rows + training * (1 + speed.overhead)
        hours = seconds * speed.devices / 3600
    return Estimate(
        rows=size.rows,
        tokens_per_epoch=size.tokens,
        trained_tokens=tokens,
        steps=steps,
        exact_tokens=size.exact,
        seconds=seconds,
        device_hours=hours,
    )


def _lines(chunks: Iterable[bytes]) -> Iterable[bytes]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    yield rest


def _text_bytes(line: bytes) -> int:
    try:
        row = json.loads(line)
        return sum(len(str(turn.get("content") or "").encode()) for turn in row["messages"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return len(line)
