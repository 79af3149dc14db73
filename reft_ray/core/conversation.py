"""Conversations as the method reads them: messages, the parts that are scored, and labelled training examples."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

ROLES = ("system", "developer", "user", "assistant", "tool")


class Label(StrEnum):
    """What a labelled prompt asks for."""

    HARMFUL = "harmful"
    HARMLESS = "harmless"


@dataclass(frozen=True, slots=True)
class Part:
    """A text that is scored by itself; `name` is its place, e.g. `messages[1].user`.

    The name of a tool call starts with that of its turn: `messages[2].assistant.tool_calls[0]`.
    """

    name: str
    text: str

    @property
    def role(self) -> str:
        """The role of its turn, e.g. `user`."""
        return self.name.split(".")[1]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `trained` is False for assistant turns with `weight` 0, which are context and not a target.

    `calls` are the turn's tool calls (named `tool_calls[0]`, `function_call`) and, in a judged conversation, the texts
    under its other keys: what is scored of them. `extra` is what a chat template renders besides the content, as JSON:
    `tool_calls`, `function_call`, `tool_call_id`, `name`, `refusal`, `reasoning_content`; on the first turn `tools`,
    the definitions; on the last of a preference pair `rejected`, the messages of the dialogue that was not preferred.
    """

    role: str
    content: str
    trained: bool = True
    calls: tuple[Part, ...] = ()
    extra: str = ""

    @property
    def values(self) -> dict[str, Any]:
        """`extra`, parsed."""
        found: dict[str, Any] = json.loads(self.extra) if self.extra else {}
        return found


Conversation = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """A row of training data.

    A labelled prompt without an answer enters the refusal feature and its regulariser; with an answer it also enters
    the cross entropy. `place` says where the row was read, e.g. `rows.jsonl:17`, for error messages; `licence` is that
    of the source, for the model card; `category` that of a harmful prompt, for the release gate.
    """

    messages: Conversation
    label: Label | None = None
    source: str = ""
    place: str = field(default="", compare=False)
    licence: str = field(default="", compare=False)
    category: str = field(default="", compare=False)

    @property
    def prompt(self) -> Conversation:
        """The turns before the last assistant answer, or all turns where there is none."""
        return self.messages[:-1] if self.answered else self.messages

    @property
    def rejected(self) -> list[dict[str, Any]]:
        """Of a preference pair the messages of the dialogue that was not preferred; otherwise empty."""
        found: list[dict[str, Any]] = self.messages[-1].values.get("rejected", []) if self.messages else []
        return found

    @property
    def answered(self) -> bool:
        """Whether the last turn is an assistant answer."""
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


def parts(conversation: Conversation) -> list[Part]:
    """Every non-empty turn and every tool call, in order: the whole dialogue is screened, not only its last prompt."""
    found = []
    for index, turn in enumerate(conversation):
        name = f"messages[{index}].{turn.role}"
        if turn.content.strip():
            found.append(Part(name, turn.content))
        found += [Part(f"{name}.{call.name}", call.text) for call in turn.calls]
    return found


def text_hash(text: str) -> str:
    """SHA-256 of a text in hex, the key under which identical texts are scored once."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def row_id(conversation: Conversation) -> str:
    """A content id, independent of key order and white space outside strings: `row-` + 24 hex digits of SHA-256."""
    turns = [
        (turn.role, turn.content, turn.trained, *((call.name, call.text) for call in turn.calls))
        for turn in conversation
    ]
    canonical = json.dumps(turns, ensure_ascii=True, separators=(",", ":"))
    return "row-" + hashlib.sha256(canonical.encode()).hexdigest()[:24]
