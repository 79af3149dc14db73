"""Whitening against a naive inverse square root, its invariances, and the old geometry bit by bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from reft_ray.core.geometry import ClassMoments, Geometry, Readout, Readouts, separation_hinge, whitening

WIDTH = 6


def rows(seed: int = 0, count: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Features with a large shared direction, unequal variances and a class difference in a quiet coordinate."""
    generator = torch.Generator().manual_seed(seed)
    label_B = torch.randint(0, 2, (count,), generator=generator)
    scale_D = torch.tensor([5.0, 3.0, 1.0, 0.5, 0.2, 0.1])
    feature_BD = torch.randn(count, WIDTH, generator=generator) * scale_D + 10
    feature_BD[:, -1] += 0.3 * label_B
    return feature_BD, label_B


def moments(feature_BD: torch.Tensor, label_B: torch.Tensor) -> ClassMoments:
    return ClassMoments(WIDTH).add(feature_BD, label_B)


def naive_covariance(feature_BD: torch.Tensor, label_B: torch.Tensor) -> torch.Tensor:
    x_BD = feature_BD.double().clone()
    for label in (0, 1):
        x_BD[label_B == label] -= x_BD[label_B == label].mean(0)
    return sum((torch.outer(row, row) for row in x_BD), torch.zeros(WIDTH, WIDTH).double()) / (len(x_BD) - 2)


def test_the_covariance_is_that_within_the_classes() -> None:
    feature_BD, label_B = rows()
    assert torch.allclose(moments(feature_BD, label_B).covariance(), naive_covariance(feature_BD, label_B))


@pytest.mark.parametrize("shrinkage", [0.05, 0.2, 1.0])
def test_whitening_is_the_inverse_square_root_of_the_shrunk_covariance(shrinkage: float) -> None:
    covariance_DD = naive_covariance(*rows())
    shrunk_DD = (1 - shrinkage) * covariance_DD + shrinkage * covariance_DD.trace() / WIDTH * torch.eye(WIDTH).double()
    w_DD = whitening(covariance_DD, shrinkage)
    assert torch.allclose(w_DD @ shrunk_DD @ w_DD, torch.eye(WIDTH).double(), atol=1e-9)
    assert torch.allclose(w_DD, w_DD.T)


def test_a_feature_that_never_varies_does_not_break_whitening() -> None:
    feature_BD, label_B = rows()
    feature_BD[:, 2] = 4.0
    readout = Readout.fit(moments(feature_BD, label_B), Geometry.WHITENED)
    assert readout.score(feature_BD).isfinite().all()


def test_a_whitened_score_is_the_cosine_of_the_definition() -> None:
    feature_BD, label_B = rows()
    found = moments(feature_BD, label_B)
    harmless_D, harmful_D = found.means()
    w_DD = whitening(found.covariance(), 0.2)
    expected_B = F.cosine_similarity(
        (feature_BD.double() - (harmless_D + harmful_D) / 2) @ w_DD, w_DD @ (harmful_D - harmless_D), dim=-1
    )
    assert torch.allclose(Readout.fit(found, Geometry.WHITENED).score(feature_BD).double(), expected_B, atol=1e-5)
    narrow = Readout.fit(found, Geometry.WHITENED, narrow=True)
    assert narrow.tensors()["whitening"].dtype is torch.float16
    assert torch.equal(Readout.from_tensors(narrow.tensors()).score(feature_BD), narrow.score(feature_BD))
    assert torch.allclose(narrow.score(feature_BD).double(), expected_B, atol=1e-3)


def test_plain_is_the_old_score_bit_by_bit() -> None:
    feature_BD, label_B = rows()
    refusal_D = (feature_BD[label_B == 1].double().mean(0) - feature_BD[label_B == 0].double().mean(0)).float()
    score_B = Readout.fit(moments(feature_BD, label_B), Geometry.PLAIN).score(feature_BD)
    assert torch.equal(score_B, F.cosine_similarity(feature_BD.float(), refusal_D, dim=-1))


def test_whitening_finds_what_the_plain_cosine_misses() -> None:
    feature_BD, label_B = rows()
    found = moments(feature_BD, label_B)

    def separation(geometry: Geometry) -> float:
        score_B = Readout.fit(found, geometry).score(feature_BD)
        return float((score_B[label_B == 1].mean() - score_B[label_B == 0].mean()) / score_B.std())

    assert separation(Geometry.WHITENED) > separation(Geometry.CENTRED) > separation(Geometry.PLAIN)


def test_moments_do_not_depend_on_ranks_batches_or_order() -> None:
    feature_BD, label_B = rows()
    whole = moments(feature_BD, label_B)
    order = torch.randperm(len(label_B), generator=torch.Generator().manual_seed(1))
    ranks = [moments(feature_BD[part], label_B[part]) for part in order.chunk(3)]
    total = torch.stack([rank._moments_2EE for rank in ranks]).sum(0)
    for rank in ranks:
        rank.reduce(lambda _own: total)
        assert torch.allclose(rank.covariance(), whole.covariance())
        assert rank.counts == whole.counts


def test_a_part_can_be_left_out() -> None:
    feature_BD, label_B = rows()
    first, second = moments(feature_BD[:80], label_B[:80]), moments(feature_BD[80:], label_B[80:])
    assert torch.allclose(((first + second) - first).covariance(), second.covariance())


def test_unlabelled_rows_are_ignored_and_one_class_alone_is_refused() -> None:
    feature_BD, label_B = rows()
    label_B[:50] = -1
    found = moments(feature_BD, label_B)
    assert sum(found.counts) == len(label_B) - 50
    with pytest.raises(ValueError, match="both classes"):
        moments(feature_BD, torch.zeros_like(label_B)).means()


@pytest.mark.parametrize("geometry", list(Geometry))
def test_a_readout_survives_its_file(geometry: Geometry) -> None:
    feature_BD, label_B = rows()
    readout = Readout.fit(moments(feature_BD, label_B), geometry)
    assert torch.equal(Readout.from_tensors(readout.tensors()).score(feature_BD), readout.score(feature_BD))


def test_the_score_of_several_layers_is_their_mean() -> None:
    (a_BD, label_B), (b_BD, _) = rows(0), rows(1)
    third, fifth = Readout.fit(moments(a_BD, label_B), Geometry.WHITENED), Readout(torch.ones(WIDTH))
    readouts = Readouts.from_tensors(Readouts({3: third, 5: fifth}).tensors())
    assert readouts.layers == (3, 5)
    expected_B = (third.score(a_BD) + fifth.score(b_BD)) / 2
    assert torch.allclose(readouts.score({3: a_BD, 5: b_BD}), expected_B)


def test_the_hinge_leaves_separated_rows_alone_and_is_the_papers_regulariser_at_margin_one() -> None:
    score_B = torch.tensor([0.9, 0.1, -0.9, 0.1, 0.7])
    label_B = torch.tensor([1, 1, 0, 0, -1])
    harmful, harmless = separation_hinge(score_B, label_B, 0.5)
    assert (float(harmful), float(harmless)) == (pytest.approx(0.4), pytest.approx(0.6))
    harmful, harmless = separation_hinge(score_B, label_B, 1.0)
    assert (float(harmful), float(harmless)) == (pytest.approx(0.1 + 0.9), pytest.approx(0.1 + 1.1))


def test_at_margin_one_the_regulariser_is_the_naive_sum_over_labelled_rows() -> None:
    generator = torch.Generator().manual_seed(3)
    feature_BD, refusal_D = torch.randn(6, WIDTH, generator=generator), torch.randn(WIDTH, generator=generator)
    label_B = torch.tensor([1, 0, -1, 1, 0, 0])
    cosine = [float(f @ refusal_D / (f.norm() * refusal_D.norm())) for f in feature_BD]
    harmful, harmless = separation_hinge(Readout(refusal_D).score(feature_BD), label_B, 1.0)
    rows = list(zip(cosine, label_B.tolist(), strict=True))
    assert float(harmful) == pytest.approx(sum(1 - c for c, label in rows if label == 1), rel=1e-5)
    assert float(harmless) == pytest.approx(sum(1 + c for c, label in rows if label == 0), rel=1e-5)


def test_shrinkage_must_leave_an_inverse() -> None:
    with pytest.raises(ValueError, match="shrinkage"):
        whitening(torch.eye(3).double(), 0.0)
