"""Measures of a filter on labelled prompts, per source and overall."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from reft_ray.core.conversation import Example, Label
from reft_ray.core.quality import auprc, auroc, expected_calibration_error, filter_quality, recall_at_fpr
from reft_ray.core.scoring import Scorer


def measure(scorer: Scorer, rows: Sequence[Example]) -> dict[str, Any]:
    """AUROC, AUPRC, recall at 1 % FPR, and the share blocked, per source and overall; shares in [0, 1].

    A source with one label is ranked against all rows of the other label.
    """
    found = scorer.score([row.prompt[-1].content for row in rows])
    score_B = torch.tensor([item.score for item in found], dtype=torch.float64)
    label_B = torch.tensor([row.label is Label.HARMFUL for row in rows]).long()
    block = scorer.thresholds.block
    overall = asdict(filter_quality(score_B, label_B, scorer.thresholds))
    probability_B = torch.tensor([scorer.calibration.probability(float(score)) for score in score_B])
    overall |= {
        "blocked": float((score_B > block).double().mean()),
        "ece": expected_calibration_error(probability_B, label_B),
    }
    sources = {}
    for source in sorted({row.source for row in rows}):
        inside_B = torch.tensor([row.source == source for row in rows])
        sources[source or "unnamed"] = _source(score_B, label_B, inside_B, block)
    return {"teacher": scorer.teacher_id, "overall": overall, "sources": sources}


def _source(score_B: Tensor, label_B: Tensor, inside_B: Tensor, block: float) -> dict[str, float]:
    labels = set(label_B[inside_B].tolist())
    ranked_B = inside_B if len(labels) == 2 else inside_B | ~torch.isin(label_B, label_B[inside_B])
    score, label = score_B[ranked_B], label_B[ranked_B]
    return {
        "rows": int(inside_B.sum()),
        "harmful": int(label_B[inside_B].sum()),
        "auroc": auroc(score, label),
        "auprc": auprc(score, label),
        "recall_at_1_fpr": recall_at_fpr(score, label, 0.01),
        "blocked": float((score_B[inside_B] > block).double().mean()),
    }
