"""The filter comparison as a section of the report: the Ref-Teacher and all baselines on all rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import Field

from reft_ray.core.geometry import Geometry
from reft_ray.core.quality import Targets
from reft_ray.experiments.bench.section import Section
from reft_ray.experiments.bench.shared_models import teacher_variant
from reft_ray.experiments.bench.workspace import Workspace
from reft_ray.experiments.filters import directions, keywords, linear, siren
from reft_ray.experiments.filters.figures import figures_of
from reft_ray.experiments.filters.rows import FilterRows, builtin_rows, public_rows
from reft_ray.experiments.filters.scores import REF_TEACHER, BaselineFilter, score_all
from reft_ray.experiments.filters.tables import render
from reft_ray.finetuning.config import Thresholding
from reft_ray.hf.ref_teacher import Manifest, RefTeacher
from reft_ray.settings import Settings


class FilterSettings(Settings):
    """`embeddings` needs an extra, `answers` one generation per text; `variants` trains further teachers.

    `per_source` is the most prompts of each source and label, of training and of measured prompts. `variant` are the
    variants' TeacherConfig keys. `holdout`: the Ref-Teacher was trained without the `rows.held_out` rows.
    """

    embeddings: bool = True
    per_source: int | None = Field(None, ge=1)
    answers: bool = True
    variants: bool = True
    variant: dict[str, Any] = Field(default_factory=dict)
    holdout: bool = False
    seed: int = 0


def filters_of(
    workspace: Workspace, rows: FilterRows, variants: Mapping[str, RefTeacher], chosen: FilterSettings
) -> list[BaselineFilter]:
    """The Ref-Teacher first, then the baselines."""
    teacher, base, device = workspace.teacher, workspace.base, workspace.config.device
    learned = rows.train, rows.validation
    made = teacher.manifest
    base_id = made.base_fingerprint
    untrained = made.feature_mix == 0
    origin = ", the base model's own direction" if untrained else ""
    filters = [
        BaselineFilter(
            REF_TEACHER,
            f"cosine to the refusal feature at layer {made.layer}{origin}",
            partial(directions.fit_teacher, teacher.folder, base),
            teacher.id,
            made.thresholds,
        ),
        BaselineFilter("keywords", keywords.ABOUT, lambda: keywords.score),
        BaselineFilter("TF-IDF + LR", linear.TFIDF_ABOUT, partial(linear.fit_tfidf, *learned)),
        BaselineFilter(
            "base probe", directions.PROBE_ABOUT, partial(directions.fit_probe, base, device, *learned), base_id
        ),
    ]
    fit = partial(siren.fit_siren, base, device, *learned)
    filters.append(BaselineFilter("SIREN", siren.ABOUT, fit, base_id))
    if chosen.answers:
        fit_answers = partial(directions.fit_answers, teacher.folder, base, device)
        filters.append(BaselineFilter("teacher's answers", directions.ANSWERS_ABOUT, fit_answers, teacher.id))
    if not untrained:  # otherwise the Ref-Teacher is that direction
        direction_of = f"{base_id} {made.window_tokens}"
        for name, geometry in (("base direction", Geometry.PLAIN), ("base, whitened", Geometry.WHITENED)):
            fit = partial(directions.fit_direction, base, device, made.window_tokens, *learned, geometry)
            filters.append(BaselineFilter(name, f"{directions.DIRECTION_ABOUT}, {geometry}", fit, direction_of))
    if chosen.embeddings:
        filters.insert(
            3, BaselineFilter("MiniLM + LR", linear.EMBEDDING_ABOUT, partial(linear.fit_embeddings, *learned))
        )
    for name, trained in variants.items():
        about = f"a teacher trained {'without' if 'lambda' in name else 'with'} the regulariser"
        steps, layer = trained.manifest.config.get("steps"), trained.manifest.layer
        filters.append(
            BaselineFilter(
                name,
                f"{about} ({steps} steps), at layer {layer}",
                partial(directions.fit_teacher, trained.folder, base),
                trained.id,
                trained.manifest.thresholds,
            )
        )
    return filters


def run(workspace: Workspace, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Measure every filter. Scores are cached in the workspace, so that an interrupted run resumes."""
    chosen = FilterSettings.of(settings)
    made = workspace.teacher.manifest
    thresholding = made.config.get("thresholds")
    targets = Thresholding.of(thresholding).targets if thresholding else Targets()
    rows = rows_of(workspace, chosen.holdout)
    rows = rows.sample(chosen.per_source) if chosen.per_source else rows
    variants = {
        name: teacher_variant(
            workspace, {**chosen.variant, **changes}, replace(workspace.rows.teacher, train=rows.train)
        )
        for name, changes in variants_of(made).items()
        if chosen.variants
    }
    filters = filters_of(workspace, rows, variants, chosen)
    scored = score_all(filters, rows, targets, workspace.out / "scores", workspace.log)
    return {
        **figures_of(scored, rows, chosen.seed),
        "base": Path(made.base_name).name,
        "layer": made.layer,
        "targets": asdict(targets),
        "validation_auroc": made.quality.auroc,
    }


def variants_of(made: Manifest) -> dict[str, dict[str, Any]]:
    """Further teachers: one without the regulariser, and a fully trained one if ours mixes in the base's features."""
    found: dict[str, dict[str, Any]] = {
        "lambda = 0": {"feature": "trained", "feature_mix": 1.0, "separation_weight": 0.0}
    }
    if made.feature_mix < 1:
        found["REG"] = {"feature": "trained", "feature_mix": 1.0}
    return found


def rows_of(workspace: Workspace, holdout: bool = False) -> FilterRows:
    """The comparison's rows: public or synthetic ones."""
    rows = workspace.rows
    if workspace.config.rows is None:
        return builtin_rows(rows)
    return public_rows(workspace.data, rows.teacher, holdout)


SECTION = Section("filters", "Baseline filters", run, render, settings=FilterSettings)
