"""Row formats: how the keys of a row say what it means, and which option says it where they do not."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

from reft_ray.core.errors import UsageError
from reft_ray.rows.turns import DIALOGUES, SPEAKERS, Turn, json_or_text, openai_turn, role_of, tag_of, turns_in

Row = Mapping[str, Any]


class Format(StrEnum):
    """How the text of a row is laid out. `PROMPT` and `TEXT` (a text alone) have no answer: never detected in a
    dataset, only named."""

    CHAT = "chat"
    COMPLETION = "completion"
    RESPONSE = "response"
    ALPACA = "alpaca"
    SHAREGPT = "sharegpt"
    PREFERENCE = "preference"
    PROMPT = "prompt"
    TEXT = "text"


SIGNATURES: tuple[tuple[Format, frozenset[str]], ...] = (
    (Format.CHAT, frozenset({"messages"})),
    (Format.SHAREGPT, frozenset({"conversations"})),
    (Format.ALPACA, frozenset({"instruction", "output"})),
    (Format.COMPLETION, frozenset({"prompt", "completion"})),
    (Format.RESPONSE, frozenset({"prompt", "response"})),
    (Format.PREFERENCE, frozenset({"input", "preferred_output", "non_preferred_output"})),
    (Format.PREFERENCE, frozenset({"chosen", "rejected"})),
)
DIALOGUE = {Format.CHAT: "messages", Format.SHAREGPT: "conversations"}
"""The key of the turns in the formats that are one dialogue."""
PAIR_PROMPTS = ("prompt", "messages", "conversations", "question", "query", "instruction")
"""The keys under which a preference pair has its prompt; the first that has a value counts."""

_PROMPTS = ("question", "query", "instruction", "input", "problem", "user", "text", "context")
_ANSWERS = ("answer", "output", "response", "completion", "target", "solution", "assistant", "label")


def rename_columns(row: Row, columns: Mapping[str, str]) -> Row:
    """The row under our field names; `columns` maps our name to the file's, e.g. {"prompt": "question"}."""
    if not columns:
        return row
    taken = set(columns.values())
    kept = {name: value for name, value in row.items() if name not in taken and name not in columns}
    return kept | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}


def listed_turns(row: Row, columns: Mapping[str, str] | None = None) -> Row:
    """The row with every dialogue as a list of turns, as they are written but for the keys that `columns` names.

    Raises turns.RepeatedKeyError.
    """
    found: dict[str, Any] = {}
    if isinstance(history := row.get("history"), str):
        found["history"] = json_or_text(history) or []
    for key in DIALOGUES:
        value = row.get(key)
        if value is not None and (turns := turns_in(value)) is not None and (turns is not value or columns):
            found[key] = (
                [rename_columns(turn, columns) if isinstance(turn, dict) else turn for turn in turns]
                if columns
                else turns
            )
    return {**row, **found} if found else row


def openai_row(row: Row, speakers: Mapping[str, str] = SPEAKERS) -> Row:
    """A checked row with every dialogue as OpenAI messages; idempotent."""
    row = listed_turns(row)
    found: dict[str, list[Turn]] = {}
    for key in DIALOGUES:
        turns = row.get(key)
        if isinstance(turns, list) and any(_is_foreign(turn) for turn in turns):
            found[key] = [openai_turn(turn, speakers) if isinstance(turn, dict) else turn for turn in turns]
    return {**row, **found} if found else row


def _is_foreign(turn: object) -> bool:
    return (
        isinstance(turn, dict)
        and (turn.get("role") == "function" or "role" not in turn)
        and bool({"from", "role"} & turn.keys())
    )


def formats_of(row: Row, speakers: Mapping[str, str] = SPEAKERS) -> list[Format]:
    """Every format whose keys the row has, in a fixed order.

    A dialogue next to a preference pair that ends without an answer is the pair's prompt.
    """
    keys = row.keys()
    found = list(dict.fromkeys(fmt for fmt, needed in SIGNATURES if needed <= keys))
    if Format.PREFERENCE in found and len(found) > 1:
        found = [fmt for fmt in found if fmt not in DIALOGUE or _answered(row[DIALOGUE[fmt]], speakers)]
    return found


def _answered(value: object, speakers: Mapping[str, str]) -> bool:
    turns = turns_in(value)
    last = turns[-1] if turns else None
    if not isinstance(last, Mapping):
        return True
    speaker, _ = tag_of(last)
    return role_of(last.get(speaker), speakers) in ("assistant", None)


def detect(rows: Iterable[Row], name: str, speakers: Mapping[str, str] = SPEAKERS) -> Format:
    """The one format of these sample rows (with our column names).

    Raises UsageError when a row has two formats, when rows disagree, or when no row has a known format.
    """
    found: Format | None = None
    first: Row = {}
    for row in rows:
        candidates = formats_of(row, speakers)
        if found is not None and found not in candidates:
            candidates = [found, *candidates]
        if len(candidates) > 1:
            one, other = candidates[:2]
            raise UsageError(
                f"{name}: rows can be read as {one} or as {other}; name one: {option(fmt=one)}, or {option(fmt=other)}"
            )
        found = candidates[0] if candidates else found
        first = first or row
    if found is None:
        raise UsageError(
            f"{name}: no known row format; the columns are {printable(sorted(first)[:12])}; {_hint(first)}"
        )
    return found


def _hint(row: Row) -> str:
    """The option that would read a row of no known format."""
    for key, value in row.items():
        turns = value if isinstance(value, list) else turns_in(value)
        if turns and isinstance(turns[0], Mapping):
            named = turns[0].keys()
            dialogue = "messages" if "role" in named else "conversations"
            columns = {dialogue: key} if key != dialogue else {}
            if not {"role", "from"} & named:
                texts = [name for name, text in turns[0].items() if isinstance(text, str)]
                if len(texts) < 2:
                    continue
                speaker, text = sorted(texts, key=lambda name: len(turns[0][name]))[:2]
                columns |= {"from": speaker, "value": text}
            return f"map them with {option(columns=columns)}"
    prompt = next((key for key in _PROMPTS if isinstance(row.get(key), str)), None)
    answer = next((key for key in _ANSWERS if key != prompt and isinstance(row.get(key), str)), None)
    columns = {"prompt": prompt or "QUESTION", "response": answer or "ANSWER"}
    alone = f", or, for texts without an answer, {option(fmt=Format.TEXT)}" if "text" in row else ""
    return f"map them with {option(columns=columns)}{alone}"


def option(
    fmt: Format | None = None, columns: Mapping[str, str] | None = None, speakers: Mapping[str, str] | None = None
) -> str:
    """The option of the command and the field of a job that name a format, columns or speakers."""
    values: dict[str, Any] = {}
    flags = []
    if fmt:
        flags.append(f"--format {fmt}")
        values["format"] = str(fmt)
    if columns:
        flags += [f"--column {ours}={_name(theirs)}" for ours, theirs in columns.items()]
        values["columns"] = {ours: _name(theirs) for ours, theirs in columns.items()}
    if speakers:
        flags += [f"--speaker {_name(tag)}={role}" for tag, role in speakers.items()]
        values["speakers"] = {_name(tag): role for tag, role in speakers.items()}
    return f'{" ".join(flags)} (in a job: "reft": {json.dumps(values, ensure_ascii=False)})'


def _name(name: str) -> str:
    return printable([name[:40]])


def printable(names: Iterable[str]) -> str:
    """Column names for a one-line message: some databases cannot store text with a NUL."""
    return ", ".join(name if name.isprintable() else ascii(name) for name in names)
