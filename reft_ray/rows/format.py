"""Row formats: how the keys of a row say what it means, the conversation that is trained on and the text to judge."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from typing import Any

from reft_ray.core.conversation import Conversation, Message
from reft_ray.core.errors import UsageError
from reft_ray.rows.text import conversation_from, full_conversation, other_texts, other_turns, tool_definitions

Row = Mapping[str, Any]
Reader = Callable[[Sequence[Mapping[str, Any]]], Conversation]


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

_KEYS: Mapping[Format, frozenset[str]] = {
    Format.CHAT: frozenset({"messages"}),
    Format.COMPLETION: frozenset({"prompt", "completion"}),
    Format.RESPONSE: frozenset({"prompt", "response"}),
    Format.ALPACA: frozenset({"instruction", "input", "output", "system", "history"}),
    Format.SHAREGPT: frozenset({"conversations", "system"}),
    Format.PREFERENCE: frozenset({"input", "preferred_output", "non_preferred_output", "prompt", "chosen", "rejected"}),
    Format.PROMPT: frozenset({"prompt"}),
    Format.TEXT: frozenset({"text"}),
}
"""The keys that each format reads."""
_TOOLS = frozenset({"tools", "functions"})
_TRAINED_KEYS = frozenset().union(*_KEYS.values())
"""The keys under which trainers look for text; other columns describe the row."""

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


def rename_columns(row: Row, columns: Mapping[str, str]) -> Row:
    """The row under our field names; `columns` maps our name to the file's, e.g. {"prompt": "question"}."""
    if not columns:
        return row
    taken = set(columns.values())
    kept = {name: value for name, value in row.items() if name not in taken and name not in columns}
    return kept | {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}


def formats_of(row: Row) -> list[Format]:
    """Every format whose keys the row has, in a fixed order."""
    keys = row.keys()
    return list(dict.fromkeys(fmt for fmt, needed in SIGNATURES if needed <= keys))


def detect(rows: Iterable[Row], name: str) -> Format:
    """The one format of these sample rows (with our column names).

    Raises UsageError when a row has two formats, when rows disagree, or when no row has a known format.
    """
    found: Format | None = None
    keys: list[str] = []
    for row in rows:
        candidates = formats_of(row)
        if found is not None and found not in candidates:
            candidates = [found, *candidates]
        if len(candidates) > 1:
            one, other = candidates[:2]
            raise UsageError(f"{name}: rows can be read as {one} or as {other}; name one with --format")
        found = candidates[0] if candidates else found
        keys = keys or sorted(row)[:12]
    if found is None:
        raise UsageError(
            f"{name}: no known row format; the columns are {printable(keys) or 'unreadable'}; "
            f"map them with --column, e.g. --column prompt=question --column response=answer"
        )
    return found


def printable(names: Iterable[str]) -> str:
    """Column names for a one-line message: some databases cannot store text with a NUL."""
    return ", ".join(name if name.isprintable() else ascii(name) for name in names)


def conversation_of(row: Row, fmt: Format) -> Conversation:
    """What training reads of a valid row; of a preference pair the preferred answer."""
    return _laid_out(row, fmt, conversation_from)


def judged_text(row: Row, fmt: Format, every_key: bool = False) -> Conversation:
    """All text of a valid row that a model could learn, under the keys that some format reads (or under every key).

    The turns of `conversation_of` come first and keep their places, each with the texts under its other keys. Then
    follow the answer that is not preferred, tool definitions, and text that another format would read (unless a turn
    with the same thresholds or stricter ones has the same text).
    """
    turns = _laid_out(row, fmt, full_conversation)
    known = _KEYS[fmt] | _TOOLS
    sources = [row]
    rest: Conversation = ()
    if fmt is Format.PREFERENCE:
        turns = (*turns, *_answer(row, "non_preferred_output", "rejected", full_conversation))
        if "preferred_output" not in row:
            known = known - {"input"}
            rest = _turns(row["prompt"], "user", full_conversation) if row.get("prompt") is not None else ()
        elif isinstance(source := row.get("input"), Mapping):
            known = known - {"prompt"}
            sources.append(source)
            rest = other_turns(source, {"messages", *_TOOLS})
    tools = [turn for source in sources for turn in tool_definitions(source)]
    rest_of_row = row if every_key else {key: value for key, value in row.items() if key in _TRAINED_KEYS}
    rest = (*rest, *other_turns(rest_of_row, known))
    present = {turn.content for turn in turns if turn.role != "assistant"}
    return (*turns, *tools, *(turn for turn in rest if turn.calls or turn.content not in present))


def _laid_out(row: Row, fmt: Format, read: Reader) -> Conversation:
    match fmt:
        case Format.CHAT:
            return read(row["messages"])
        case Format.SHAREGPT:
            turns = [_sharegpt_turn(turn, full=read is full_conversation) for turn in row["conversations"]]
            return (Message("system", row["system"]), *turns) if row.get("system") else tuple(turns)
        case Format.ALPACA:
            return _alpaca(row)
        case Format.COMPLETION | Format.RESPONSE:
            return (*_turns(row["prompt"], "user", read), *_turns(row[fmt.value], "assistant", read))
        case Format.PREFERENCE:
            return (*_preference_prompt(row, read), *_answer(row, "preferred_output", "chosen", read))
        case Format.PROMPT | Format.TEXT:
            return _turns(row[fmt.value], "user", read)


def _turns(value: Any, role: str, read: Reader) -> Conversation:
    return (Message(role, value),) if isinstance(value, str) else read(value)


def _sharegpt_turn(turn: Mapping[str, Any], full: bool) -> Message:
    others = tuple(other_texts(turn, ("from", "value"))) if full else ()
    return Message(SHAREGPT_ROLES[turn["from"]], turn["value"], calls=others)


def _alpaca(row: Row) -> Conversation:
    turns = [Message("system", row["system"])] if row.get("system") else []
    for question, answer in row.get("history") or ():
        turns += [Message("user", question), Message("assistant", answer)]
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
