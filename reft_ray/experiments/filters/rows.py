"""The rows of the filter comparison, by whether filters were trained on their sources."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from reft_ray.core.conversation import Example, Label, text_hash
from reft_ray.experiments.bench.rows import BenchRows, sample_rows
from reft_ray.finetuning.prompts import read_labelled
from reft_ray.finetuning.teacher_loop import TeacherData

_SEEN_SHARE = 20


@dataclass(frozen=True, slots=True)
class FilterRows:
    """Rows by their use. All filters train on `train`; `validation` (other sources) sets layers and thresholds.

    `seen` are held-out rows of the training sources. `foreign` are rows of other sources; those in `siblings` share
    their origin with a training source. `benign` are the prompts of harmless tasks.
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    seen: Sequence[Example]
    foreign: Sequence[Example]
    benign: Mapping[str, Sequence[Example]]
    siblings: frozenset[str] = field(default_factory=frozenset)

    def sample(self, per_source: int) -> FilterRows:
        """At most `per_source` rows of each source and label; validation rows, which choose thresholds, stay."""
        return replace(
            self,
            train=_sampled(self.train, per_source),
            seen=_sampled(self.seen, per_source),
            foreign=_sampled(self.foreign, per_source),
            benign={name: _sampled(rows, per_source) for name, rows in self.benign.items()},
        )


def _sampled(rows: Sequence[Example], per_source: int) -> list[Example]:
    by_source: dict[tuple[str, Label | None], list[Example]] = {}
    for row in rows:
        by_source.setdefault((row.source, row.label), []).append(row)
    return [row for part in by_source.values() for row in sample_rows(part, per_source)]


def texts_of(rows: Sequence[Example]) -> list[str]:
    """The last prompt of every row."""
    return [row.prompt[-1].content for row in rows]


def labels_of(rows: Sequence[Example]) -> Tensor:
    """1 for harmful, 0 for harmless, [B]."""
    return torch.tensor([int(row.label is Label.HARMFUL) for row in rows])


def held_out(row: Example) -> bool:
    """Whether a row of a training source is kept for evaluation: one in twenty, by the hash of its prompt."""
    return int(text_hash(row.prompt[-1].content)[:8], 16) % _SEEN_SHARE == 0


def builtin_rows(rows: BenchRows) -> FilterRows:
    """Synthetic rows: requests with words and frames of no training prompt are foreign."""
    known = {row.prompt for row in rows.teacher.train}
    return FilterRows(
        train=rows.teacher.train,
        validation=rows.teacher.validation,
        seen=[row for row in rows.alignment if row.prompt not in known],
        foreign=[*rows.hs_prompts, *rows.over_refusal_prompts],
        benign={
            **{name: task.test for name, task in rows.tasks.items()},
            "over-refusal prompts": rows.over_refusal_prompts,
        },
    )


BENIGN = {
    "SST-2": "tasks/sst2_dev.jsonl",
    "AG News": "tasks/agnews_dev.jsonl",
    "GSM8K": "tasks/gsm8k_dev.jsonl",
    "over-refusal prompts": "attacks/over_refusal_prompts.jsonl",
}
SIBLINGS = frozenset({"rd_harmless_val", "certified_safe"})
"""Sources of `dev/` that share their origin with a training source."""


def public_rows(data: Path, teacher: TeacherData, holdout: bool) -> FilterRows:
    """The public rows: the Ref-Teacher's own in `teacher`, foreign ones in `dev/`.

    With `holdout` the teacher was trained without the `held_out` rows; without it there are no `seen` rows.
    """
    foreign = read_labelled(data / "dev/prompts.jsonl")
    benign = {name: read_labelled(data / path, Label.HARMLESS) for name, path in BENIGN.items()}
    benign["XSTest, safe"] = [row for row in foreign if row.source == "xstest" and row.label is Label.HARMLESS]
    return FilterRows(
        train=[row for row in teacher.train if not (holdout and held_out(row))],
        validation=teacher.validation,
        seen=[row for row in teacher.train if holdout and held_out(row)],
        foreign=foreign,
        benign=benign,
        siblings=SIBLINGS,
    )
