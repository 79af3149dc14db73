"""Put the withheld rows of a job, and a sample of its kept ones, before people."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from reft_ray.core.conversation import row_id
from reft_ray.jobs.results import REJECTED_SECONDS
from reft_ray.jobs.review import FiledRow, Kind
from reft_ray.jobs.run import JobRun
from reft_ray.rows.text import full_conversation, messages_json
from reft_ray.screening.findings import Totals, clusters
from reft_ray.screening.kept_rows import unit_rows
from reft_ray.screening.manifest import Manifest, load_manifest
from reft_ray.screening.outputs import UNITS, Output
from reft_ray.screening.report import load_report
from reft_ray.screening.unit_state import UnitState

SAMPLE = "kept_sample.jsonl"
_EVIDENCE = (
    "row_number", "line", "id", "decision", "reason", "part", "encoding", "score", "probability", "threshold",
    "teacher", "decided_by", "guard_score",
)  # fmt: skip
_TEXTS = ("conversation", "messages")

Chosen = tuple[int, int, str, Any]
"""A row's number, line, content id and messages."""


def file_for_review(run: JobRun, folder: str, quarantine: str | None, sample: int) -> None:
    """File the rows of the `quarantine` file, and `sample` random kept rows; repeating it changes nothing."""
    if quarantine is not None:
        run.file_reviews(_withheld(folder, quarantine))
    chosen = list(_chosen(folder, sample, run.job.id))
    if chosen:
        lines = [json_line({"line": line, "decision": "allow", "messages": text}) for _, line, _, text in chosen]
        file_id = run.save_file(SAMPLE, lines, parent_id=run.job.spec.training_file, expires_after=REJECTED_SECONDS)
        teacher = str(load_report(folder).judges.get("teacher", ""))
        run.file_reviews(_sampled(chosen, lines, file_id, teacher))


def withheld_lines(folder: str) -> Iterator[bytes]:
    """The withheld rows with their lines: `messages` as training would read them, and `judged` where that is more."""
    return map(_withheld_line, _quarantined(folder, ("line", "decision", *_TEXTS)))


def parts_of(folder: str) -> Iterator[tuple[Output, str]]:
    """The output's parts, in the order of the rows."""
    output = Output(folder)
    for unit in load_manifest(output).units:
        for part in _state(output, unit).parts:
            yield output, part


def json_line(values: Mapping[str, Any]) -> bytes:
    """A row of a result file."""
    return json.dumps(values, ensure_ascii=False).encode() + b"\n"


def _withheld(folder: str, file_id: str) -> Iterator[FiledRow]:
    groups, offset = _groups(folder), 0
    for row in _quarantined(folder, (*_EVIDENCE, *_TEXTS)):
        line = _withheld_line(row)
        evidence = {name: row[name] for name in _EVIDENCE}
        yield FiledRow(
            kind=Kind.WITHHELD,
            content_id=evidence.pop("id"),
            # The column is short, and many guards may have decided.
            judge=evidence.pop("decided_by")[:128],
            text_file=file_id,
            text_offset=offset,
            text_bytes=len(line) - 1,
            cluster=groups.get(row["row_number"], f"row-{row['row_number']}"),
            **evidence,
        )
        offset += len(line)


def _quarantined(folder: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """These columns of the withheld rows, in order."""
    for output, part in parts_of(folder):
        if part.startswith("quarantine/"):
            yield from output.table(part, columns).to_pylist()


def _withheld_line(row: Mapping[str, Any]) -> bytes:
    values = {"line": row["line"], "decision": row["decision"], "messages": json.loads(row["conversation"])}
    if row["messages"] != row["conversation"]:
        values["judged"] = json.loads(row["messages"])
    return json_line(values)


def _groups(folder: str) -> dict[int, str]:
    """The cluster of each near-duplicate among the sampled rows."""
    output, totals = Output(folder), Totals()
    for unit in load_manifest(output).units:
        totals.add(_state(output, unit).signals)
    return {number: f"near-{group[0]}" for group in clusters(totals.sketches) for number in group}


def _chosen(folder: str, sample: int, seed: str) -> Iterator[Chosen]:
    """Random kept rows, each equally likely."""
    output = Output(folder)
    manifest = load_manifest(output)
    kept = [(unit, number) for unit in manifest.units for number in _state(output, unit).kept_numbers()]
    drawn = random.Random(seed).sample(kept, min(sample, len(kept)))  # noqa: S311 - not a secret
    wanted: dict[str, set[int]] = {}
    for unit, number in drawn:
        wanted.setdefault(unit, set()).add(number)
    for unit, numbers in sorted(wanted.items()):
        for number, conversation in unit_rows(folder, manifest, unit):
            if number in numbers:
                messages = json.loads(messages_json(conversation))
                yield number, _source_line(manifest, unit, number), row_id(full_conversation(messages)), messages


def _sampled(chosen: list[Chosen], lines: list[bytes], file_id: str, teacher: str) -> Iterator[FiledRow]:
    offset = 0
    for (number, source_line, content_id, _), line in zip(chosen, lines, strict=True):
        yield FiledRow(
            kind=Kind.KEPT,
            row_number=number,
            line=source_line,
            content_id=content_id,
            decision="allow",
            reason="kept",
            text_file=file_id,
            text_offset=offset,
            text_bytes=len(line) - 1,
            cluster=f"row-{number}",
            teacher=teacher,
            judge="teacher",
        )
        offset += len(line)


def _source_line(manifest: Manifest, unit: str, number: int) -> int:
    return number - manifest.shape_of(unit).first_row


def _state(output: Output, unit: str) -> UnitState:
    return UnitState.from_json(output.read(f"{UNITS}/{unit}.json"))
