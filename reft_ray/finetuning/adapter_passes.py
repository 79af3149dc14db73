"""Passes of a client's rows through adapters on one base: rows of one adapter, or of several in the same batch.

Of a batch, the base's products are computed once for all rows, the low-rank ones and the LM head by adapter. Rows do
not see each other, and an adapter's gradient is the sum over its own rows: it is that of a pass with these rows alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reft_ray.core.batch import collate_targets, token_batches
from reft_ray.core.forward import Predictions
from reft_ray.core.loss_inputs import LossName
from reft_ray.core.token_losses import TokenLoss, per_token, token_loss
from reft_ray.hf.adapter_bank import AdapterBank

Array = npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Rows:
    """Sequences of a request: tokens, targets and other inputs of the loss, [T] each; `kept` is 1 or 0 per token."""

    tokens: Sequence[Array]
    targets: Sequence[Array]
    inputs: Mapping[str, Sequence[Array]]
    kept: Sequence[Array]


@dataclass(frozen=True, slots=True)
class Work:
    """The rows of a request, the adapter that they go through, and their loss."""

    adapter: str
    rows: Rows
    loss: LossName
    config: Mapping[str, float]


@dataclass(slots=True)
class Passed:
    """Log-probabilities and losses [T] of each row, the summed loss, and the mass of its gradient."""

    outputs: list[dict[str, Array]]
    total: float = 0.0
    mass: float = 0.0


def run_passes(bank: AdapterBank, works: Sequence[Work], batch_tokens: int, backward: bool) -> list[Passed]:
    """The loss of each work, adapters being different; with `backward` gradients are added to those of the adapters."""
    passed = [Passed([{} for _ in work.rows.tokens]) for work in works]
    places = [(at, row) for at, work in enumerate(works) for row in range(len(work.rows.tokens))]
    lengths = [len(works[at].rows.tokens[row]) for at, row in places]
    with bank.training(*(work.adapter for work in works)), torch.set_grad_enabled(backward):
        for indices in token_batches(lengths, batch_tokens):
            # Rows of an adapter follow one another, so that its labelled positions are one slice.
            batched = sorted((places[index] for index in indices), key=lambda place: place[0])
            rows = [(works[at].rows.tokens[row], works[at].rows.targets[row]) for at, row in batched]
            batch = collate_targets(rows, bank.chat.pad_id, bank.device)
            predictions = bank.predictions(batch, [works[at].adapter for at, _ in batched])
            found: list[TokenLoss] = []
            start = 0
            for at, group in groupby(batched, key=lambda place: place[0]):
                numbers = [row for _, row in group]
                sizes = [len(works[at].rows.tokens[row]) for row in numbers]
                where = slice(start, start + sum(sizes))
                start = where.stop
                part = bank.part(predictions, where, works[at].adapter)
                found.append(_loss(works[at], numbers, part, batch.labels_N[where], bank.device))
                _record(passed[at], found[-1], numbers, sizes)
            learned = [each.total for each in found if each.total.requires_grad]
            if backward and learned:
                torch.autograd.backward(learned)
    return passed


def _loss(work: Work, numbers: Sequence[int], part: Predictions, labels_N: Tensor, device: torch.device) -> TokenLoss:
    inputs = {name: _joined(values, numbers, device) for name, values in work.rows.inputs.items()}
    loss = per_token(work.loss, inputs, work.config)
    return token_loss(part, labels_N, loss, _joined(work.rows.kept, numbers, device))


def _record(passed: Passed, found: TokenLoss, numbers: Sequence[int], sizes: Sequence[int]) -> None:
    passed.total += float(found.total.detach())
    passed.mass += float(found.mass)
    for key, values in (("logprobs", found.logprob_N), ("elementwise_loss", found.loss_N)):
        for row, part in zip(numbers, values.cpu().split(list(sizes)), strict=True):
            passed.outputs[row][key] = part.numpy()


def _joined(values: Sequence[Array], numbers: Sequence[int], device: torch.device) -> Tensor:
    joined = np.concatenate([values[row] for row in numbers]).astype(np.float32)
    return torch.from_numpy(joined).to(device)
