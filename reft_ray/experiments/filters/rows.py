"""The rows of the filter table, and which of their sources a filter has seen in training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from reft_ray.core.conversation import Example, Label, text_hash
from reft_ray.experiments.bench.rows import BenchRows
from reft_ray.finetuning.prompts import read_labelled
from reft_ray.finetuning.teacher_loop import TeacherData

_SEEN_SHARE = 20


@dataclass(frozen=True, slots=True)
class FilterRows:
    """Rows by their use. `train` teaches every filter, `validation` (other sources) sets layers and thresholds.

    `seen` are rows of the training sources that nothing was trained on; `foreign` come from elsewhere, but for the
    sources named in `siblings`, which share their origin with a training source. `benign` are the prompts of
    harmless tasks.
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    seen: Sequence[Example]
    foreign: Sequence[Example]
    benign: Mapping[str, Sequence[Example]]
    siblings: frozenset[str] = field(default_factory=frozenset)


def set_apart(row: Example) -> bool:
    """Whether a row of a training source is kept for evaluation: one in twenty, by the hash of its prompt."""
    return int(text_hash(row.prompt[-1].content)[:8], 16) % _SEEN_SHARE == 0


def builtin_rows(rows: BenchRows) -> FilterRows:
    """The built-in world: requests whose words and frames no training prompt has count as foreign."""
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
"""Sources of `dev/` whose other part is a training source."""


def public_rows(data: Path, teacher: TeacherData, apart: bool) -> FilterRows:
    """The public rows: `teacher` holds the Ref-Teacher's own, `dev/` is foreign.

    `apart` says that the teacher was trained without the rows that `set_apart` names; otherwise nothing stands for
    its training sources.
    """
    foreign = read_labelled(data / "dev/prompts.jsonl")
    benign = {name: read_labelled(data / path, Label.HARMLESS) for name, path in BENIGN.items()}
    benign["XSTest, safe"] = [row for row in foreign if row.source == "xstest" and row.label is Label.HARMLESS]
    return FilterRows(
        train=[row for row in teacher.train if not (apart and set_apart(row))],
        validation=teacher.validation,
        seen=[row for row in teacher.train if apart and set_apart(row)],
        foreign=foreign,
        benign=benign,
        siblings=SIBLINGS,
    )
