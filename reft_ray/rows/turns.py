"""The spellings of a dialogue: every one becomes a list of OpenAI messages.

| written as | by |
|---|---|
| `[{"role": ..., "content": ...}]` | OpenAI, TRL |
| `[{"from": ..., "value": ...}]` | ShareGPT, LLaMA-Factory, axolotl |
| one turn instead of a list | preference pairs of LLaMA-Factory |
| any of these as a JSON string | CSV files, columns of strings |
| `{"role": [...], "content": [...]}` | sequences of `datasets` |
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

Turn = Mapping[str, Any]

DIALOGUES = (
    "messages",
    "conversations",
    "prompt",
    "completion",
    "response",
    "question",
    "chosen",
    "rejected",
    "preferred_output",
    "non_preferred_output",
)
"""The keys under which a row may hold turns."""

_SPEAKERS = {
    "system": ("system", "developer"),
    "user": ("human", "user", "prompter"),
    "assistant": ("gpt", "assistant", "model", "bot", "chatgpt", "bing", "bard", "function_call", "tool_call"),
    "tool": ("observation", "tool", "function", "tool_response", "function_response", "ipython"),
}
SPEAKERS: Mapping[str, str] = {tag: role for role, tags in _SPEAKERS.items() for tag in tags}
"""The tags of LLaMA-Factory, axolotl and the datasets made for them, in lower case, and their roles."""


class RepeatedKeyError(ValueError):
    """Turns in a JSON string with one key twice, of which readers take different values."""


def turns_in(value: object) -> list[Any] | None:
    """The turns of a dialogue in any spelling, as they are written; None for a text or anything else.

    Raises RepeatedKeyError.
    """
    if isinstance(value, str):
        value = json_or_text(value)
        if not (_is_turn(value) or (isinstance(value, list) and value and all(map(_is_turn, value)))):
            return None
    if isinstance(value, list):
        return value
    if not isinstance(value, Mapping):
        return None
    columns = [item for item in value.values() if isinstance(item, list)]
    if {"role", "content"} <= value.keys() or {"from", "value"} <= value.keys():
        if len(columns) == len(value) and len({len(column) for column in columns}) == 1:
            return [dict(zip(value, cells, strict=True)) for cells in zip(*columns, strict=True)]
        return [value]
    return None


def json_or_text(text: str) -> object:
    """The list or dictionary that a text is the JSON of, or the text.

    Raises RepeatedKeyError.
    """
    if text[:1] not in "[{ \t\r\n" or text.lstrip()[:1] not in ("[", "{"):
        return text
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return text
    if repeats_key(text.encode(), value):
        raise RepeatedKeyError
    return value


def _is_turn(value: object) -> bool:
    return isinstance(value, dict) and bool({"role", "from"} & value.keys())


def tag_of(turn: Turn) -> tuple[str, str]:
    """The keys under which a turn has its speaker and its text."""
    return ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")


def role_of(tag: object, speakers: Mapping[str, str] = SPEAKERS) -> str | None:
    """The role of a ShareGPT speaker, in any case; None for an unknown one."""
    return (speakers.get(tag) or speakers.get(tag.lower())) if isinstance(tag, str) else None


def openai_turn(turn: Turn, speakers: Mapping[str, str] = SPEAKERS) -> Turn:
    """A checked turn as an OpenAI message. A ShareGPT turn that is a tool call in JSON becomes one of OpenAI's."""
    speaker, text = tag_of(turn)
    if speaker == "role":
        return {**turn, "role": "tool"} if turn["role"] == "function" else turn
    role, tag = str(role_of(turn["from"], speakers)), turn["from"]
    rest = {key: value for key, value in turn.items() if key not in (speaker, text)}
    calls = _calls_in(turn[text]) if role == "assistant" and "call" in tag.lower() else []
    if not calls:
        return {"role": role, "content": turn[text], **rest}
    return {"role": role, "content": "", "tool_calls": calls, **rest}


def _calls_in(text: object) -> list[dict[str, object]]:
    """The tool calls that a text consists of, e.g. `{"name": "ask", "arguments": {...}}`; none where it has other text.

    Escapes in the arguments are undone, as trainers undo them.
    """
    if not isinstance(text, str):
        return []
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return []
    calls: Sequence[Any] = value if isinstance(value, list) else [value]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        return []
    # A key twice: the judge reads both values from the text.
    if repeats_key(text.encode(), value):
        return []
    return [{"type": "function", "function": call} for call in calls]


_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"(\s*:)?', re.DOTALL)


def repeats_key(raw: bytes, value: object) -> bool:
    """Whether JSON (`raw`, parsed to `value`) has a key twice in one dictionary."""
    try:
        written = orjson.dumps(value)
    except orjson.JSONEncodeError:  # nested deeper than can be written
        return _keys_written(raw) != _keys_parsed(value)
    if b"\\" in raw and b"\\u0022" in raw:
        return _keys_written(raw) != _keys_parsed(value)
    # Faster: a lost entry also lost its quotes.
    return raw.count(b'"') != written.count(b'"')


def _keys_written(raw: bytes) -> int:
    return sum(1 for string in _STRING.finditer(raw) if string[1])


def _keys_parsed(value: object) -> int:
    pending, count = [value], 0
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            count += len(value)
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    return count
