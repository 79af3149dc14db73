"""Chat rows as the method sees them: messages, their scorable parts, and labelled training examples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import StrEnum

ROLES = ("system", "developer", "user", "assistant", "tool")
_CALL_KEYS = ("", "function", "custom", "name", "arguments", "input")
_KEY_CHARACTERS = 40
"""How much of a key stands in a part's name: keys are the client's, and as long as it likes."""
_IDENTIFIER_CHARACTERS = 64


class Label(StrEnum):
    """What a labelled prompt asks for."""

    HARMFUL = "harmful"
    HARMLESS = "harmless"


@dataclass(frozen=True, slots=True)
class Part:
    """A text that is scored on its own: `name` says where it stands, e.g. `messages[1].user`.

    A tool call stands behind its turn: `messages[2].assistant.tool_calls[0]`.
    """

    name: str
    text: str

    @property
    def role(self) -> str:
        """The role of the turn in which it stands, e.g. `user`."""
        return self.name.split(".")[1]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `trained` is False for assistant turns whose `weight` is 0: read, but not learned.

    `calls` are the turn's tool calls, named within it (`tool_calls[0]`, `function_call`), and its `other_texts` where
    they are asked for; they are scored, and no chat template renders them.
    """

    role: str
    content: str
    trained: bool = True
    calls: tuple[Part, ...] = ()


Conversation = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """A row of training data.

    A labelled prompt without an answer still takes part in the refusal feature and its regulariser;
    an answered one also in the cross entropy. `place` is where the row was read, e.g. `rows.jsonl:17`, for messages.
    """

    messages: Conversation
    label: Label | None = None
    source: str = ""
    place: str = field(default="", compare=False)

    @property
    def prompt(self) -> Conversation:
        """The turns before the last assistant answer, or all turns where there is none."""
        return self.messages[:-1] if self.answered else self.messages

    @property
    def answered(self) -> bool:
        """Whether the last turn is an assistant answer to learn."""
        return bool(self.messages) and self.messages[-1].role == "assistant"

    @property
    def response(self) -> str:
        """The last assistant answer, or an empty string."""
        return self.messages[-1].content if self.answered else ""


def chat(prompt: str, response: str | None = None, system: str | None = None) -> Conversation:
    """A one-turn conversation from plain strings."""
    turns = [] if system is None else [Message("system", system)]
    turns.append(Message("user", prompt))
    if response is not None:
        turns.append(Message("assistant", response))
    return tuple(turns)


def conversation_from(messages: Sequence[Mapping[str, object]]) -> Conversation:
    """Validated OpenAI chat messages -> Conversation; content parts of type text are joined by newlines."""
    return tuple(
        Message(str(turn["role"]), _text(turn.get("content")), turn.get("weight", 1) != 0, _calls(turn))
        for turn in messages
    )


def _text(content: object) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return str(content)


def _calls(turn: Mapping[str, object]) -> tuple[Part, ...]:
    """The tool calls of a turn, as much of them as is text; a value of another shape than OpenAI's is read as well."""
    called = turn.get("tool_calls")
    listed = called if isinstance(called, list) else [called]
    named = [(f"tool_calls[{index}]", call) for index, call in enumerate(listed)]
    named.append(("function_call", turn.get("function_call")))
    return tuple(Part(name, text) for name, call in named if call and (text := "\n".join(_leaves(call))).strip())


def tool_definitions(row: Mapping[str, object]) -> Conversation:
    """What a row says about its tools (`tools`, `functions`) as a turn that is read and not learned, or nothing."""
    text = "\n".join(_leaves([row.get("tools"), row.get("functions")]))
    return (Message("tool", text, trained=False),) if text.strip() else ()


def other_texts(values: Mapping[str, object], known: Container[str]) -> Iterator[Part]:
    """Each text of a row or turn under a key that is not `known`, named after its key; numbers and ids are none."""
    for key, value in values.items():
        if key in known or not isinstance(value, str | list | Mapping):
            continue
        if isinstance(value, str):
            text = "" if _identifies(key, value) else readable(value)
        else:
            text = "\n".join(_leaves(value, numbers=False))
        if text.strip():
            yield Part(readable(key[:_KEY_CHARACTERS]), text)


def _identifies(name: object, value: object) -> bool:
    """Whether an entry of a row, turn or call only tells it from others: a short ASCII word or a number.

    A longer word may be a sentence without its blanks, and other scripts have none.
    """
    if name not in ("id", "type", "index", "tool_call_id") or not isinstance(value, str | int | float | None):
        return False
    text = str(value)
    return len(text) <= _IDENTIFIER_CHARACTERS and text.isascii() and not any(map(str.isspace, text))


class _Entries(list[tuple[str, object]]):
    """What a JSON object says, in order; a dictionary would keep the last of the values under one key."""


def _leaves(call: object, numbers: bool = True) -> Iterator[str]:
    """The texts of a tool call or tool definition with the keys before them, a line each; its numbers where asked for.

    Arguments are JSON within JSON, whose escapes would hide words from a tokenizer, so they are read. Without
    recursion: what a client nests must not exhaust the stack.
    """
    pending: list[tuple[str, object]] = [("", call)]
    while pending:
        key, value = pending.pop()
        if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
            with suppress(ValueError, RecursionError):
                value = json.loads(value, object_pairs_hook=_Entries)
        if isinstance(value, Mapping | _Entries) and value:
            entries = value.items() if isinstance(value, Mapping) else value
            pending += reversed([(str(name), inner) for name, inner in entries if not _identifies(name, inner)])
        elif isinstance(value, list) and value:
            pending += [(key, inner) for inner in reversed(value)]
        elif not numbers and isinstance(value, int | float):
            continue
        elif value not in (None, "", {}, []):
            yield readable(f"{key}: {value}" if key else str(value))
        elif key not in _CALL_KEYS:
            # An argument without a value still says its name.
            yield readable(key)


def readable(text: str) -> str:
    """The text without lone surrogates, which JSON can carry and no tokenizer can read."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def parts(conversation: Conversation) -> list[Part]:
    """Every non-empty turn and every tool call as a part of its own, in order; the whole dialogue is screened, not
    its last prompt."""
    found = []
    for index, turn in enumerate(conversation):
        name = f"messages[{index}].{turn.role}"
        if turn.content.strip():
            found.append(Part(name, turn.content))
        found += [Part(f"{name}.{call.name}", call.text) for call in turn.calls]
    return found


def text_hash(text: str) -> str:
    """SHA-256 of a text, hex: the identity under which identical texts are scored once."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def row_id(conversation: Conversation) -> str:
    """A content id that survives key order and white space outside strings: `row-` + 24 hex digits of SHA-256."""
    turns = [
        (turn.role, turn.content, turn.trained, *((call.name, call.text) for call in turn.calls))
        for turn in conversation
    ]
    canonical = json.dumps(turns, ensure_ascii=True, separators=(",", ":"))
    return "row-" + hashlib.sha256(canonical.encode()).hexdigest()[:24]
