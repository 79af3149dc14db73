"""Measure one attack: which rows pass the filter, the findings about the dataset, and the students of kept rows."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reft_ray.core.conversation import Conversation, Example
from reft_ray.core.scoring import judge
from reft_ray.core.verdict import Decision
from reft_ray.evaluation.intervals import Measure
from reft_ray.experiments.attacks.datasets import Attack, with_prompt
from reft_ray.experiments.bench.students import Students
from reft_ray.experiments.student import FilteredRows
from reft_ray.hf.ref_teacher import load_scorer
from reft_ray.screening.config import ScreenConfig


def screen_attack(
    bad: Sequence[Example], task: Sequence[Example], students: Students, folder: Path
) -> tuple[FilteredRows, list[bool]]:
    """Screen the attacker's rows among the task's; also returns whether each of the attacker's rows was kept."""
    rows = [*bad, *task]
    order = list(range(len(rows)))
    _rng(students, "order").shuffle(order)
    filtered = students.filter([rows[place] for place in order], folder, ScreenConfig())
    kept = {order[place] for place in filtered.kept_at}
    return filtered, [place in kept for place in range(len(bad))]


def findings_of(filtered: FilteredRows) -> list[dict[str, Any]]:
    """The findings about the dataset, without row text."""
    return [
        {"name": found.name, "severity": found.severity.value, "count": found.count}
        for found in filtered.report.findings
    ]


def run_attack(
    attack: Attack, task: Sequence[Example], students: Students, folder: Path, methods: Sequence[str]
) -> dict[str, Any]:
    """The result of one attack. Students are trained only if a row of the attacker was kept."""
    bad = attack.build(_rng(students, "rows"))
    filtered, passed = screen_attack(bad, task, students, folder / "filter")
    kept = filtered.kept
    trainable = [row for row in kept if students.fits(row)]
    rewritten = _rewritten(attack, students)
    return {
        "name": attack.name,
        "about": attack.about,
        "by_row": attack.by_row,
        "leaked": Measure.of(passed, students.seed).as_dict(),
        "evaded": _evaded(attack, passed, students),
        "findings": findings_of(filtered),
        "encodings": dict(filtered.report.encodings),
        "harmless_dropped": len(task) - (len(kept) - sum(passed)),
        "harmless": len(task),
        "too_long": len(kept) - len(trainable),
        "students": {
            method: {
                "rows": len(trainable),
                **students.run(
                    students.config({"method": method}), trainable, folder / method, gate=True, rewritten=rewritten
                ),
            }
            for method in methods
            if any(passed)
        },
    }


def _rng(students: Students, use: str) -> random.Random:
    return random.Random(f"{students.seed}/{use}")  # noqa: S311 - reproducible draws


def _rewritten(attack: Attack, students: Students) -> list[Conversation]:
    """The evaluation's harmful prompts in the form of the attack, those that fit the context."""
    if attack.rewrite is None:
        return []
    rng = _rng(students, "asked")
    rows = [Example(prompt) for prompt in students.suite.harmful]
    rewritten = [with_prompt(row, attack.rewrite.rewrite(row.prompt[-1].content, rng)) for row in rows]
    return [row.prompt for row in rewritten if students.fits(row)]


def _evaded(attack: Attack, passed: Sequence[bool], students: Students) -> dict[str, Any] | None:
    """Of the rows that are blocked undisguised, the share that passes disguised; None without any."""
    if attack.undisguised is None:
        return None
    rows = attack.undisguised(_rng(students, "rows"))
    scorer = load_scorer(students.workspace.teacher.folder, students.workspace.base, "float32")
    verdicts = judge(scorer, [row.messages for row in rows])
    outcomes = [kept for kept, verdict in zip(passed, verdicts, strict=True) if verdict.decision is Decision.BLOCK]
    return Measure.of(outcomes, students.seed).as_dict() if outcomes else None
