"""Every method of the comparison: its initial weights, its training, and its edits of rows and weights.

Each can also be trained on rows that the Ref-Teacher filtered. With the filter, `sft` is the ablation "filter only" and
`distill` is the method of this project, guided finetuning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Start = Literal["base", "teacher", "vaccine", "booster"]
"""Initial weights. `teacher`: the Ref-Teacher's, which are safety-aligned; the last two: aligned by the defence."""


@dataclass(frozen=True, slots=True)
class BenchMethod:
    """`student` are FinetuneConfig keys; `before` edits the user's rows, `after` the trained adapter."""

    title: str
    start: Start = "base"
    student: Mapping[str, Any] = field(default_factory=dict)
    before: Literal["safe_instruct", "larf"] | None = None
    after: Literal["safe_lora", "antidote"] | None = None
    filtered_title: str | None = None
    ours: bool = False

    @property
    def recipe(self) -> dict[str, Any]:
        """What a student depends on; a changed title does not invalidate cells."""
        return {"start": self.start, "student": dict(self.student), "before": self.before, "after": self.after}

    def needs_teacher(self, filtered: bool) -> bool:
        """Whether a student depends on the Ref-Teacher: by filter, initial weights, soft labels or features."""
        return filtered or self.start == "teacher" or self.student.get("labels") == "soft" or self.before == "larf"

    def name(self, filtered: bool) -> str:
        """Its name in tables."""
        return (self.filtered_title or f"{self.title} + filter") if filtered else self.title


_SFT: Mapping[str, Any] = {"method": "sft"}
_HARD: Mapping[str, Any] = {"method": "distill", "labels": "hard"}
_SOFT: Mapping[str, Any] = {"method": "distill", "labels": "soft"}

METHODS: Mapping[str, BenchMethod] = {
    "sft": BenchMethod("base → SFT", student=_SFT, filtered_title="filter only"),
    "sft_aligned": BenchMethod("aligned → SFT", "teacher", _SFT),
    "joint": BenchMethod("base → safety + user (hard labels)", student=_HARD, filtered_title="hard labels + filter"),
    "joint_aligned": BenchMethod(
        "aligned → safety + user (hard labels)", "teacher", _HARD, filtered_title="hard labels from aligned + filter"
    ),
    "safe_instruct": BenchMethod("SafeInstruct", "teacher", _SFT, before="safe_instruct"),
    "lisa": BenchMethod("Lisa", "teacher", {**_HARD, "step": "lisa"}),
    "vaccine": BenchMethod("Vaccine", "vaccine", _SFT),
    "booster": BenchMethod("Booster", "booster", _SFT),
    "ldifs": BenchMethod("LDIFS", "teacher", {**_SFT, "step": "ldifs"}),
    "safe_lora": BenchMethod("SafeLoRA", "teacher", _SFT, after="safe_lora"),
    "antidote": BenchMethod("Antidote", "teacher", _SFT, after="antidote"),
    "larf": BenchMethod("LARF", "teacher", _SFT, before="larf"),
    "distill": BenchMethod("distillation only", student=_SOFT, filtered_title="**guided** (ours)", ours=True),
    "distill_aligned": BenchMethod(
        "distillation from aligned", "teacher", _SOFT, filtered_title="**guided from aligned** (ours)", ours=True
    ),
}
