"""The dossier of a job: what was asked, what filter and gate found, who decided, and that nothing was changed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from reft_ray.atomic import atomic_directory
from reft_ray.core.errors import ReftError
from reft_ray.jobs.artefacts import local_folder, sha256_of
from reft_ray.jobs.audit import AuditLog, Entry
from reft_ray.jobs.bom import BOM_NAME
from reft_ray.jobs.card import CARD_NAME, PROVENANCE_NAME
from reft_ray.jobs.errors import NotFoundError
from reft_ray.jobs.files import FileStore
from reft_ray.jobs.job import Job
from reft_ray.jobs.job_store import JobStore
from reft_ray.jobs.models import ModelStore
from reft_ray.jobs.releases import Releases
from reft_ray.jobs.results import finite
from reft_ray.jobs.review_queue import ReviewQueue

INDEX = "index.json"
REPORTS = ("screening_report.jsonl", "release_gate.json", "step_metrics.csv")
"""Result files without text of rows."""
_PAPERS = (BOM_NAME, CARD_NAME, PROVENANCE_NAME)
_PAGE = 1000
_WITHIN = ("uri", "kept_uri", "adapter_uri", "handle", "lease_owner", "lease_until")
"""Where the service keeps things: nothing that an auditor can use."""


def write_dossier(jobs: JobStore, files: FileStore, job_id: str, out: Path) -> dict[str, Any]:
    """Write the dossier of a job into a new directory; its index has a SHA-256 of each file.

    It holds no text of rows. Raises NotFoundError for an unknown job, ReftError for a directory that is not empty.
    """
    job = jobs.get(job_id)
    if out.exists() and any(out.iterdir()):
        raise ReftError(f"{out} is not empty: name a new directory")
    log = AuditLog(jobs.database)
    checked = log.verify()
    with atomic_directory(out, replace=True) as folder:
        _json(folder / "job.json", _job(jobs, job))
        _json(folder / "files.json", _files(files, job))
        _lines(folder / "events.jsonl", [asdict(event) for event in _events(jobs, job_id)])
        _lines(folder / "reviews.jsonl", [asdict(review) for review in ReviewQueue(jobs).decided(job_id)])
        _lines(folder / "audit.jsonl", [asdict(entry) for entry in _entries(log, job)])
        # Only a model that failed the gate asks people.
        if (release := Releases(jobs).find(job_id)) is not None:
            _json(folder / "release.json", asdict(release))
        _copy_reports(files, job, folder)
        _copy_papers(jobs, job, folder)
        index = {
            "job": job.id,
            "status": str(job.status),
            "model": job.fine_tuned_model,
            "created_at": jobs.database.now(),
            "audit": {"entries": checked.entries, "head": checked.head, "fault": checked.fault},
            "files": {path.name: sha256_of(path) for path in sorted(folder.iterdir())},
        }
        _json(folder / INDEX, index)
    return index


def _job(jobs: JobStore, job: Job) -> dict[str, Any]:
    values = {name: value for name, value in asdict(job).items() if name not in _WITHIN}
    steps = {
        name: {key: value for key, value in result.items() if key not in _WITHIN}
        for name, result in jobs.steps(job.id).items()
    }
    checkpoints = [
        {"step": one.step_number, "metrics": dict(one.metrics)} for one in jobs.checkpoints(job.id, limit=_PAGE).items
    ]
    return {**values, "steps": steps, "checkpoints": checkpoints}


def _files(files: FileStore, job: Job) -> list[dict[str, Any]]:
    """The records of the job's files; one that was deleted has only its id."""
    found = []
    for file_id in filter(None, (job.spec.training_file, job.spec.validation_file, *job.result_files)):
        try:
            found.append(asdict(files.get(file_id, job.project_id)))
        except NotFoundError:
            found.append({"id": file_id, "deleted": True})
    return found


def _events(jobs: JobStore, job_id: str) -> list[Any]:
    found: list[Any] = []
    after = None
    while True:
        page = jobs.events(job_id, after=after, limit=_PAGE)
        found += page.items
        if not page.has_more:
            return found[::-1]
        after = page.items[-1].id


def _entries(log: AuditLog, job: Job) -> list[Entry]:
    """The entries of the project that name the job, its files or its model."""
    names = {job.id, job.spec.training_file, job.spec.validation_file, job.fine_tuned_model, *job.result_files} - {None}
    found: list[Entry] = []
    after = 0
    while page := log.entries(after, _PAGE, project_id=job.project_id):
        found += [entry for entry in page if any(f'"{name}"' in json.dumps(dict(entry.data)) for name in names)]
        after = page[-1].seq
    return found


def _copy_reports(files: FileStore, job: Job, folder: Path) -> None:
    for file_id in job.result_files:
        try:
            record = files.get(file_id, job.project_id)
        except NotFoundError:
            continue
        if record.filename in REPORTS:
            with (folder / record.filename).open("wb") as out:
                out.writelines(files.read(file_id, job.project_id))


def _copy_papers(jobs: JobStore, job: Job, folder: Path) -> None:
    """What the model carries: card, provenance, bill of materials, signature."""
    if job.fine_tuned_model is None:
        return
    try:
        student = ModelStore(jobs.database).get(job.fine_tuned_model, job.project_id)
        with local_folder(student.uri) as model:
            for path in model.iterdir():
                if path.name in _PAPERS or path.name.endswith(".sig"):
                    (folder / path.name).write_bytes(path.read_bytes())
    except (NotFoundError, OSError):
        # The model was deleted: the rest of the dossier stays true.
        return


def _json(path: Path, values: Any) -> None:
    path.write_text(json.dumps(finite(values), indent=2, sort_keys=True, default=str) + "\n", encoding="utf-8")


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    lines = (json.dumps(finite(row), sort_keys=True, default=str) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
