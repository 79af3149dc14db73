"""Row formats: what a row means, told from its keys, and the conversation that it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

import orjson

from reft_ray.core.conversation import Conversation, Message, conversation_from, other_texts, tool_definitions
from reft_ray.core.errors import UsageError
from reft_ray.core.row_texts import rest_of, turns_in_full

Row = Mapping[str, Any]
Reader = Callable[[Sequence[Mapping[str, Any]]], Conversation]


class Format(StrEnum):
    """How the text of a row is laid out. `PROMPT` (a prompt alone) is never detected, only named."""

    CHAT = "chat"
    COMPLETION = "completion"
    RESPONSE = "response"
    ALPACA = "alpaca"
    SHAREGPT = "sharegpt"
    PREFERENCE = "preference"
    PROMPT = "prompt"


SIGNATURES: tuple[tuple[Format, frozenset[str]], ...] = (
    (Format.CHAT, frozenset({"messages"})),
    (Format.SHAREGPT, frozenset({"conversations"})),
    (Format.ALPACA, frozenset({"instruction", "output"})),
    (Format.COMPLETION, frozenset({"prompt", "completion"})),
    (Format.RESPONSE, frozenset({"prompt", "response"})),
    (Format.PREFERENCE, frozenset({"input", "preferred_output", "non_preferred_output"})),
    (Format.PREFERENCE, frozenset({"chosen", "rejected"})),
)

_KEYS: Mapping[Format, frozenset[str]] = {
    Format.CHAT: frozenset({"messages"}),
    Format.COMPLETION: frozenset({"prompt", "completion"}),
    Format.RESPONSE: frozenset({"prompt", "response"}),
    Format.ALPACA: frozenset({"instruction", "input", "output", "system", "history"}),
    Format.SHAREGPT: frozenset({"conversations", "system"}),
    Format.PREFERENCE: frozenset({"input", "preferred_output", "non_preferred_output", "prompt", "chosen", "rejected"}),
    Format.PROMPT: frozenset({"prompt"}),
}
"""The keys that each format reads."""
_TOOLS = frozenset({"tools", "functions"})
_LEARNED = frozenset().union(*_KEYS.values(), {"text"})
"""Where trainers look for text; other columns describe the row."""
_NOT_FREE = frozenset({"role", "content", "weight", "tool_calls", "id", "type", "index", "tool_call_id"})
"""Keys of a message under which a text would not be read, or not as text."""

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


def mapped(row: Row, columns: Mapping[str, str]) -> Row:
    """The row under our field names; `columns` maps our name to the file's, e.g. {"prompt": "question"}."""
    if not columns:
        return row
    taken = set(columns.values())
    kept = {name: value for name, value in row.items() if name not in taken and name not in columns}
    return kept | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}


def readings_of(row: Row) -> list[Format]:
    """Every format whose keys the row has, in a fixed order."""
    keys = row.keys()
    return list(dict.fromkeys(fmt for fmt, needed in SIGNATURES if needed <= keys))


def detect(rows: Iterable[Row], name: str) -> Format:
    """The one format of these sample rows (already mapped).

    Raises UsageError when a row can be read in two ways, when rows disagree, or when no row fits.
    """
    found: Format | None = None
    keys: list[str] = []
    for row in rows:
        candidates = readings_of(row)
        if found is not None and found not in candidates:
            candidates = [found, *candidates]
        if len(candidates) > 1:
            one, other = candidates[:2]
            raise UsageError(f"{name}: rows can be read as {one} or as {other}; name one with --format")
        found = candidates[0] if candidates else found
        keys = keys or sorted(row)[:12]
    if found is None:
        raise UsageError(
            f"{name}: no known row format; the columns are {columns(keys) or 'unreadable'}; "
            f"map them with --column, e.g. --column prompt=question --column response=answer"
        )
    return found


def columns(names: Iterable[str]) -> str:
    """Names that users gave, for a message of one line: some databases store no text with a NUL."""
    return ", ".join(name if name.isprintable() else ascii(name) for name in names)


def conversation_of(row: Row, fmt: Format) -> Conversation:
    """What training reads of a valid row; of a preference pair the preferred answer."""
    return _laid_out(row, fmt, conversation_from)


def screened_of(row: Row, fmt: Format) -> Conversation:
    """All text of a valid row that a model could learn, under the keys that some format reads.

    Turns stand where `conversation_of` puts them, each with the texts under its other keys. What it leaves out follows
    after the last one: the answer that is not preferred, tool definitions, and text that another format would read
    (unless a turn with the same thresholds or stricter ones says the same).
    """
    turns = _laid_out(row, fmt, turns_in_full)
    known = _KEYS[fmt] | _TOOLS
    sources = [row]
    rest: Conversation = ()
    if fmt is Format.PREFERENCE:
        turns = (*turns, *_answer(row, "non_preferred_output", "rejected", turns_in_full))
        if "preferred_output" not in row:
            known = known - {"input"}
            rest = _turns(row["prompt"], "user", turns_in_full) if row.get("prompt") is not None else ()
        elif isinstance(source := row.get("input"), Mapping):
            known = known - {"prompt"}
            sources.append(source)
            rest = rest_of(source, {"messages", *_TOOLS})
    tools = [turn for source in sources for turn in tool_definitions(source)]
    rest = (*rest, *rest_of({key: value for key, value in row.items() if key in _LEARNED}, known))
    said = {turn.content for turn in turns if turn.role != "assistant"}
    return (*turns, *tools, *(turn for turn in rest if turn.calls or turn.content not in said))


def messages_json(conversation: Conversation) -> str:
    """A conversation as OpenAI messages in JSON; `conversation_from` reads it back."""
    return orjson.dumps([_message(turn) for turn in conversation]).decode()


def _message(turn: Message) -> dict[str, object]:
    values: dict[str, object] = {"role": turn.role, "content": turn.content}
    if not turn.trained:
        values["weight"] = 0
    unnamed = []
    for call in turn.calls:
        if call.name.startswith("tool_calls[") or call.name in values or call.name in _NOT_FREE:
            unnamed.append(call.text)
        else:
            values[call.name] = call.text
    return values | {"tool_calls": unnamed} if unnamed else values


def _laid_out(row: Row, fmt: Format, read: Reader) -> Conversation:
    match fmt:
        case Format.CHAT:
            return read(row["messages"])
        case Format.SHAREGPT:
            turns = [_spoken(turn, whole=read is turns_in_full) for turn in row["conversations"]]
            return (Message("system", row["system"]), *turns) if row.get("system") else tuple(turns)
        case Format.ALPACA:
            return _alpaca(row)
        case Format.COMPLETION:
            return (*_turns(row["prompt"], "user", read), *_turns(row["completion"], "assistant", read))
        case Format.RESPONSE:
            return (*_turns(row["prompt"], "user", read), *_turns(row["response"], "assistant", read))
        case Format.PREFERENCE:
            return (*_preference_prompt(row, read), *_answer(row, "preferred_output", "chosen", read))
        case Format.PROMPT:
            return _turns(row["prompt"], "user", read)


def _turns(value: Any, role: str, read: Reader) -> Conversation:
    return (Message(role, value),) if isinstance(value, str) else read(value)


def _spoken(turn: Mapping[str, Any], whole: bool) -> Message:
    others = tuple(other_texts(turn, ("from", "value"))) if whole else ()
    return Message(SHAREGPT_ROLES[turn["from"]], turn["value"], calls=others)


def _alpaca(row: Row) -> Conversation:
    turns = [Message("system", row["system"])] if row.get("system") else []
    for asked, answered in row.get("history") or ():
        turns += [Message("user", asked), Message("assistant", answered)]
    prompt = f"{row['instruction']}\n\n{row['input']}" if row.get("input") else row["instruction"]
    return (*turns, Message("user", prompt), Message("assistant", row["output"]))


def _preference_prompt(row: Row, read: Reader) -> Conversation:
    source = row.get("input") if "preferred_output" in row else row.get("prompt")
    if isinstance(source, Mapping):
        return read(source["messages"])
    if source is None or _holds_prompt(row):
        return ()
    return _turns(source, "user", read)


def _holds_prompt(row: Row) -> bool:
    """Whether `chosen` and `rejected` are whole dialogues that repeat the prompt, as in UltraFeedback."""
    chosen = row.get("chosen")
    return isinstance(chosen, list) and bool(chosen) and chosen[0].get("role") != "assistant"


def _answer(row: Row, ours: str, theirs: str, read: Reader) -> Conversation:
    return _turns(row[ours] if ours in row else row[theirs], "assistant", read)
