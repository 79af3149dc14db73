"""Uploaded files as rows: in any format that screening reads, with every fault, and how many tokens they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from reft_ray.core.conversation import Conversation, Example
from reft_ray.core.errors import PromptTooLongError, ReftError
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.loading import context_of, load_tokenizer
from reft_ray.jobs.run import JobRun
from reft_ray.rows.checks import Fault
from reft_ray.rows.reader import RowReader, control_tokens_of
from reft_ray.screening.file_parsing import parse_unit, shape_of
from reft_ray.screening.ranges import Limits
from reft_ray.screening.reading import plan_files, read_units
from reft_ray.screening.sources import COMPRESSIONS, SUFFIXES, Container, find_sources


@dataclass(frozen=True, slots=True)
class ReadRow:
    """One row: its line, and either what is wrong with it or the conversation in it."""

    line: int
    faults: tuple[Fault, ...] = ()
    conversation: Conversation = ()


def container_of(filename: str) -> Container | None:
    """What a file's name says about it; stored files have no names of their own."""
    path = Path(filename.lower())
    return SUFFIXES.get(Path(path.stem).suffix if path.suffix in COMPRESSIONS else path.suffix)


def textual(filename: str) -> Container | None:
    """The container to insist on: those that bytes alone do not tell."""
    named = container_of(filename)
    return named if named in (Container.JSONL, Container.CSV) else None


def read_rows(run: JobRun, file_id: str, base: str) -> Iterator[ReadRow]:
    """Every row of a file. Raises UsageError, which names the file as its owner does, when it cannot be read."""
    record = run.files.get(file_id, run.job.project_id)
    (source,) = find_sources([run.files.uri(file_id, run.job.project_id)], textual(record.filename))
    (plan,) = plan_files([replace(source, name=record.filename)], Limits())
    shape = shape_of(plan, None, {})
    reader = RowReader(shape.format, control_tokens=control_tokens(base))
    for unit in read_units(plan, plan.cuts.ranges):
        lines, raws = unit.rows["row_number"].to_pylist(), unit.rows["raw"].to_pylist()
        for line, raw, row in zip(lines, raws, parse_unit(unit, shape.container, shape.header), strict=True):
            found = [row] if isinstance(row, Fault) else reader.read(row, raw)
            if isinstance(found, list):
                yield ReadRow(line, tuple(found))
            else:
                yield ReadRow(line, conversation=found.conversation)


def answered_examples(run: JobRun, file_id: str | None, base: str) -> Iterator[Example]:
    """The rows of a file that have an answer; none where there is no file."""
    for row in read_rows(run, file_id, base) if file_id else ():
        if row.conversation and (example := Example(row.conversation)).answered:
            yield example


def control_tokens(base: str) -> frozenset[str]:
    """Strings that would open or close a turn in training. A base from the hub names them in its tokenizer."""
    if (Path(base) / "tokenizer.json").is_file():
        return control_tokens_of(Path(base))
    return frozenset(str(token) for token in load_tokenizer(base).all_special_tokens)


class TokenCounter:
    """Tokens of rows as training reads them."""

    def __init__(self, base: str) -> None:
        self._chat = ChatFormat(load_tokenizer(base))
        self._context = context_of(base)

    def count(self, row: ReadRow) -> int | Fault:
        """How many tokens a row has, cut at the context; 0 where its prompt leaves no room for an answer.

        A conversation that the chat template refuses is a fault.
        """
        try:
            return len(self._chat.encode(Example(row.conversation), max_tokens=self._context))
        except PromptTooLongError:
            return 0
        except ReftError as error:
            return Fault("", "chat_template", str(error).splitlines()[0])
