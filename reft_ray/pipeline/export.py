"""Export the student as a directory that `peft` and `transformers` load, with model card and provenance."""

from __future__ import annotations

import json
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from reft_ray.hf.adapter_files import ADAPTER_CONFIG, sign_product
from reft_ray.hf.loading import fingerprint
from reft_ray.jobs.artefacts import local_folder, put_folder
from reft_ray.jobs.bom import BOM_NAME, student_bom
from reft_ray.jobs.card import CARD_NAME, PROVENANCE_NAME, Provenance
from reft_ray.jobs.content import CHUNK_BYTES
from reft_ray.jobs.results import Evaluation, Export, Screening, Training
from reft_ray.jobs.run import JobRun
from reft_ray.pipeline.model_context import ModelContext

ARCHIVE = "adapter.zip"
_EPOCH = (1980, 1, 1, 0, 0, 0)


def export_student(
    run: JobRun,
    context: ModelContext,
    screening: Screening,
    training: Training,
    evaluation: Evaluation,
    archive: bool,
) -> Export:
    """Write weights, model card and provenance to the job's workspace; with `archive` also save a zip for its owner."""
    job = run.job
    record = run.files.get(job.spec.training_file, job.project_id)
    provenance = Provenance.of(
        job,
        record.sha256,
        screening,
        training,
        evaluation,
        run.files.database.now(),
        base_fingerprint=fingerprint(context.base),
        licence=context.args.licence,
    )
    with local_folder(training.adapter_uri) as adapter, tempfile.TemporaryDirectory(prefix="reft-export-") as scratch:
        folder = Path(scratch) / "export"
        shutil.copytree(adapter, folder)
        (folder / CARD_NAME).write_text(provenance.card(), encoding="utf-8")
        (folder / PROVENANCE_NAME).write_text(provenance.to_json(), encoding="utf-8")
        if context.args.published is not None:
            _replace_base_path(folder / ADAPTER_CONFIG, context.args.published)
        weights = [ADAPTER_CONFIG, *(path.name for path in folder.glob("*.safetensors"))]
        (folder / BOM_NAME).write_text(student_bom(provenance, folder, weights), encoding="utf-8")
        sign_product(folder)
        uri = put_folder(folder, f"{run.workspace}/export")
        packed = run.save_file(ARCHIVE, _chunks(_zipped(folder, Path(scratch) / ARCHIVE))) if archive else None
    return Export(uri, packed)


def _replace_base_path(path: Path, name: str) -> None:
    """Replace the base model's local path by its published name."""
    if path.is_file():
        values = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(values | {"base_model_name_or_path": name}, indent=2), encoding="utf-8")


def _zipped(folder: Path, target: Path) -> Path:
    """Zip a folder without timestamps, so that the same student gives the same bytes."""
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                with path.open("rb") as source:
                    entry = zipfile.ZipInfo(path.relative_to(folder).as_posix(), _EPOCH)
                    with archive.open(entry, "w", force_zip64=True) as packed:
                        shutil.copyfileobj(source, packed, CHUNK_BYTES)
    return target


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as content:
        while chunk := content.read(CHUNK_BYTES):
            yield chunk
