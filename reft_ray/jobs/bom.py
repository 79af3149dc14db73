"""The bill of materials of a model: CycloneDX 1.6 with its base, its teacher, its data, and the hashes of its files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from reft_ray.jobs.artefacts import sha256_of
from reft_ray.jobs.card import Provenance

BOM_NAME = "bom.cdx.json"


def student_bom(provenance: Provenance, folder: Path, model_files: Iterable[str]) -> str:
    """The text of `bom.cdx.json` for a student whose weights are the named files of a folder."""
    screening = provenance.screening
    base = _component("machine-learning-model", provenance.base_model, fingerprint=provenance.base_fingerprint)
    teacher = _component("machine-learning-model", screening.teacher_id or "unknown")
    rows = _component("data", provenance.training_file, hashes=[("SHA-256", provenance.training_sha256)])
    kept = _component(
        "data",
        f"{provenance.training_file} (kept rows)",
        hashes=[("SHA-256", screening.kept_sha256)] if screening.kept_sha256 else [],
        rows=screening.rows,
        kept=screening.kept,
        blocked=screening.blocked,
        review=screening.review,
        invalid=screening.invalid,
    )
    student = _component("machine-learning-model", provenance.model, job=provenance.job_id, seed=provenance.seed)
    if provenance.licence:
        student["licenses"] = [{"license": {"name": provenance.licence}}]
    student["components"] = [
        _component("file", name, hashes=[("SHA-256", sha256_of(folder / name))])
        for name in sorted(model_files)
        if (folder / name).is_file()
    ]
    student["modelCard"] = {
        "modelParameters": {
            "approach": {"type": "supervised"},
            "task": "text-generation",
            "datasets": [{"ref": kept["bom-ref"]}],
        },
        "quantitativeAnalysis": {
            "performanceMetrics": [
                {"type": check.measure, "value": str(check.student), "slice": f"base {check.base}"}
                for check in provenance.evaluation.checks
            ]
        },
    }
    return document(student, [base, teacher, rows, kept], provenance.created_at)


def document(subject: dict[str, Any], parts: list[dict[str, Any]], created_at: float) -> str:
    """A bill of materials: the subject depends on all parts. `created_at` is in seconds since the epoch."""
    tool = {"type": "application", "name": "reft-ray", "version": version("reft-ray")}
    made = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": datetime.fromtimestamp(created_at, UTC).isoformat(timespec="seconds"),
            "tools": {"components": [tool]},
            "component": subject,
        },
        "components": parts,
        "dependencies": [{"ref": subject["bom-ref"], "dependsOn": [part["bom-ref"] for part in parts]}],
    }
    return json.dumps(made, indent=2, sort_keys=True) + "\n"


def _component(kind: str, name: str, hashes: Iterable[tuple[str, str]] = (), **properties: object) -> dict[str, Any]:
    """A component; its reference is made of its kind and name, so that the same model has the same one."""
    reference = hashlib.sha256(f"{kind}/{name}".encode()).hexdigest()[:24]
    component: dict[str, Any] = {"type": kind, "name": name, "bom-ref": f"{kind}-{reference}"}
    if hashes:
        component["hashes"] = [{"alg": algorithm, "content": content} for algorithm, content in hashes]
    known: Mapping[str, object] = {key: value for key, value in properties.items() if value is not None}
    if known:
        component["properties"] = [{"name": f"reft-ray:{key}", "value": str(value)} for key, value in known.items()]
    return component
