"""Gradient conflict on a model whose gradients are known."""

import pytest
import torch
from torch import nn

from reft_ray.core.batch import Batch, TokenizedExample, collate
from reft_ray.core.conflict import gradient_conflict
from reft_ray.core.forward import Predictions
from reft_ray.core.guided import Distillation


class Unigram:
    """One distribution over four tokens for every position: the gradient is known in closed form."""

    def __init__(self) -> None:
        self.logits_V = nn.Parameter(torch.zeros(4))

    def logits(self, batch: Batch) -> torch.Tensor:
        return self.logits_V.expand(batch.labelled, -1)

    def predictions(self, batch: Batch) -> Predictions:
        return Predictions.of(self.logits(batch))


def batch(token: int) -> list[Batch]:
    return [collate([TokenizedExample([0, token], [False, True], 0)], 0)]


def test_the_same_target_agrees_and_another_opposes() -> None:
    model = Unigram()
    same = gradient_conflict(model, [model.logits_V], batch(1), batch(1), Distillation())
    assert same.cosine == pytest.approx(1.0)
    other = gradient_conflict(model, [model.logits_V], batch(1), batch(2), Distillation())
    # d CE / d logits = p - onehot with p = 1/4: (1/4, -3/4, 1/4, 1/4) against (1/4, 1/4, -3/4, 1/4).
    assert other.cosine == pytest.approx(-1 / 3)
    assert other.task_norm == pytest.approx(0.75**0.5)
    assert model.logits_V.grad is None


def test_a_missing_gradient_is_an_error() -> None:
    model = Unigram()
    with pytest.raises(ValueError, match="two gradients"):
        gradient_conflict(model, [model.logits_V], batch(1), [], Distillation())
