"""Validate the uploaded files: read every row, count tokens, report every fault."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import IO

from reft_ray.core.conversation import Conversation, Example
from reft_ray.core.errors import StoppedError, UsageError
from reft_ray.evaluation.task_accuracy import Match, comparable
from reft_ray.hf.loading import context_of
from reft_ray.hf.row_check import TemplateCheck
from reft_ray.jobs.content import CHUNK_BYTES
from reft_ray.jobs.lifecycle import INVALID_FILE
from reft_ray.jobs.results import Validation
from reft_ray.jobs.run import JobFailedError, JobRun
from reft_ray.pipeline.uploaded_rows import read_rows
from reft_ray.rows.checks import Fault

REPORT = "validation_report.jsonl"
FIRST_LINES = 10
MAX_INVALID_ROWS = 10_000
MAX_REPORT_BYTES = 16 << 20
MAX_SECONDS = 3600.0
"""Of reading the files of one job; a million rows of 400 tokens take minutes."""
_NO_NUMBER = Fault("messages", "no_number", "the answer has no number", "the release gate compares final numbers")


@dataclass(slots=True)
class _Tally:
    report: IO[bytes]
    rows: int = 0
    tokens: int = 0
    errors: int = 0
    too_long: int = 0
    first_lines: list[int] = field(default_factory=list)
    first_code: str | None = None
    first_fault: str | None = None
    started: float = field(default_factory=time.monotonic)

    @property
    def full(self) -> bool:
        """Whether there are more errors than a report holds."""
        return self.errors >= MAX_INVALID_ROWS or self.report.tell() > MAX_REPORT_BYTES

    def add_row(self) -> None:
        """Count a row. Raises UsageError when the time for reading is over."""
        self.rows += 1
        if self.rows % 256 == 0 and time.monotonic() - self.started > MAX_SECONDS:
            raise UsageError(f"{self.rows:,} rows were read in {MAX_SECONDS:,.0f} seconds, and more follow; split it")

    def add_faults(self, file: str, line: int, faults: tuple[Fault, ...]) -> None:
        self.errors += 1
        if self.first_code is None:
            self.first_code, self.first_fault = faults[0].code, f"line {line}: {faults[0]}"
        if len(self.first_lines) < FIRST_LINES:
            self.first_lines.append(line)
        for fault in faults:
            self.report.write(json.dumps({"file": file, "line": line, **fault._asdict()}).encode() + b"\n")


def validate_files(run: JobRun, base: str, min_rows: int, match: Match = Match.EXACT) -> Validation:
    """Check the training file and, if there is one, the validation file, whose answers must be ones to `match`.

    Raises JobFailedError for a file in an unknown format, or without a row that fits the model's context.
    """
    spec = run.job.spec
    count = partial(TemplateCheck(base).tokens, context=context_of(base))
    with tempfile.TemporaryFile() as report:
        tally = _Tally(report)
        _read(run, spec.training_file, "training_file", base, count, tally)
        training = Validation(tally.rows, tally.tokens)
        valid = training.rows - (tally.errors if spec.options.skip_invalid else 0)
        if valid < min_rows:
            message = f"{valid} examples, but at least {min_rows} are required"
            if spec.options.skip_invalid:
                raise JobFailedError(INVALID_FILE, f"The job failed due to an invalid training file: {message}.")
            tally.add_faults("training_file", training.rows, (Fault("", "too_few_examples", message, "add examples"),))
        if tally.too_long and not tally.errors:
            _report_too_long(run, tally.too_long, training.rows)
        if spec.validation_file is not None:
            _read(run, spec.validation_file, "validation_file", base, count, tally, match)
        file_id = run.save_file(REPORT, _chunks(report)) if tally.errors else None
    return Validation(
        # Errors of both files are counted against the rows of both.
        tally.rows if tally.errors else training.rows,
        training.tokens,
        tally.errors,
        tuple(tally.first_lines),
        tally.first_code,
        file_id,
        tally.first_fault,
    )


def _read(
    run: JobRun,
    file_id: str,
    name: str,
    base: str,
    count: Callable[[Conversation], int | Fault],
    tally: _Tally,
    match: Match = Match.EXACT,
) -> None:
    try:
        for row in read_rows(run, file_id, base):
            if tally.rows % 256 == 0 and run.should_stop():
                raise StoppedError("stop requested")
            if tally.full:
                if run.job.spec.options.skip_invalid:
                    raise UsageError(f"{tally.errors} invalid rows are too many to skip; fix them")
                message = f"{tally.errors} invalid rows; the rest of the file was not read"
                tally.add_faults(name, row.line, (Fault("", "too_many_errors", message, "fix these first"),))
                return
            tally.add_row()
            if row.faults:
                tally.add_faults(name, row.line, row.faults)
                continue
            example = Example(row.conversation)
            if example.answered and not comparable(match, example.response):
                tally.add_faults(name, row.line, (_NO_NUMBER,))
                continue
            tokens = count(row.conversation)
            if isinstance(tokens, Fault):
                tally.add_faults(name, row.line, (tokens,))
            else:
                tally.tokens += tokens
                tally.too_long += tokens == 0
    except UsageError as error:
        raise JobFailedError(INVALID_FILE, f"The job failed due to an invalid file. {error}", name) from None


def _report_too_long(run: JobRun, count: int, rows: int) -> None:
    if count == rows:
        message = "The prompt of every example fills the model's context."
        raise JobFailedError(
            INVALID_FILE, f"The job failed due to an invalid training file. {message}", "training_file"
        )
    run.event(
        f"{count} examples are longer than the model's context and will be left out of training",
        level="warn",
        data={"too_long": count},
        key="validate/too_long",
    )


def _chunks(report: IO[bytes]) -> Iterator[bytes]:
    report.seek(0)
    while chunk := report.read(CHUNK_BYTES):
        yield chunk
