"""Estimates of a job before it starts: tokens, steps, time and device hours, from measured speed."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from pydantic import Field, ValidationError

from reft_ray.jobs.content import ContentStore, split_lines
from reft_ray.jobs.job import Hyperparameters
from reft_ray.rows.reader import RowReader
from reft_ray.settings import Settings

BYTES_PER_TOKEN = 4.0
_READER = RowReader(judging=True)


class Speed(Settings):
    """Measured speed of the devices of a base model's jobs; see `jobs.speeds`."""

    training_tokens: float = Field(gt=0, description="Tokens per second over all devices of a job.")
    screening_rows: float = Field(gt=0, description="Rows per second over all devices of a job.")
    start_seconds: float = Field(30.0, ge=0, description="Fixed time of a job: start, loading models, gate prompts.")
    devices: int = Field(1, ge=1)
    overhead: float = Field(0.1, ge=0, description="Share of the training time that is added to it.")
    step_seconds: float = Field(0.0, ge=0, description="For files so small that the preset's `min_steps` applies.")


class Price(Settings):
    """What an operator charges: for each job, device hour and million of trained tokens."""

    currency: str = Field(min_length=3, max_length=3, pattern="^[A-Z]{3}$", description="By ISO 4217, such as EUR.")
    job: float = Field(0.0, ge=0)
    device_hour: float = Field(0.0, ge=0)
    million_tokens: float = Field(0.0, ge=0)

    def cost_of(self, estimate: Estimate) -> Cost | None:
        """The price of a job; None where it depends on device hours that are not known."""
        if self.device_hour and estimate.device_hours is None:
            return None
        hours, tokens = estimate.device_hours or 0.0, estimate.trained_tokens / 1e6
        return Cost(round(self.job + self.device_hour * hours + self.million_tokens * tokens, 4), self.currency)


@dataclass(frozen=True, slots=True)
class Cost:
    """An amount of money."""

    amount: float
    currency: str


class Defaults(Settings):
    """The values of `auto` in estimates: those of the operator's preset."""

    n_epochs: int = Field(3, ge=1)
    batch_size: int = Field(16, ge=1)
    min_steps: int = Field(0, ge=0)


@dataclass(frozen=True, slots=True)
class Size:
    """Size of a training file; `exact` tokens are counted, others estimated from bytes."""

    rows: int
    tokens: int
    exact: bool


class Counter(Protocol):
    """Measures a training file for a base model; the pipeline's uses the model's tokenizer."""

    def __call__(self, model: str, chunks: Iterable[bytes]) -> Size:
        """Measure a JSONL file."""
        ...


@dataclass(frozen=True, slots=True)
class Estimate:
    """The estimate. Times are in seconds, and None without a measured speed."""

    rows: int
    tokens_per_epoch: int
    trained_tokens: int
    steps: int
    exact_tokens: bool
    seconds: float | None
    device_hours: float | None


def count_bytes(model: str, chunks: Iterable[bytes]) -> Size:
    """A Counter without a tokenizer: rows, and four bytes of message text per token."""
    rows = size = 0
    for line in split_lines(chunks):
        if line.strip():
            rows += 1
            size += _text_bytes(line)
    return Size(rows, math.ceil(size / BYTES_PER_TOKEN), exact=False)


def estimate(size: Size, hyperparameters: Hyperparameters, defaults: Defaults, speed: Speed | None) -> Estimate:
    """Estimate the training on a file of this size, without the time in the queue."""
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


def _text_bytes(line: bytes) -> int:
    row = _READER.read_line(line)
    return len(line) if isinstance(row, list) else sum(len(turn.content.encode()) for turn in row.conversation)


class FirstSpeeds:
    """Speeds that were measured without a job, in the content store, where all gateways and drivers find them.

    One JSON file per base model, below `speeds/`; no project has that name.
    """

    def __init__(self, content: ContentStore) -> None:
        self._content = content

    def of(self, model: str) -> Speed | None:
        """The speed of a model; None where none is kept, or it cannot be read."""
        try:
            return Speed.model_validate(json.loads(b"".join(self._content.read(_speed_key(model)))))
        except (OSError, ValueError, ValidationError):
            return None

    def put(self, model: str, speed: Speed) -> None:
        """Keep a speed, instead of an earlier one."""
        self._content.write(_speed_key(model), [json.dumps(speed.model_dump()).encode()])


def _speed_key(model: str) -> str:
    # A model's name may have any characters.
    return f"speeds/{hashlib.sha256(model.encode()).hexdigest()[:32]}.json"
