"""The filter table as a section of the report: all rivals on all rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from reft_ray.core.quality import Targets
from reft_ray.experiments.bench.sections import Section
from reft_ray.experiments.bench.variants import teacher_variant
from reft_ray.experiments.bench.workspace import Workspace
from reft_ray.experiments.filters import directions, keywords, linear
from reft_ray.experiments.filters.baseline_filter import REF_TEACHER, BaselineFilter
from reft_ray.experiments.filters.render import render
from reft_ray.experiments.filters.rows import FilterRows, builtin_rows, public_rows
from reft_ray.experiments.filters.scores import score_all
from reft_ray.experiments.filters.table import figures
from reft_ray.finetuning.config import Thresholding
from reft_ray.hf.ref_teacher import Manifest, RefTeacher
from reft_ray.settings import Settings


class FilterSettings(Settings):
    """`embeddings` needs an extra, `answers` a generation per text; `variants` trains further teachers.

    `variant` are TeacherConfig keys of these. `apart` says that the Ref-Teacher was trained without the rows that
    `rows.set_apart` names.
    """

    embeddings: bool = True
    answers: bool = True
    variants: bool = True
    variant: dict[str, Any] = Field(default_factory=dict)
    apart: bool = False
    seed: int = 0


def rivals_of(
    workspace: Workspace, rows: FilterRows, variants: Mapping[str, RefTeacher], chosen: FilterSettings
) -> list[BaselineFilter]:
    """The Ref-Teacher first, then what could stand in its place."""
    teacher, base, device = workspace.teacher, workspace.base, workspace.config.device
    learned = rows.train, rows.validation
    made = teacher.manifest
    ground = made.base_fingerprint
    kept = made.feature_mix == 0
    whose = ", the base model's own direction" if kept else ""
    rivals = [
        BaselineFilter(
            REF_TEACHER,
            f"cosine to the refusal feature at layer {made.layer}{whose}",
            partial(directions.fit_teacher, teacher.folder, base),
            teacher.id,
            made.thresholds,
        ),
        BaselineFilter("keywords", keywords.ABOUT, lambda: keywords.score),
        BaselineFilter("TF-IDF + LR", linear.TFIDF_ABOUT, partial(linear.fit_tfidf, *learned)),
        BaselineFilter(
            "base probe", directions.PROBE_ABOUT, partial(directions.fit_probe, base, device, *learned), ground
        ),
    ]
    if chosen.answers:
        fit_answers = partial(directions.fit_answers, teacher.folder, base, device)
        rivals.append(BaselineFilter("teacher's answers", directions.ANSWERS_ABOUT, fit_answers, teacher.id))
    if not kept:  # a teacher that keeps its base's features is that direction
        fit = partial(directions.fit_direction, base, device, made.window_tokens, *learned)
        rivals.append(
            BaselineFilter("base direction", directions.DIRECTION_ABOUT, fit, f"{ground} {made.window_tokens}")
        )
    if chosen.embeddings:
        rivals.insert(
            3, BaselineFilter("MiniLM + LR", linear.EMBEDDING_ABOUT, partial(linear.fit_embeddings, *learned))
        )
    for name, trained in variants.items():
        about = f"a teacher trained {'without' if 'lambda' in name else 'with'} the regulariser"
        steps, layer = trained.manifest.config.get("steps"), trained.manifest.layer
        rivals.append(
            BaselineFilter(
                name,
                f"{about} ({steps} steps), at layer {layer}",
                partial(directions.fit_teacher, trained.folder, base),
                trained.id,
                trained.manifest.thresholds,
            )
        )
    return rivals


def run(workspace: Workspace, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Measure every filter. Scores are kept in the workspace, so that an interrupted run goes on."""
    chosen = FilterSettings.of(settings)
    made = workspace.teacher.manifest
    thresholding = made.config.get("thresholds")
    targets = Thresholding.of(thresholding).targets if thresholding else Targets()
    rows = filter_rows(workspace, chosen.apart)
    variants = {
        name: teacher_variant(
            workspace, {**chosen.variant, **changes}, replace(workspace.rows.teacher, train=rows.train)
        )
        for name, changes in variants_of(made).items()
        if chosen.variants
    }
    rivals = rivals_of(workspace, rows, variants, chosen)
    scored = score_all(rivals, rows, targets, workspace.out / "scores", workspace.say)
    return {
        **figures(scored, rows, chosen.seed),
        "base": Path(made.base_name).name,
        "layer": made.layer,
        "targets": [targets.block_recall, targets.block_fpr, targets.review_recall],
        "validation_auroc": made.quality.auroc,
    }


def variants_of(made: Manifest) -> dict[str, dict[str, Any]]:
    """Teachers beside the comparison's: without the regulariser, and with all of it where ours reads less."""
    found: dict[str, dict[str, Any]] = {
        "lambda = 0": {"feature": "trained", "feature_mix": 1.0, "separation_weight": 0.0}
    }
    if made.feature_mix < 1:
        found["REG"] = {"feature": "trained", "feature_mix": 1.0}
    return found


def filter_rows(workspace: Workspace, apart: bool = False) -> FilterRows:
    """The table's rows: public ones, or those of the built-in world."""
    rows = workspace.rows
    if workspace.config.rows is None:
        return builtin_rows(rows)
    return public_rows(workspace.data, rows.teacher, apart)


SECTION = Section("filters", "Filters in the same place", run, render, settings=FilterSettings)
