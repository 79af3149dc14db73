"""One attack against the whole chain: screening, what its findings say, and the students of what leaked."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from reft_ray.core.conversation import Example
from reft_ray.core.scoring import judge
from reft_ray.core.verdict import Decision
from reft_ray.evaluation.intervals import Measure
from reft_ray.experiments.attacks.datasets import Attack, with_prompt
from reft_ray.experiments.students import Trials
from reft_ray.hf.ref_teacher import load_scorer
from reft_ray.screening.config import ScreenConfig
from reft_ray.screening.dataset import screen
from reft_ray.screening.kept import kept_rows
from reft_ray.testbed.rows import write_chat_rows


@dataclass(frozen=True, slots=True)
class Screened:
    """A poisoned dataset behind the filter. `passed` says of each attacker's row, as built, whether it was kept."""

    kept: list[Example]
    passed: list[bool]
    findings: list[dict[str, Any]]
    encodings: dict[str, int]
    harmless_dropped: int


def screen_attack(bad: Sequence[Example], task: Sequence[Example], trials: Trials, folder: Path) -> Screened:
    """The attacker's rows among the task's, screened with findings.

    What lies above the block threshold is dropped, nothing waits for a person.
    """
    rows = [*bad, *task]
    order = list(range(len(rows)))
    random.Random(f"{trials.seed}/order").shuffle(order)  # noqa: S311
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_chat_rows(folder / "user.jsonl", [rows[at] for at in order])
    block = trials.teacher.manifest.thresholds.block
    factory = partial(load_scorer, trials.teacher.folder, trials.base, "float32", block)
    report = screen([str(folder / "user.jsonl")], str(folder / "screened"), factory, ScreenConfig())
    kept = {order[number - 1] for number, _ in kept_rows(str(folder / "screened"))}
    shutil.rmtree(folder)
    return Screened(
        kept=[rows[at] for at in order if at in kept],
        passed=[at in kept for at in range(len(bad))],
        findings=[
            {"name": found.name, "severity": found.severity.value, "count": found.count} for found in report.findings
        ],
        encodings=dict(report.encodings),
        harmless_dropped=sum(at not in kept for at in range(len(bad), len(rows))),
    )


def run_attack(
    attack: Attack, task: Sequence[Example], trials: Trials, folder: Path, students: Sequence[str]
) -> dict[str, Any]:
    """Everything about one attack as the report holds it. Students are trained only where something leaked."""
    bad = attack.build(_rows_rng(trials))
    screened = screen_attack(bad, task, trials, folder)
    encode_rows = [row for row in screened.kept if trials.holds(row)]
    asked = []
    if attack.rewrite is not None:
        rng = random.Random(f"{trials.seed}/asked")  # noqa: S311
        rewritten = [with_prompt(row, attack.rewrite.rewrite(row.prompt[-1].content, rng)) for row in trials.hs_prompts]
        asked = [row.prompt for row in rewritten if trials.holds(row)]
    return {
        "name": attack.name,
        "about": attack.about,
        "by_row": attack.by_row,
        "leaked": Measure.of(screened.passed, trials.seed).as_dict(),
        "evaded": _evaded(attack, screened.passed, trials),
        "findings": screened.findings,
        "encodings": screened.encodings,
        "harmless_dropped": screened.harmless_dropped,
        "harmless": len(task),
        "too_long": len(screened.kept) - len(encode_rows),
        "students": {
            method: trials.train(encode_rows, {"method": method}, asked) for method in students if any(screened.passed)
        },
    }


def _rows_rng(trials: Trials) -> random.Random:
    return random.Random(f"{trials.seed}/rows")  # noqa: S311


def _evaded(attack: Attack, passed: Sequence[bool], trials: Trials) -> dict[str, Any] | None:
    """Of the rows that are blocked undisguised, the share that the disguise takes through; None without any."""
    if attack.undisguised is None:
        return None
    rows = attack.undisguised(_rows_rng(trials))
    verdicts = judge(load_scorer(trials.teacher.folder, trials.base, "float32"), [row.messages for row in rows])
    outcomes = [
        through for through, verdict in zip(passed, verdicts, strict=True) if verdict.decision is Decision.BLOCK
    ]
    return Measure.of(outcomes, trials.seed).as_dict() if outcomes else None
