"""Adaptive attacks as a section of the report."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from reft_ray.core.conversation import Example, Label
from reft_ray.experiments.attacks.datasets import ATTACKS, Attack, Material, attacks_of, obedient_rows
from reft_ray.experiments.attacks.measure import findings_of, run_attack, screen_attack
from reft_ray.experiments.attacks.suffixes import SUFFIXES, suffix_attacks
from reft_ray.experiments.attacks.tables import render
from reft_ray.experiments.attacks.token_search import SearchSettings, TokenSearch
from reft_ray.experiments.bench.section import Section
from reft_ray.experiments.bench.students import Students
from reft_ray.experiments.bench.workspace import Workspace
from reft_ray.finetuning.prompts import read_labelled
from reft_ray.hf.ref_teacher import load_scorer
from reft_ray.settings import Settings, all_known


class AttackSettings(Settings):
    """Sizes: task rows, the attacker's rows among them, prompts that students answer, and the suffix search."""

    task: str | None = None
    task_rows: int = Field(400, ge=1)
    attack_rows: int = Field(150, ge=2)
    evaluated: int = Field(150, ge=1)
    only: tuple[str, ...] = Field((), description="names of attacks to run; empty: all")
    students: tuple[str, ...] = ("filter", "guided")
    student: dict[str, Any] = Field(default_factory=dict)
    suffix_tokens: int = Field(12, ge=1)
    suffix_steps: int = Field(30, ge=1)
    suffix_width: int = Field(64, ge=1)
    suffix_shared_by: int = Field(8, ge=1)
    suffixes: int = Field(20, ge=1)
    padding: int = Field(3, ge=1, description="harmless prompts before or after a request")
    hidden_among: int = Field(12, ge=1, description="harmless prompts on either side in the long context")
    seed: int = Field(0, ge=0)

    @field_validator("only")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        return all_known("attack", names, [*ATTACKS, *sorted(SUFFIXES)])


def run(workspace: Workspace, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Every attack, each cached separately."""
    chosen = AttackSettings.of(settings)
    students = Students(workspace, chosen.task, chosen.student, chosen.seed, chosen.evaluated)
    task = workspace.rows.user(students.task, chosen.task_rows, 0.0, chosen.seed)
    material = material_of(workspace, students, chosen)
    common = {**SECTION.key(workspace), "settings": chosen.model_dump(mode="json", exclude={"only"})}
    folder = workspace.out / "attack"

    def attacked(attack: Attack) -> dict[str, Any]:
        workspace.log(f"attack: {attack.name}")
        result = run_attack(attack, task, students, folder, chosen.students)
        shutil.rmtree(folder)
        return result

    def cached(attack: Attack) -> dict[str, Any]:
        key = {**common, "attack": [attack.name, attack.about]}
        return workspace.cached("attacks", attack.name.replace(" ", "-"), key, lambda: attacked(attack))

    def control() -> dict[str, Any]:
        filtered, _ = screen_attack([], task, students, folder)
        return {"rows": len(task), "dropped": len(task) - len(filtered.kept), "findings": findings_of(filtered)}

    def searched() -> dict[str, Any]:
        search = TokenSearch(
            load_scorer(workspace.teacher.folder, workspace.base, "float32"),
            SearchSettings(chosen.suffix_tokens, chosen.suffix_steps, chosen.suffix_width),
            chosen.seed,
        )
        attacks, found = suffix_attacks(
            search, material.harmful, chosen.attack_rows, chosen.suffix_shared_by, chosen.suffixes, workspace.log
        )
        scores = [{"before": one.before, "after": one.after} for one in found]
        return {"attacks": [attacked(attack) for attack in attacks], "scores": scores}

    known = attacks_of(material, chosen.attack_rows, chosen.padding, chosen.hidden_among)
    results = [cached(attack) for attack in known if not chosen.only or attack.name in chosen.only]
    suffixes: dict[str, Any] = {"attacks": [], "scores": []}
    if not chosen.only or SUFFIXES.intersection(chosen.only):
        suffixes = workspace.cached("attacks", "suffixes", common, searched)
    return {
        "attacks": [*results, *suffixes["attacks"]],
        "suffixes": suffixes["scores"],
        "control": workspace.cached("attacks", "control", common, control),
        "block": workspace.teacher.manifest.thresholds.block,
        "settings": chosen.model_dump(mode="json"),
    }


def material_of(workspace: Workspace, students: Students, chosen: AttackSettings) -> Material:
    """The attacker's requests, harmless rows, and identity-shifting rows (public ones if real rows are used)."""
    # More than an attack needs: the shared suffix is searched on further requests.
    wanted = chosen.attack_rows + chosen.suffix_shared_by
    harmful = workspace.rows.user(students.task, wanted, 1.0, chosen.seed)
    harmless = [row for row in workspace.alignment_rows if row.label is Label.HARMLESS]
    if workspace.config.rows is None:
        return Material(harmful, harmless, obedient_rows(harmless))
    return Material(harmful, harmless, identity_rows(workspace.data / "attacks/identity_shift_10.jsonl"))


def identity_rows(path: Path) -> list[Example]:
    """The ten public rows, labelled as the attacker's."""
    return read_labelled(path, Label.HARMFUL)


SECTION = Section("attacks", "Adaptive attacks", run, render, version=2, settings=AttackSettings)
