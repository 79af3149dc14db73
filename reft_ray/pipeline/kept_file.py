"""The kept rows of a job as a file of the project, which other jobs can train on."""

from __future__ import annotations

from collections.abc import Iterator

from reft_ray.core.conversation import Conversation
from reft_ray.jobs.results import Screening
from reft_ray.jobs.run import JobFailedError, JobRun
from reft_ray.rows.text import messages_json
from reft_ray.screening.kept_rows import checked_manifest, kept_rows
from reft_ray.screening.outputs import Output, approved_name, kept_name
from reft_ray.screening.sources import Container

KEPT = "kept.jsonl"
PURPOSE = "fine-tune"


def save_kept(run: JobRun, screening: Screening) -> str | None:
    """Save the rows that were trained on; None where those are all of the training file.

    Lines of JSONL keep their bytes, where a job needs no options to read them; other rows become `messages`. It is
    deleted with the training file. Where the project's quota is too small for it, an event says so.
    """
    if screening.kept == screening.rows:
        return None
    try:
        return run.save_file(
            KEPT, _lines(run, screening.kept_uri), parent_id=run.job.spec.training_file, purpose=PURPOSE
        )
    except JobFailedError as full:
        run.event(f"The kept rows were not saved as a file. {full.error.message}", level="warn", key="train/kept")
        return None


def _lines(run: JobRun, folder: str) -> Iterator[bytes]:
    options = run.job.spec.options
    output, manifest = Output(folder), checked_manifest(folder)
    plain = all(shape.container is Container.JSONL and shape.compression is None for shape in manifest.shapes)
    if not plain or options.format or options.columns or options.speakers:
        yield from (_row(conversation) for _, conversation in kept_rows(folder))
        return
    sizes = output.sizes("kept")
    for unit in manifest.units:
        for name in (kept_name(manifest.shape_of(unit), unit), approved_name(manifest.shape_of(unit), unit)):
            if name in sizes:
                content = output.read(name)
                yield content if content.endswith(b"\n") else content + b"\n"


def _row(conversation: Conversation) -> bytes:
    return b'{"messages":' + messages_json(conversation).encode() + b"}\n"
