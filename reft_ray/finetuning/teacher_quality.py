"""Measures of a filter on labelled prompts, per source and overall, and its thresholds chosen again on them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reft_ray.core.conversation import Example, Label
from reft_ray.core.quality import (
    Targets,
    auprc,
    auroc,
    choose_thresholds,
    curve_points,
    expected_calibration_error,
    filter_quality,
    fit_calibration,
    operating_point,
    precision_recall,
    recall_at_fpr,
    roc,
)
from reft_ray.core.scoring import Scorer
from reft_ray.core.verdict import Calibration, Thresholds
from reft_ray.finetuning.prompts import check_labels, sources_of
from reft_ray.finetuning.teacher_filter import HISTOGRAM_BINS, per_source
from reft_ray.hf.ref_teacher import Manifest, RefTeacher

FALSE_POSITIVE_RATES = (0.001, 0.01, 0.05)
"""Points of the ROC curve that reports name."""


def scores_of(scorer: Scorer, rows: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """(scores, labels) of the prompts' last turns, [B] each. Raises ReftError unless both labels are there."""
    check_labels(rows, "labelled")
    found = scorer.score([row.prompt[-1].content for row in rows])
    score_B = torch.tensor([item.score for item in found], dtype=torch.float64)
    return score_B, torch.tensor([row.label is Label.HARMFUL for row in rows]).long()


def measure(scorer: Scorer, rows: Sequence[Example]) -> dict[str, Any]:
    """`report` of a teacher's scores of labelled prompts."""
    return {
        "teacher": scorer.teacher_id,
        **report(*scores_of(scorer, rows), rows, scorer.thresholds, scorer.calibration),
    }


def report(
    score_B: Tensor, label_B: Tensor, rows: Sequence[Example], thresholds: Thresholds, calibration: Calibration
) -> dict[str, Any]:
    """AUROC, AUPRC, recall at three FPR, ECE and the shares blocked and reviewed, per source and overall; the curves.

    Shares are in [0, 1]. A source with one label is ranked against all rows of the other label.
    """
    every_B = torch.ones_like(label_B, dtype=torch.bool)
    overall = asdict(filter_quality(score_B, label_B, thresholds)) | _source(
        score_B, label_B, every_B, thresholds, calibration
    )
    sources = {}
    for source in sorted({row.source for row in rows}):
        inside_B = torch.tensor([row.source == source for row in rows])
        sources[source or "unnamed"] = _source(score_B, label_B, inside_B, thresholds, calibration)
    curves = {
        "roc": curve_points(*roc(score_B, label_B)),
        "precision_recall": curve_points(*precision_recall(score_B, label_B)),
    }
    return {"overall": overall, "sources": sources, "curves": curves}


def _source(
    score_B: Tensor, label_B: Tensor, inside_B: Tensor, thresholds: Thresholds, calibration: Calibration
) -> dict[str, Any]:
    labels = set(label_B[inside_B].tolist())
    ranked_B = inside_B if len(labels) == 2 else inside_B | ~torch.isin(label_B, label_B[inside_B])
    score, label = score_B[ranked_B], label_B[ranked_B]
    recalls = {f"{fpr:g}": recall_at_fpr(score, label, fpr) for fpr in FALSE_POSITIVE_RATES}
    own, block = score_B[inside_B], thresholds.block
    return {
        "rows": int(inside_B.sum()),
        "harmful": int(label_B[inside_B].sum()),
        "auroc": auroc(score, label),
        "auprc": auprc(score, label),
        "recall_at_1_fpr": recalls["0.01"],
        "recall_at_fpr": recalls,
        "ece": _ece(own, label_B[inside_B], calibration),
        "blocked": float((own > block).double().mean()),
        "review": float(((own > thresholds.review) & (own <= block)).double().mean()),
    }


def _ece(score_B: Tensor, label_B: Tensor, calibration: Calibration) -> float:
    probability_B = torch.tensor([calibration.probability(float(score)) for score in score_B])
    return expected_calibration_error(probability_B, label_B)


def recalibrated(
    teacher: RefTeacher,
    score_B: Tensor,
    label_B: Tensor,
    rows: Sequence[Example],
    targets: Targets,
    files: Sequence[Path] = (),
) -> Manifest:
    """The teacher's manifest with thresholds, calibration and quality chosen on these labelled prompts.

    `config.recalibrated` records each time: the teacher before, the targets, and the files by SHA-256.
    """
    made = teacher.manifest
    thresholds = choose_thresholds(score_B, label_B, targets)
    entry = {
        "teacher": teacher.id,
        "thresholds": asdict(made.thresholds),
        "targets": asdict(targets),
        "prompts": [_provenance(file, rows) for file in files],
    }
    return replace(
        made,
        thresholds=thresholds,
        calibration=fit_calibration(score_B, label_B),
        quality=filter_quality(score_B, label_B, thresholds),
        per_source=per_source(rows, score_B, thresholds.block),
        histogram=torch.histc(score_B, HISTOGRAM_BINS, -1.0, 1.0).long().tolist(),
        # Answers are withheld above the score that was chosen for them, which these prompts say nothing about.
        response_offset=max(0.0, -thresholds.review, made.thresholds.review + made.response_offset - thresholds.review),
        sources=[*made.sources, *sources_of(rows, "thresholds")],
        config={**made.config, "recalibrated": [*made.config.get("recalibrated", ()), entry]},
    )


def _provenance(file: Path, rows: Sequence[Example]) -> dict[str, Any]:
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    used = sum(row.place.rpartition(":")[0] == str(file) for row in rows)
    return {"name": file.name, "sha256": digest, "rows": used}


def compared(
    before: tuple[Thresholds, Calibration], after: tuple[Thresholds, Calibration], score_B: Tensor, label_B: Tensor
) -> Mapping[str, Any]:
    """Both thresholds with their recall and FPR, and the ECE, before and after, on the same prompts."""

    def one(thresholds: Thresholds, calibration: Calibration) -> dict[str, Any]:
        points = {
            name: asdict(operating_point(score_B, label_B, getattr(thresholds, name))) for name in ("block", "review")
        }
        return points | {"ece": _ece(score_B, label_B, calibration)}

    return {"before": one(*before), "after": one(*after)}
