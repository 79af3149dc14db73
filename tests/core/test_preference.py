"""DPO as a weighted cross entropy, against its equation."""

import itertools
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F

from reft_ray.core.batch import TokenizedExample, collate
from reft_ray.core.forward import Predictions
from reft_ray.core.preference import Dpo, preference_step

VOCABULARY = 11


class Bigram:
    """A model of one table, with the forward passes that the step needs."""

    def __init__(self) -> None:
        self.table_VV = torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(1)).requires_grad_()
        self.start_VV = self.table_VV.detach() + 0.3 * torch.randn(
            VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(2)
        )
        self.used = self.table_VV

    def predictions(self, batch) -> Predictions:
        return Predictions.of(self.used[batch.ids_BT.flatten()[batch.where_N]])

    @contextmanager
    def at_start(self):
        self.used = self.start_VV
        yield
        self.used = self.table_VV


PAIRS = [([1, 2, 3, 4], [1, 2, 5]), ([2, 6, 7], [2, 8, 9, 10, 1]), ([3, 3, 3], [3, 4, 5])]


def sequences() -> list[TokenizedExample]:
    return [
        TokenizedExample(ids, [False] + [True] * (len(ids) - 1), 0, index=2 * number + side)
        for number, pair in enumerate(PAIRS)
        for side, ids in enumerate(pair)
    ]


def log_p(table_VV: torch.Tensor, ids: list[int]) -> torch.Tensor:
    return sum(F.log_softmax(table_VV[before], -1)[after] for before, after in itertools.pairwise(ids))


def expected(model: Bigram, dpo: Dpo) -> tuple[float, torch.Tensor, float]:
    terms, right, likelihood, tokens = [], 0, 0.0, 0
    for chosen, rejected in PAIRS:
        gains = [log_p(model.table_VV, ids) - log_p(model.start_VV, ids) for ids in (chosen, rejected)]
        terms.append(-F.logsigmoid(dpo.beta * (gains[0] - gains[1])))
        right += int(gains[0] > gains[1])
        likelihood += log_p(model.table_VV, chosen)
        tokens += len(chosen) - 1
    loss = sum(terms) / len(PAIRS) - dpo.sft_weight * likelihood / tokens
    (gradient,) = torch.autograd.grad(loss, model.table_VV)
    return float(loss.detach()), gradient, right / len(PAIRS)


@pytest.mark.parametrize("sft_weight", [0.0, 0.4])
@pytest.mark.parametrize("split", [1, 2, 6])
def test_the_step_has_the_loss_and_gradient_of_dpo_in_any_micro_batches(sft_weight: float, split: int) -> None:
    model, dpo = Bigram(), Dpo(0.5, sft_weight, most_pairs=4)
    rows = sequences()
    loss, gradient, right = expected(model, dpo)
    # The answers of a pair end up in different batches.
    batches = [collate(rows[first::split], 0) for first in range(split)]
    terms = preference_step(model, model.at_start, batches, dpo=dpo)
    assert float(terms.task) == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(model.table_VV.grad, gradient, atol=1e-6)
    assert float(terms.user_correct) / terms.user_tokens == pytest.approx(right)


def test_two_ranks_give_the_gradient_of_one() -> None:
    dpo = Dpo(0.5, 0.4, most_pairs=4)
    rows = sequences()
    _, gradient, _ = expected(Bigram(), dpo)
    sums: dict[int, list[torch.Tensor]] = {}

    def run(rank: int, others: list[list[torch.Tensor]]) -> tuple[Bigram, list[torch.Tensor], float]:
        model, sent = Bigram(), []

        def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
            sent.append(tensor.clone())
            return tensor + sum(other[len(sent) - 1] for other in others)

        terms = preference_step(model, model.at_start, [collate(rows[rank::2], 0)], dpo=dpo, all_reduce=all_reduce)
        return model, sent, float(terms.task)

    # What each rank sends does not depend on what it receives.
    for rank in (0, 1):
        sums[rank] = run(rank, [])[1]
    ranks = [run(rank, [sums[1 - rank]]) for rank in (0, 1)]
    assert torch.allclose(ranks[0][0].table_VV.grad + ranks[1][0].table_VV.grad, gradient, atol=1e-6)
    assert ranks[0][2] + ranks[1][2] == pytest.approx(expected(Bigram(), dpo)[0], rel=1e-5)
