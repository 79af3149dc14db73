"""The conversation in a row that is trained on, and all of its text that the filter judges."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from reft_ray.core.conversation import Conversation, Message
from reft_ray.rows.format import DIALOGUE, PAIR_PROMPTS, Format, Row, openai_row
from reft_ray.rows.text import (
    conversation_from,
    full_conversation,
    other_turns,
    tool_definitions,
    with_rejected,
    with_tools,
)
from reft_ray.rows.turns import DIALOGUES

Reader = Callable[[Sequence[Mapping[str, Any]]], Conversation]

_PAIR = frozenset({"preferred_output", "non_preferred_output", "chosen", "rejected", "system"})
_KEYS: Mapping[Format, frozenset[str]] = {
    Format.CHAT: frozenset({"messages", "system"}),
    Format.COMPLETION: frozenset({"prompt", "completion", "system"}),
    Format.RESPONSE: frozenset({"prompt", "response", "system"}),
    Format.ALPACA: frozenset({"instruction", "input", "output", "system", "history"}),
    Format.SHAREGPT: frozenset({"conversations", "system"}),
    Format.PREFERENCE: _PAIR,
    Format.PROMPT: frozenset({"prompt", "system"}),
    Format.TEXT: frozenset({"text", "system"}),
}
"""The keys that each format reads; a preference pair reads its prompt as well."""
_TOOLS = frozenset({"tools", "functions"})
_TRAINED_KEYS = frozenset(
    {"query", "context", "contexts", "document", "documents", "passage", "passages", "answer", "answers", "target"}
    | {"solution", "problem", "thinking", "reasoning", "reasoning_content", "chat_template_kwargs"}
).union(DIALOGUES, *_KEYS.values())
"""The keys under which trainers and chat templates look for text; other columns describe the row."""


def conversation_of(row: Row, fmt: Format) -> Conversation:
    """What training reads of a valid row: its turns, with tool definitions and the other answer of a preference pair
    in `Message.extra`.

    An answer that its row calls undesirable (`label` or `kto_tag` false, as in KTO) is context and not a target.
    """
    return training_turns(openai_row(row), fmt)


def training_turns(row: Row, fmt: Format) -> Conversation:
    """`conversation_of` a row whose dialogues are OpenAI messages already."""
    turns = _laid_out(row, fmt, conversation_from)
    if fmt is Format.PREFERENCE:
        turns = with_rejected(turns, _laid_out(_other_pair(row), fmt, conversation_from))
    source = row.get("input")
    turns = with_tools(turns, source if fmt is Format.PREFERENCE and isinstance(source, Mapping) else row)
    if row.get("label") is False or row.get("kto_tag") is False:
        *others, last = turns
        return (*others, replace(last, trained=False))
    return turns


def judged_text(row: Row, fmt: Format, every_key: bool = False) -> Conversation:
    """All text of a valid row that a model could learn, under the keys that some format reads (or under every key).

    The turns of `conversation_of` come first and keep their places, each with the texts under its other keys. Then
    follow the answer that is not preferred, tool definitions, and text that another format would read (unless a turn
    with the same thresholds or stricter ones has the same text).
    """
    return judged_turns(openai_row(row), fmt, every_key)


def judged_turns(row: Row, fmt: Format, every_key: bool = False) -> Conversation:
    """`judged_text` of a row whose dialogues are OpenAI messages already."""
    turns = _laid_out(row, fmt, full_conversation)
    known = _KEYS[fmt] | _TOOLS
    sources = [row]
    rest: Conversation = ()
    if fmt is Format.PREFERENCE:
        turns = (*turns, *_answer(row, "non_preferred_output", "rejected", full_conversation))
        if "preferred_output" not in row:
            key = prompt_key(row)
            known = known | ({key, "input"} if key == "instruction" else {key})
            if key and _holds_prompt(row):
                rest = _pair_prompt(row, key, full_conversation)
        elif isinstance(source := row.get("input"), Mapping):
            known = known | {"input"}
            sources.append(source)
            rest = other_turns(source, {"messages", *_TOOLS})
    tools = [turn for source in sources for turn in tool_definitions(source)]
    rest_of_row = row if every_key else {key: value for key, value in row.items() if key in _TRAINED_KEYS}
    rest = (*rest, *other_turns(rest_of_row, known))
    present = {turn.content for turn in turns if turn.role != "assistant"}
    others = (turn for turn in rest if turn.calls or turn.content not in present)
    return (*turns, *tools, *others)


def prompt_key(row: Row) -> str:
    """The key of a pair's prompt; empty where there is none."""
    return next((key for key in PAIR_PROMPTS if row.get(key)), "")


def _laid_out(row: Row, fmt: Format, read: Reader) -> Conversation:
    turns = _turns_of(row, fmt, read)
    if row.get("system") and not any(turn.role in ("system", "developer") for turn in turns):
        return (Message("system", row["system"]), *turns)
    return turns


def _turns_of(row: Row, fmt: Format, read: Reader) -> Conversation:
    match fmt:
        case Format.CHAT | Format.SHAREGPT:
            return read(row[DIALOGUE[fmt]])
        case Format.ALPACA:
            return _alpaca(row)
        case Format.COMPLETION | Format.RESPONSE:
            return (*_turns(row["prompt"], "user", read), *_turns(row[fmt.value], "assistant", read))
        case Format.PREFERENCE:
            return (*_preference_prompt(row, read), *_answer(row, "preferred_output", "chosen", read))
        case Format.PROMPT | Format.TEXT:
            return _turns(row[fmt.value], "user", read)


def _turns(value: Any, role: str, read: Reader) -> Conversation:
    return read([{"role": role, "content": value}] if isinstance(value, str) else value)


def _alpaca(row: Row) -> Conversation:
    turns = []
    for question, answer in row.get("history") or ():
        turns += [Message("user", question), Message("assistant", answer)]
    return (*turns, Message("user", _instruction(row)), Message("assistant", row["output"]))


def _instruction(row: Row) -> str:
    return f"{row['instruction']}\n\n{row['input']}" if row.get("input") else str(row["instruction"])


def _preference_prompt(row: Row, read: Reader) -> Conversation:
    if "preferred_output" in row:
        source = row["input"]
        return read(source["messages"]) if isinstance(source, Mapping) else _turns(source, "user", read)
    key = prompt_key(row)
    return _pair_prompt(row, key, read) if key and not _holds_prompt(row) else ()


def _pair_prompt(row: Row, key: str, read: Reader) -> Conversation:
    return _turns(_instruction(row) if key == "instruction" else row[key], "user", read)


def _holds_prompt(row: Row) -> bool:
    """Whether `chosen` and `rejected` are whole dialogues that repeat the prompt, as in UltraFeedback."""
    return holds_prompt(row.get("chosen"))


def holds_prompt(answer: object) -> bool:
    """Whether the answer of a pair, as OpenAI messages, begins with its prompt."""
    return isinstance(answer, list) and bool(answer) and answer[0].get("role") != "assistant"


def _other_pair(row: Row) -> Row:
    """The pair with its two answers exchanged."""
    names = ("preferred_output", "non_preferred_output") if "preferred_output" in row else ("chosen", "rejected")
    return {**row, names[0]: row[names[1]], names[1]: row[names[0]]}


def _answer(row: Row, ours: str, theirs: str, read: Reader) -> Conversation:
    return _turns(row[ours] if ours in row else row[theirs], "assistant", read)
