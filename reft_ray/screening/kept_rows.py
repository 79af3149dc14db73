"""The rows to train on: kept rows, and withheld rows that a reviewer approved, in row order."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pyarrow as pa

from reft_ray.core.conversation import Conversation
from reft_ray.core.errors import BlockedByPolicyError, ReftError
from reft_ray.rows.checks import Fault
from reft_ray.rows.reader import RowReader
from reft_ray.rows.text import messages_json
from reft_ray.screening import reviews
from reft_ray.screening.file_parsing import FileShape, parse_unit
from reft_ray.screening.manifest import Manifest, load_manifest
from reft_ray.screening.outputs import UNITS, Output, approved_name, kept_name
from reft_ray.screening.policy import Status, dataset_status
from reft_ray.screening.ranges import Limits
from reft_ray.screening.reading import plan_files, read_units
from reft_ray.screening.report import load_report
from reft_ray.screening.sources import display_name, find_sources
from reft_ray.screening.unit_state import UnitState

if TYPE_CHECKING:
    from ray.data import Dataset

KEPT = pa.schema(
    [pa.field("row_number", pa.int64(), nullable=False), pa.field("messages", pa.string(), nullable=False)]
)
"""One training row; `rows.text.read_messages` parses `messages`."""

READERS = 2
_WHOLE_PART = Limits(rows=1 << 31, bytes=1 << 31, row_bytes=1 << 31)


def kept_rows(out: str) -> Iterator[tuple[int, Conversation]]:
    """Training rows with their numbers, in order.

    Raises BlockedByPolicyError for a dataset that was refused or waits for review.
    """
    manifest = checked_manifest(out)
    approved = reviews.approved_conversations(out)
    kept = (row for unit in manifest.units for row in unit_rows(out, manifest, unit))
    return heapq.merge(kept, approved, key=lambda row: row[0])


def kept_count(out: str) -> int:
    """Number of rows in `kept_rows`."""
    return load_report(out).kept + reviews.Reviews(out).summary().approved


def kept_hash(folder: str) -> str:
    """SHA-256 over the bytes of the kept parts in unit order, each unit followed by its approved rows."""
    output, digest = Output(folder), hashlib.sha256()
    manifest, sizes = load_manifest(output), output.sizes("kept")
    for unit in manifest.units:
        for name in (kept_name(manifest.shape_of(unit), unit), approved_name(manifest.shape_of(unit), unit)):
            if name in sizes:
                digest.update(output.read(name))
    return digest.hexdigest()


def kept_dataset(out: str) -> Dataset:
    """Training rows as a Ray dataset with the schema KEPT, in row order.

    Raises BlockedByPolicyError for a dataset that was refused or waits for review, before reading rows.
    """
    import ray.data
    from ray.data import TaskPoolStrategy

    from reft_ray.local_ray import ensure_ray

    out = Output(out).uri
    manifest = checked_manifest(out)
    approved = dict(reviews.approved_conversations(out))
    ensure_ray()
    tasks = [{"unit": unit, "index": index} for index, unit in enumerate(manifest.units)]
    if not tasks:
        return ray.data.from_arrow(KEPT.empty_table())
    dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks))
    dataset.context.execution_options.preserve_order = True

    def rows(batch: pa.Table) -> Iterator[pa.Table]:
        for task in batch.to_pylist():
            first, last = manifest.spans[task["index"]]
            added = [(number, turns) for number, turns in approved.items() if first <= number <= last]
            found = sorted([*unit_rows(out, manifest, task["unit"]), *added], key=lambda row: row[0])
            yield pa.table([[number for number, _ in found], [messages_json(turns) for _, turns in found]], schema=KEPT)

    # No CPU slot: a trainer may hold all of them while it waits for these rows.
    return dataset.map_batches(
        rows, batch_size=1, batch_format="pyarrow", num_cpus=0, compute=TaskPoolStrategy(READERS)
    )


def checked_manifest(out: str) -> Manifest:
    """The manifest of a screening whose dataset passed. Raises BlockedByPolicyError."""
    report = load_report(out)
    done = reviews.Reviews(out).summary()
    now = dataset_status(report.counts, report.policy, report.max_reject_ratio, done.approved, done.rejected)
    if now.status is not Status.PASSED:
        raise BlockedByPolicyError(f"{display_name(out)}: {now.reason}")
    return load_manifest(Output(out))


def unit_rows(out: str, manifest: Manifest, unit_id: str) -> list[tuple[int, Conversation]]:
    """The kept rows of one unit."""
    output = Output(out)
    state = UnitState.from_json(output.read(f"{UNITS}/{unit_id}.json"))
    numbers = state.kept_numbers()
    if not numbers:
        return []
    shape = manifest.shapes[state.file]
    name = kept_name(shape, unit_id)
    rows = _rows_in(output.uri_of(name), shape)
    if len(rows) != len(numbers):
        raise ReftError(f"{name}: {len(rows)} rows instead of {len(numbers)} kept ones; screen into a new directory")
    reader = RowReader(shape.format, manifest.columns, speakers=manifest.speakers)
    found = []
    for number, row in zip(numbers, rows, strict=True):
        if isinstance(read := reader.read(row), list):
            raise ReftError(f"{name}: row {number} can no longer be read ({read[0]}); screen into a new directory")
        found.append((number, read.conversation))
    return found


def _rows_in(path: str, shape: FileShape) -> list[dict[str, object]]:
    (source,) = find_sources([path], shape.container)
    (plan,) = plan_files([source], _WHOLE_PART)
    parsed = [
        row
        for unit in read_units(plan, plan.cuts.ranges)
        for row in parse_unit(unit, shape.container, plan.cuts.header)
    ]
    return [dict(row) for row in parsed if not isinstance(row, Fault)]
