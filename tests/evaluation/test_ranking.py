"""AUROC intervals: values by scikit-learn, coverage by simulation, pairs resampled together."""

import pytest
import torch
from sklearn.metrics import roc_auc_score

from reft_ray.evaluation.ranking import AurocBootstrap


def drawn(seed: int, rows: int = 120, shift: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    label_B = (torch.arange(rows) % 3 == 0).long()
    return torch.randn(rows, generator=generator, dtype=torch.float64) + shift * label_B, label_B


@pytest.mark.parametrize("ties", [False, True])
def test_the_value_equals_scikit_learn(ties: bool) -> None:
    score_B, label_B = drawn(0)
    score_B = score_B.round() if ties else score_B
    found = AurocBootstrap([score_B], label_B, resamples=50).interval(0)
    assert found.value == pytest.approx(roc_auc_score(label_B, score_B))
    assert found.low < found.value < found.high


def test_the_interval_has_its_nominal_coverage() -> None:
    truth = 0.7602  # P(N(1, 1) > N(0, 1)) = Phi(1 / sqrt 2)
    inside = 0
    for seed in range(100):
        found = AurocBootstrap([drawn(seed)[0]], drawn(seed)[1], seed, resamples=300).interval(0)
        inside += found.low <= truth <= found.high
    assert 88 <= inside <= 99


def test_a_difference_is_measured_on_the_same_resamples() -> None:
    score_B, label_B = drawn(1)
    noisy_B = score_B + drawn(2, shift=0.0)[0]
    both = AurocBootstrap([score_B, score_B * 3 + 1, noisy_B], label_B)
    same = both.difference(0, 1)
    assert (same.value, same.low, same.high) == (0, 0, 0)
    better = both.difference(0, 2)
    assert better.value > 0
    assert better.high - better.low < (both.interval(0).high - both.interval(0).low) + (
        both.interval(2).high - both.interval(2).low
    )


def test_a_perfect_ranking_still_has_an_interval() -> None:
    label_B = torch.tensor([0] * 50 + [1] * 10)
    perfect = AurocBootstrap([label_B.double()], label_B).interval(0)
    assert (perfect.value, perfect.high) == (1.0, 1.0)
    assert 0.6 < perfect.low < 0.75
    with pytest.raises(ValueError, match="both classes"):
        AurocBootstrap([label_B.double()], torch.zeros(60))


def test_the_seed_determines_the_interval() -> None:
    score_B, label_B = drawn(3)
    first, again = (AurocBootstrap([score_B], label_B, 7).interval(0) for _ in range(2))
    assert first == again
