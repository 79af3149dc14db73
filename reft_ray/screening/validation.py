"""Every error of a file, without a model: `reft-ray validate`; and a copy with the repairs that lose nothing."""

from __future__ import annotations

import codecs
import itertools
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from reft_ray.core.errors import UsageError
from reft_ray.rows.checks import Fault
from reft_ray.rows.first_bytes import HEAD_BYTES, is_utf16
from reft_ray.rows.format import Format
from reft_ray.rows.reader import RowReader
from reft_ray.rows.repair import repaired
from reft_ray.screening.columnar import json_elements
from reft_ray.screening.file_parsing import FileShape, shape_of, validated_rows
from reft_ray.screening.ranges import CHUNK, Limits, Range
from reft_ray.screening.reading import FilePlan, groups, json_lines, plan_files, read_bytes, read_units
from reft_ray.screening.sources import Container, Source, source_of

LineFaults = tuple[int, tuple[Fault, ...]]


@dataclass(slots=True)
class Validated:
    """The result over one file: rows, invalid ones, and how often each code occurs. Lines count from 1."""

    rows: int = 0
    invalid: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    size: int = 0
    format: Format | None = None


@dataclass(frozen=True, slots=True)
class _Work:
    """What a process needs to check a group of ranges."""

    plan: FilePlan
    shape: FileShape
    reader: RowReader


_AT_ONCE = 128
_work: _Work


def validate_source(
    source: Source,
    reader: RowReader,
    total: Validated,
    workers: int | None = None,
) -> Iterator[LineFaults]:
    """The faults of each invalid row, in order of lines, counted in `total`; `workers` defaults to the CPUs.

    The reader's format is detected where it has none. Raises UsageError for a file that cannot be read.
    """
    (plan,) = plan_files([source], Limits())
    shape = shape_of(plan, reader.format, reader.columns, reader.speakers)
    reader = reader.of_format(shape.format)
    total.size, total.format = source.size, shape.format
    pieces = groups(plan)
    count = min(len(pieces), workers or len(os.sched_getaffinity(0)))
    if count <= 1:
        _start(_Work(plan, shape, reader))
        results = map(_check, pieces)
        yield from _counted(results, total)
        return
    context = multiprocessing.get_context("fork")
    with context.Pool(count, _start, (_Work(plan, shape, reader),)) as pool:
        yield from _counted(pool.imap(_check, pieces), total)


def _counted(results: Iterator[tuple[int, list[LineFaults]]], total: Validated) -> Iterator[LineFaults]:
    for rows, found in results:
        total.rows += rows
        total.invalid += len(found)
        for line, faults in found:
            total.codes.update(fault.code for fault in faults)
            yield line, faults


def _start(work: _Work) -> None:
    global _work
    _work = work


def _check(ranges: Sequence[Range]) -> tuple[int, list[LineFaults]]:
    """(rows, the faulty ones) of some ranges."""
    plan, shape, reader = _work.plan, _work.shape, _work.reader
    seekable = shape.container is Container.JSONL and shape.compression is None
    if seekable and not any(unit.too_large for unit in ranges):
        lines = list(json_lines(read_bytes(plan, ranges), ranges[0].first_row))
        checked = [
            pair
            for start in range(0, len(lines), _AT_ONCE)
            if not reader.are_plain([raw for _, raw in lines[start : start + _AT_ONCE]])
            for pair in lines[start : start + _AT_ONCE]
        ]
        faulty = [(line, tuple(found)) for line, raw in checked if isinstance(found := reader.read_line(raw), list)]
        return len(lines), faulty
    rows, faulty = 0, []
    for unit in read_units(plan, ranges):
        for line, _, found in validated_rows(unit, shape, reader):
            rows += 1
            if isinstance(found, list):
                faulty.append((line, tuple(found)))
    return rows, faulty


def fix_file(path: Path, out: Path, encoding: str | None = None) -> Mapping[str, int]:
    """Write a repaired copy and count its repairs by name.

    Text becomes UTF-8 (from UTF-16, or from `encoding`), JSON arrays and indented rows become JSONL, and lines are
    repaired by `rows.repair`. Lines that cannot be repaired are copied as they are. Raises UsageError.
    """
    if out.exists():
        raise UsageError(f"{out}: exists already; name another file with --out")
    counts: Counter[str] = Counter()
    utf8 = out.with_name(f".{out.name}.utf8")
    try:
        _to_utf8(path, utf8, encoding, counts)
        source = source_of(str(utf8), path.name)
        if source.container.columnar:
            raise UsageError(f"{path}: {source.container} files cannot be repaired")
        with out.open("xb") as file:
            for line in _lines(source, counts):
                file.write(line)
    except LookupError:
        raise UsageError(f"--encoding {encoding}: there is no such encoding") from None
    finally:
        utf8.unlink(missing_ok=True)
    return counts


def _to_utf8(path: Path, out: Path, encoding: str | None, counts: Counter[str]) -> None:
    with path.open("rb") as file, out.open("wb") as copy:
        head = file.read(HEAD_BYTES)
        marked = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        if encoding is None and is_utf16(head):
            encoding = "utf-16" if marked else "utf-16-le" if head[1:2] == b"\x00" else "utf-16-be"
        decoder = codecs.getincrementaldecoder(encoding)() if encoding else None
        counts["encoding"] += decoder is not None
        for chunk in itertools.chain([head], iter(lambda: file.read(CHUNK), b"")):
            try:
                copy.write(decoder.decode(chunk).encode() if decoder else chunk)
            except UnicodeDecodeError as bad:
                raise UsageError(f"{path}: is not {encoding}: byte 0x{bad.object[bad.start]:02x}") from None


def _lines(source: Source, counts: Counter[str]) -> Iterator[bytes]:
    if source.container is Container.JSON:
        for element in json_elements(source, lenient=True):
            counts["layout"] += 1
            line, name = repaired(element) or (element, "")
            counts[name] += bool(name)
            yield b" ".join(line.split(b"\n")) + b"\n"
        return
    with source.stream() as stream:
        held = b""
        while chunk := bytes(stream.read(CHUNK)):
            *lines, held = (held + chunk).split(b"\n")
            for line in lines:
                yield _repaired_line(line, source, counts) + b"\n"
        if held:
            yield _repaired_line(held, source, counts) + b"\n"


def _repaired_line(line: bytes, source: Source, counts: Counter[str]) -> bytes:
    if source.container is Container.CSV or not line.strip():
        return line
    line, name = repaired(line.removeprefix(codecs.BOM_UTF8)) or (line, "")
    counts[name] += bool(name)
    return line
