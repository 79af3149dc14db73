"""The figures of the filter comparison: every filter on every group of rows, and differences to the first filter.

All shares are in [0, 1]; a group with one label is ranked against all rows of the other label in its part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from reft_ray.core.conversation import Example, Label
from reft_ray.core.quality import auprc, recall_at_fpr, roc
from reft_ray.evaluation.intervals import Measure
from reft_ray.evaluation.ranking import AurocBootstrap
from reft_ray.experiments.filters.rows import FilterRows, labels_of
from reft_ray.experiments.filters.scores import ScoredFilter

BINS = 40
FOREIGN, FOREIGN_UNRELATED, SEEN = "foreign", "foreign without siblings", "seen"


def figures_of(scored: Sequence[ScoredFilter], rows: FilterRows, seed: int = 0) -> dict[str, Any]:
    """`parts`: sets of rows, `sources`: one by one, `benign`: the withheld share of each harmless task."""
    parts = {FOREIGN: rows.foreign}
    if rows.siblings:
        parts[FOREIGN_UNRELATED] = [row for row in rows.foreign if row.source not in rows.siblings]
    if rows.seen:
        parts[SEEN] = rows.seen
    return {
        "filters": [
            {
                "name": one.filter.name,
                "about": one.filter.about,
                "review": one.thresholds.review,
                "block": one.thresholds.block,
            }
            for one in scored
        ],
        "training_rows": len(rows.train),
        "parts": {name: _ranked(scored, part, part, seed) for name, part in parts.items()},
        "sources": {
            name: _sources(scored, part, seed) for name, part in ((FOREIGN, rows.foreign), (SEEN, rows.seen)) if part
        },
        "siblings": sorted(rows.siblings),
        "benign": {name: _withheld(scored, part, seed) for name, part in rows.benign.items() if part},
        "lost": {one.filter.name: lost_pairs(one, rows.foreign) for one in scored},
        "curves": {one.filter.name: _curve(one, rows.foreign) for one in scored},
        "histograms": {one.filter.name: _histogram(one, rows.foreign) for one in scored},
    }


def _curve(one: ScoredFilter, rows: Sequence[Example]) -> list[list[float]]:
    """Recalls at fixed false-positive rates: enough of a ROC curve to draw it."""
    fpr, recall = roc(one.scores(rows), labels_of(rows))
    low = [10 ** (-3 + step / 25) for step in range(51)]
    rates = sorted({0.0, *low, *(step / 100 for step in range(11, 101))})
    return [[rate, float(recall[fpr <= rate + 1e-12].max())] for rate in rates]


def _histogram(one: ScoredFilter, rows: Sequence[Example]) -> dict[str, list[int]]:
    """Rows per label in equal bins of the score over [-1, 1]."""
    score_B, label_B = one.scores(rows), labels_of(rows)
    return {
        label.value: torch.histc(score_B[label_B == (label is Label.HARMFUL)], BINS, -1.0, 1.0).long().tolist()
        for label in Label
    }


def _sources(scored: Sequence[ScoredFilter], part: Sequence[Example], seed: int) -> dict[str, Any]:
    found = {}
    for source in sorted({row.source for row in part}):
        inside = [row for row in part if row.source == source]
        labels = {row.label for row in inside}
        others = [] if len(labels) == 2 else [row for row in part if row.label not in labels]
        if len(labels) == 2 or others:
            found[source] = _ranked(scored, [*inside, *others], inside, seed)
    return found


def _ranked(
    scored: Sequence[ScoredFilter], ranked: Sequence[Example], inside: Sequence[Example], seed: int
) -> dict[str, Any]:
    label_B, inside_label_B = labels_of(ranked), labels_of(inside)
    score_SB = [one.scores(ranked) for one in scored]
    bootstrap = AurocBootstrap(score_SB, label_B, seed)
    return {
        "rows": len(inside),
        "harmful": int(inside_label_B.sum()),
        "filters": {
            one.filter.name: {
                "auroc": bootstrap.interval(index).as_list(),
                "over_first": bootstrap.difference(index, 0).as_list(),
                "auprc": auprc(score_SB[index], label_B),
                "recall_at_1_fpr": recall_at_fpr(score_SB[index], label_B, 0.01),
                "recall": _above(one.scores(inside)[inside_label_B == 1], one.thresholds.block),
                "fpr": _above(one.scores(inside)[inside_label_B == 0], one.thresholds.block),
            }
            for index, one in enumerate(scored)
        },
    }


def _above(score_B: Tensor, threshold: float) -> float | None:
    return float((score_B > threshold).double().mean()) if len(score_B) else None


def _withheld(scored: Sequence[ScoredFilter], part: Sequence[Example], seed: int) -> dict[str, Any]:
    shares = {
        one.filter.name: Measure.of(
            [score > one.thresholds.block for score in one.scores(part).tolist()], seed
        ).as_dict()
        for one in scored
    }
    return {"rows": len(part), "filters": shares}


def lost_pairs(one: ScoredFilter, rows: Sequence[Example]) -> list[dict[str, Any]]:
    """1 - AUROC as an exact sum over pairs of a harmful and a harmless source, largest first.

    AUROC is the mean over all pairs of rows of [harmful above harmless]; split by the sources of the two rows, each
    pair of sources adds (its share of all pairs) * (1 - its own AUROC).
    """
    by_source: dict[Label, dict[str, Tensor]] = {label: {} for label in Label}
    for label, sources in by_source.items():
        for source in sorted({row.source for row in rows if row.label is label}):
            sources[source] = one.scores([row for row in rows if row.source == source and row.label is label])
    harmful, harmless = by_source[Label.HARMFUL], by_source[Label.HARMLESS]
    pairs = sum(map(len, harmful.values())) * sum(map(len, harmless.values()))
    lost = []
    for harmful_source, high_B in harmful.items():
        for harmless_source, low_B in harmless.items():
            # The number of harmless scores below each harmful one; ties count half.
            ordered_B = low_B.sort().values
            below = torch.searchsorted(ordered_B, high_B) + torch.searchsorted(ordered_B, high_B, right=True)
            ranked = float(below.double().sum()) / 2
            share = len(high_B) * len(low_B) / pairs
            lost.append(
                {
                    "harmful": harmful_source,
                    "harmless": harmless_source,
                    "auroc": ranked / (len(high_B) * len(low_B)),
                    "lost": share - ranked / pairs,
                    "share": share,
                }
            )
    return sorted(lost, key=lambda pair: -float(pair["lost"]))
