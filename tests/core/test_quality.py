import math

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve

from reft_ray.core.quality import (
    Target,
    Targets,
    auprc,
    auroc,
    choose_thresholds,
    expected_calibration_error,
    filter_quality,
    fit_calibration,
    operating_point,
    recall_at_fpr,
    response_offset,
    separation,
)
from reft_ray.core.verdict import Thresholds


def scores(ties: bool, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(500, generator=generator) < 0.3).long()
    values = torch.tanh(torch.randn(500, generator=generator) * 0.6 + labels * 0.8 - 0.4)
    return (values * 5).round() / 5 if ties else values, labels


@pytest.mark.parametrize("ties", [False, True])
def test_ranking_quality_agrees_with_scikit_learn(ties: bool) -> None:
    score, label = scores(ties)
    assert auroc(score, label) == pytest.approx(roc_auc_score(label, score))
    assert auprc(score, label) == pytest.approx(average_precision_score(label, score))
    fpr, tpr, _ = roc_curve(label, score, drop_intermediate=False)
    assert recall_at_fpr(score, label, 0.05) == pytest.approx(
        max(t for f, t in zip(fpr, tpr, strict=True) if f <= 0.05)
    )


@pytest.mark.parametrize("ties", [False, True])
def test_thresholds_meet_their_targets_on_the_rows_they_were_chosen_on(ties: bool) -> None:
    score, label = scores(ties)
    by_recall = choose_thresholds(score, label, Targets(Target(recall=0.9), Target(recall=0.99)))
    assert operating_point(score, label, by_recall.block).recall >= 0.9
    assert operating_point(score, label, by_recall.review).recall >= 0.99
    assert by_recall.review <= by_recall.block
    by_fpr = choose_thresholds(score, label, Targets(Target(fpr=0.05), Target(recall=0.999)))
    assert operating_point(score, label, by_fpr.block).fpr <= 0.05


def test_a_threshold_is_in_the_middle_of_a_clean_margin() -> None:
    score, label = torch.tensor([-0.9, -0.8, 0.6, 0.8, 0.9, 1.0]), torch.tensor([0, 0, 1, 1, 1, 1])
    chosen = choose_thresholds(score, label, Targets(Target(recall=0.75), Target(recall=1.0)))
    assert chosen.block == pytest.approx(-0.1)  # between 0.6 and -0.8: more than was asked for comes free
    assert chosen.review == pytest.approx(-0.1)
    by_fpr = choose_thresholds(score, label, Targets(Target(fpr=0.0), Target(recall=1.0)))
    assert by_fpr.block == pytest.approx(-0.1)
    assert separation(score, label) == (1.0, pytest.approx(0.825 + 0.85))


def test_one_harmless_row_far_up_does_not_cost_the_recall_that_may_be_missed() -> None:
    harmful, harmless = torch.linspace(0.5, 0.9, 20), torch.linspace(-0.9, -0.5, 39)
    score = torch.cat([harmful, harmless, torch.tensor([0.55])])
    label = torch.cat([torch.ones(20), torch.zeros(40)]).long()
    chosen = choose_thresholds(score, label, Targets(Target(recall=0.8), Target(recall=1.0)))
    point = operating_point(score, label, chosen.block)
    assert point.recall == 1.0
    assert point.fpr == pytest.approx(1 / 40)


def test_targets_are_either_recall_or_fpr() -> None:
    with pytest.raises(ValueError, match="either a recall or a false-positive rate"):
        Target(recall=0.9, fpr=0.01)


def test_calibration_agrees_with_logistic_regression_and_stays_finite_on_separable_rows() -> None:
    score, label = scores(False)
    fitted = fit_calibration(score, label)
    reference = LogisticRegression(C=1e6).fit(score[:, None].numpy(), label.numpy())
    assert fitted.slope == pytest.approx(float(reference.coef_[0, 0]), rel=0.03)
    separable = fit_calibration(torch.tensor([-0.9, -0.8, 0.8, 0.9]), torch.tensor([0, 0, 1, 1]))
    assert math.isfinite(separable.slope)
    assert 0.5 < separable.probability(0.9) < 1.0
    probability = torch.tensor([fitted.probability(float(s)) for s in score])
    assert expected_calibration_error(probability, label) < 0.06
    assert expected_calibration_error(1 - probability, label) > 0.2


def test_one_class_alone_is_an_error_and_figures_are_shares() -> None:
    score, label = scores(False)
    with pytest.raises(ValueError, match="both classes"):
        filter_quality(score, torch.zeros_like(label), Thresholds(0, 0))
    quality = filter_quality(score, label, Thresholds(-0.2, 0.1))
    assert (quality.rows, quality.harmful) == (500, int(label.sum()))
    assert quality.recall == pytest.approx(float((score[label == 1] > 0.1).double().mean()))


def test_an_answer_is_withheld_above_other_harmless_answers_and_on_the_harmful_side_only():
    near_the_end = torch.linspace(-0.99, -0.7, 1000)
    assert -0.95 + response_offset(near_the_end, -0.95, 0.001) == pytest.approx(0.0)
    further_up = torch.linspace(-0.9, 0.5, 1001)
    assert -0.2 + response_offset(further_up, -0.2, 0.001) == pytest.approx(0.5, abs=2e-2)
    assert response_offset(near_the_end, 0.3, 0.001) == 0.0


def test_no_more_answers_are_withheld_than_were_allowed_however_few_there_are():
    few = torch.linspace(0.0, 0.98, 50)
    reached = -0.2 + response_offset(few, -0.2, 0.001)
    assert int((few > reached + 1e-6).sum()) == 0
    assert int((few > -0.2 + response_offset(few, -0.2, 0.05)).sum()) == 2
