"""The rows of uploaded files, in any format that screening reads, with every fault."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from reft_ray.core.conversation import Conversation, Example
from reft_ray.hf.control_tokens import special_tokens
from reft_ray.hf.loading import load_tokenizer
from reft_ray.jobs.run import JobRun
from reft_ray.rows.checks import Fault
from reft_ray.rows.format import Format
from reft_ray.rows.reader import RowReader
from reft_ray.screening.file_parsing import parse_unit, shape_of
from reft_ray.screening.ranges import Limits
from reft_ray.screening.reading import plan_files, read_units
from reft_ray.screening.sources import Source, source_of


@dataclass(frozen=True, slots=True)
class ReadRow:
    """One row: its line, and its faults or its conversation."""

    line: int
    faults: tuple[Fault, ...] = ()
    conversation: Conversation = ()


def uploaded(run: JobRun, file_id: str) -> Source:
    """An uploaded file under its owner's name. Raises UsageError where it cannot be read."""
    record = run.files.get(file_id, run.job.project_id)
    return source_of(run.files.uri(file_id, run.job.project_id), record.filename)


def read_rows(run: JobRun, file_id: str, base: str) -> Iterator[ReadRow]:
    """Every row of a file. Raises UsageError with the owner's file name if it cannot be read."""
    options = run.job.spec.options
    (plan,) = plan_files([uploaded(run, file_id)], Limits())
    wanted = Format(options.format) if options.format else None
    shape = shape_of(plan, wanted, options.columns, options.speakers)
    reader = RowReader(shape.format, options.columns, control_tokens(base), speakers=options.speakers)
    for unit in read_units(plan, plan.cuts.ranges):
        lines, raws = unit.rows["row_number"].to_pylist(), unit.rows["raw"].to_pylist()
        for line, raw, row in zip(lines, raws, parse_unit(unit, shape.container, shape.header), strict=True):
            found = [row] if isinstance(row, Fault) else reader.read(row, raw)
            if isinstance(found, list):
                yield ReadRow(line, tuple(found))
            else:
                yield ReadRow(line, conversation=found.conversation)


def answered_examples(run: JobRun, file_id: str | None, base: str) -> Iterator[Example]:
    """The rows of a file that have an answer; none without a file."""
    for row in read_rows(run, file_id, base) if file_id else ():
        if row.conversation and (example := Example(row.conversation)).answered:
            yield example


def control_tokens(base: str) -> frozenset[str]:
    """Strings that the base model's tokenizer turns into control tokens."""
    return special_tokens(load_tokenizer(base))
