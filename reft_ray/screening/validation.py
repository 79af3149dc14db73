"""Validation of rows: every error of a file, with line, path, hint and the codes of OpenAI's validator."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import orjson

from reft_ray.core.errors import UsageError
from reft_ray.screening.checks import CHECKS, Fault, media_faults
from reft_ray.screening.formats import Format, Row, detect, mapped

DETECTION_ROWS = 100
REPEATED_KEY = Fault("", "ambiguous_keys", "a dictionary has one key twice", "keep one value under each key")
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"(\s*:)?', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Problem:
    """One error: `line` counts from 1, `path` leads to the value inside the row (empty for the row itself)."""

    line: int
    path: str
    code: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        where = f"line {self.line}" + (f", {self.path}" if self.path else "")
        return f"{where}: {self.code}: {self.message}" + (f" (hint: {self.hint})" if self.hint else "")


class RowChecker:
    """Checks parsed rows of one format.

    `control_tokens` are strings that the base model's tokenizer turns into control tokens: inside text they would
    open or close a turn during training.
    """

    def __init__(self, fmt: Format, columns: Mapping[str, str] | None = None, control_tokens: Iterable[str] = ()):
        self.format = fmt
        self.columns = dict(columns or {})
        self._check = CHECKS[fmt]
        tokens = sorted(filter(None, set(control_tokens)), key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, tokens))) if tokens else None
        # Two bytes rule almost every row out; JSON escapes may hide a token, so rows with them are looked at in full.
        escapes = {b"\\u00" if all(map(str.isascii, tokens)) else b"\\u", b"\\/"}
        self._hints = tuple({token.encode()[:2] for token in tokens} | escapes) if tokens else ()

    def faults(self, row: Row, raw: bytes | None = None) -> list[Fault]:
        """Every fault of a parsed row; `raw` (its bytes in the file, if any) only speeds up the token search."""
        fields = mapped(row, self.columns)
        faults = self._check(fields) + media_faults(fields)
        if self._tokens is not None and (raw is None or any(hint in raw for hint in self._hints)):
            faults = faults + list(self._token_faults(self._tokens, fields))
        return faults

    @staticmethod
    def _token_faults(tokens: re.Pattern[str], row: Row) -> Iterable[Fault]:
        # Without recursion: what a customer nests must not exhaust the stack.
        pending: list[tuple[str, object]] = [("", row)]
        while pending:
            path, value = pending.pop()
            if isinstance(value, Mapping):
                pending += reversed([(f"{path}.{key}" if path else str(key), item) for key, item in value.items()])
            elif isinstance(value, list):
                pending += reversed([(f"{path}[{index}]", item) for index, item in enumerate(value)])
            elif isinstance(value, str) and (match := tokens.search(value)):
                yield Fault(
                    path,
                    "control_token",
                    f"text contains the control token {match.group()}",
                    "remove it: the chat template adds control tokens itself",
                )


def parse_row(raw: bytes) -> Row | Fault:
    """One JSONL line as a dictionary, or the fault that keeps it from being one."""
    try:
        row = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        return _unreadable(raw, error)
    if type(row) is not dict:
        return Fault("", "data_type", f"the line is a JSON {json_type(row)}, not a dictionary", 'write {"...": ...}')
    return REPEATED_KEY if repeats_key(raw, row) else row


def repeats_key(raw: bytes, value: object) -> bool:
    """Whether a dictionary in some JSON has a key twice, of which its `value` holds one; readers differ in which."""
    try:
        written = orjson.dumps(value)
    except orjson.JSONEncodeError:  # nested deeper than can be written
        return _keys_said(raw) != _keys_held(value)
    if b"\\" in raw and b"\\u0022" in raw:
        return _keys_said(raw) != _keys_held(value)
    # The fast way: what is lost took its quotes along.
    return raw.count(b'"') != written.count(b'"')


def _keys_said(raw: bytes) -> int:
    return sum(1 for string in _STRING.finditer(raw) if string[1])


def _keys_held(value: object) -> int:
    pending, held = [value], 0
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            held += len(value)
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    return held


def json_type(value: object) -> str:
    """The JSON name of a value's type."""
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "dictionary"}
    return names.get(type(value), "null")


def validate(
    raw: bytes,
    fmt: Format | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    control_tokens: Iterable[str] = (),
    first_line: int = 1,
    min_rows: int = 0,
    name: str = "file",
) -> list[Problem]:
    """Every problem of JSONL bytes, in line order; an empty list means that every row can be trained on.

    Without `fmt` the format is detected from the first rows (UsageError when ambiguous or unknown). Blank lines are
    skipped but counted; a byte-order mark and CRLF are accepted. `min_rows` asks for that many rows.
    """
    if raw.startswith(codecs.BOM_UTF8):
        raw = raw[len(codecs.BOM_UTF8) :]
    lines = raw.split(b"\n")
    checker = RowChecker(fmt or _detected(lines, columns or {}, name), columns, control_tokens)
    problems: list[Problem] = []
    rows = 0
    for number, line in enumerate(lines, start=first_line):
        if not line or line.isspace():
            continue
        rows += 1
        row = parse_row(line)
        faults = [row] if isinstance(row, Fault) else checker.faults(row, line)
        problems.extend(Problem(number, *fault) for fault in faults)
    if rows < min_rows:
        message = f"{rows} rows, and at least {min_rows} are needed"
        problems.append(Problem(first_line + len(lines) - 1, "", "too_few_examples", message, "add examples"))
    return problems


def control_tokens_of(tokenizer: Path) -> frozenset[str]:
    """The special tokens named in a `tokenizer.json` (the file, or the model directory that holds it)."""
    path = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
    try:
        added = json.loads(path.read_text(encoding="utf-8"))["added_tokens"]
        return frozenset(token["content"] for token in added if token.get("special"))
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path}: not a tokenizer.json with added_tokens ({type(error).__name__})") from error


def _detected(lines: list[bytes], columns: Mapping[str, str], name: str) -> Format:
    sample: list[Row] = []
    for line in lines:
        if len(sample) == DETECTION_ROWS:
            break
        if line and not isinstance(row := parse_row(line), Fault):
            sample.append(mapped(row, columns))
    return detect(sample, name)


def _unreadable(raw: bytes, error: orjson.JSONDecodeError) -> Fault:
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\x00" in raw[:64]:
        return Fault("", "invalid_utf8", "the line is not UTF-8 (it looks like UTF-16)", "save the file as UTF-8")
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as bad:
        return Fault("", "invalid_utf8", f"byte {bad.start} is not UTF-8", "save the file as UTF-8")
    message = f"not valid JSON at character {error.pos}: {error.msg.split(': line')[0]}"
    return Fault("", "invalid_json", message, "one JSON dictionary per line, without line breaks inside")
