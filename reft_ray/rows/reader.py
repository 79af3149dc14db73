"""The reader of rows: a line of JSON to a row with its conversation, or all its faults with OpenAI's codes."""

from __future__ import annotations

import codecs
import copy
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import orjson

from reft_ray.core.conversation import Conversation, parts
from reft_ray.core.errors import UsageError
from reft_ray.rows.checks import CHECKS, Fault, media_faults, plainly_valid
from reft_ray.rows.diagnosis import line_fault
from reft_ray.rows.format import Format, Row, detect, formats_of, listed_turns, openai_row, rename_columns
from reft_ray.rows.layout import judged_turns, training_turns
from reft_ray.rows.turns import SPEAKERS, RepeatedKeyError, repeats_key

DETECTION_ROWS = 100
REPEATED_KEY = Fault("", "ambiguous_keys", "a dictionary has one key twice", "keep one value under each key")
_NO_FORMAT = Fault("", "missing_messages_list", "no messages", "give messages, a prompt with an answer, or text")
_PLAIN_START = b'{"messages"'
_WRAP = 'write {"messages": [...]} or another dictionary on each line'
_NO_TEXT = Fault("", "missing_content", "the row has no text")
MAX_FAULTS = 20
"""Reported per row: one row may have a fault in each of a million turns."""
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class Problem:
    """A fault with its line, which counts from 1."""

    line: int
    path: str
    code: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        place = f"line {self.line}" + (f", {self.path}" if self.path else "")
        return f"{place}: {self.code}: {self.message}" + (f" (hint: {self.hint})" if self.hint else "")


@dataclass(frozen=True)
class ChatRow:
    """A valid row under our column names, its dialogues as OpenAI messages.

    `every_key`: texts under keys that no format reads are judged, too.
    """

    fields: Row
    format: Format
    every_key: bool = False

    @cached_property
    def conversation(self) -> Conversation:
        """What training reads."""
        return training_turns(self.fields, self.format)

    @cached_property
    def judged(self) -> Conversation:
        """What the filter judges."""
        return judged_turns(self.fields, self.format, self.every_key)


class RowReader:
    """Reads rows of one format or, without `fmt`, each row in the format of its keys.

    `control_tokens` are strings that the base model's tokenizer turns into control tokens: inside text they would
    open or close a turn during training. `judging` reads rows that are not trained on: prompts or texts
    (`{"text": ...}`) alone, turns with other keys, null for an absent value; every text in a row is judged.
    `speakers` are the roles of ShareGPT speakers beyond `turns.SPEAKERS`; `columns` names the keys of turns as well.
    """

    def __init__(
        self,
        fmt: Format | None = None,
        columns: Mapping[str, str] | None = None,
        control_tokens: Iterable[str] = (),
        judging: bool = False,
        speakers: Mapping[str, str] | None = None,
    ) -> None:
        self.format = fmt
        self.columns = dict(columns or {})
        self.speakers = {**SPEAKERS, **(speakers or {})}
        self.judging = judging
        self._plain = fmt is Format.CHAT and not (self.columns or judging)
        tokens = sorted(filter(None, set(control_tokens)), key=len, reverse=True)
        self._tokens = re.compile("|".join(map(re.escape, tokens))) if tokens else None
        # Two bytes rule almost every row out; JSON escapes may hide a token, so rows with them are searched in full.
        escapes = {b"\\u00" if all(map(str.isascii, tokens)) else b"\\u", b"\\/"}
        self._hints = tuple({token.encode()[:2] for token in tokens} | escapes) if tokens else ()

    def of_format(self, fmt: Format) -> RowReader:
        """This reader for rows of one format."""
        other = copy.copy(self)
        other.format = fmt
        other._plain = fmt is Format.CHAT and not (self.columns or self.judging)
        return other

    def read_line(self, raw: bytes) -> ChatRow | list[Fault]:
        """One line of JSONL as a row, or all its faults."""
        searched = self._tokens is not None and any(hint in raw for hint in self._hints)
        if self._plain and not searched and (found := _plain_chat(raw)) is not None:
            return found
        row = parse_row(raw, lone_surrogates=self.judging)
        return [row] if isinstance(row, Fault) else self.read(row, raw)

    def are_plain(self, lines: Sequence[bytes]) -> bool:
        """Whether all lines are valid rows of the most plain kind; False says nothing. Faster than one by one."""
        if not self._plain or not all(line.startswith(_PLAIN_START) and line.endswith(b"]}") for line in lines):
            return False
        # Every line opens a row: inside of another one, its key would not be that of a turn.
        text = b"[" + b",".join(lines) + b"]"
        if self._tokens is not None and any(hint in text for hint in self._hints):
            return False
        try:
            rows = orjson.loads(text)
        except orjson.JSONDecodeError:
            return False
        written = text.count(b'"') - (text.count(b'\\"') if b"\\" in text else 0)
        for row in rows:
            if type(row) is not dict or len(row) != 1 or not plainly_valid(turns := row.get("messages")):
                return False
            written -= 2 + 8 * len(turns)
        return written == 0 and len(rows) == len(lines)

    def read(self, row: Row, raw: bytes | None = None) -> ChatRow | list[Fault]:
        """A parsed row, or all its faults; `raw` (its bytes in the file, if any) only speeds up the token search."""
        fields = rename_columns(row, self.columns)
        if self.judging:
            fields = {key: value for key, value in fields.items() if value is not None}
        try:
            fields = listed_turns(fields, self.columns)
        except RepeatedKeyError:
            return [REPEATED_KEY]
        fmt = self.format or self._format_of(fields)
        if fmt is None:
            return [*media_faults(fields), _NO_FORMAT]
        faults = CHECKS[fmt](fields, self.judging, self.speakers) + media_faults(fields)
        if self._tokens is not None and (raw is None or any(hint in raw for hint in self._hints)):
            faults = faults + list(self._token_faults(self._tokens, fields))
        if faults:
            return faults if len(faults) <= MAX_FAULTS else [*faults[:MAX_FAULTS], _more_faults(len(faults))]
        found = ChatRow(openai_row(fields, self.speakers), fmt, every_key=self.judging)
        return [_NO_TEXT] if self.judging and not parts(found.judged) else found

    def _format_of(self, row: Row) -> Format | None:
        found = formats_of(row, self.speakers)
        if not self.judging:
            return found[0] if len(found) == 1 else None
        # The other formats' texts are judged as other keys of the row.
        alone = (fmt for fmt in (Format.PROMPT, Format.TEXT) if fmt.value in row)
        return next(iter(found), next(alone, None))

    @staticmethod
    def _token_faults(tokens: re.Pattern[str], row: Row) -> Iterable[Fault]:
        # Iterative: nesting by a client must not exhaust the stack.
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


def _plain_chat(raw: bytes) -> ChatRow | None:
    """The row on a line that is most plain: messages alone, of two texts each; None for any other."""
    try:
        row = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None
    if type(row) is not dict or len(row) != 1 or not plainly_valid(turns := row.get("messages")):
        return None
    # Four strings for each turn and the one key: more are written where a key is repeated.
    written = raw.count(b'"') - (raw.count(b'\\"') if b"\\" in raw else 0)
    return ChatRow(row, Format.CHAT) if written == 2 + 8 * len(turns) else None


def parse_row(raw: bytes, lone_surrogates: bool = False) -> Row | Fault:
    """One JSONL line as a dictionary, or its fault. `lone_surrogates` are refused, or replaced by `?`."""
    try:
        row = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        if not (lone_surrogates and _SURROGATE.search(raw)):
            return line_fault(raw, error)
        try:
            row = orjson.loads(json.dumps(json.loads(raw), ensure_ascii=False).encode("utf-8", "replace"))
        except (ValueError, RecursionError):
            return line_fault(raw, error)
    if type(row) is not dict:
        return Fault("", "data_type", f"the line is a JSON {_json_type(row)}, not a dictionary", _WRAP)
    return REPEATED_KEY if repeats_key(raw, row) else row


def _more_faults(count: int) -> Fault:
    return Fault("", "too_many_faults", f"{count - MAX_FAULTS} more faults in this row", "fix the first ones")


def _json_type(value: object) -> str:
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
    skipped but counted; a byte-order mark and CRLF are accepted. Fewer than `min_rows` rows are a problem.
    """
    if raw.startswith(codecs.BOM_UTF8):
        raw = raw[len(codecs.BOM_UTF8) :]
    lines = raw.split(b"\n")
    reader = RowReader(fmt or detect(sampled_rows(lines, columns or {}), name), columns, control_tokens)
    problems: list[Problem] = []
    rows = 0
    for number, line in enumerate(lines, start=first_line):
        if not line or line.isspace():
            continue
        rows += 1
        if isinstance(faults := reader.read_line(line), list):
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


def sampled_rows(lines: Iterable[bytes], columns: Mapping[str, str]) -> list[Row]:
    """The first readable rows, under our column names: as many as tell their format."""
    rows = (parse_row(line) for line in lines if line)
    readable = (rename_columns(row, columns) for row in rows if not isinstance(row, Fault))
    return list(itertools.islice(readable, DETECTION_ROWS))
