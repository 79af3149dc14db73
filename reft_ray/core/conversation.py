"""Chat rows as the method sees them: messages, their scorable parts, and labelled training examples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

ROLES = ("system", "developer", "user", "assistant", "tool")


class Label(StrEnum):
    """What a labelled prompt asks for."""

    HARMFUL = "harmful"
    HARMLESS = "harmless"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `trained` is False for assistant turns whose `weight` is 0: read, but not learned."""

    role: str
    content: str
    trained: bool = True


Conversation = tuple[Message, ...]


@dataclass(frozen=True, slots=True)
class Part:
    """A text that is scored on its own: `name` says where it stands, e.g. `messages[1].user`."""

    name: str
    text: str

    @property
    def role(self) -> str:
        """The role behind the name, e.g. `user`."""
        return self.name.rpartition(".")[2]


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
        Message(str(turn["role"]), _text(turn.get("content")), turn.get("weight", 1) != 0) for turn in messages
    )


def _text(content: object) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return str(content)


def parts(conversation: Conversation) -> list[Part]:
    """Every non-empty turn as a part of its own, in order; the whole dialogue is screened, not its last prompt."""
    return [
        Part(f"messages[{index}].{turn.role}", turn.content)
        for index, turn in enumerate(conversation)
        if turn.content.strip()
    ]


def text_hash(text: str) -> str:
    """SHA-256 of a text, hex: the identity under which identical texts are scored once."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def row_id(conversation: Conversation) -> str:
    """A content id that survives key order and white space outside strings: `row-` + 24 hex digits of SHA-256."""
    canonical = json.dumps(
        [(turn.role, turn.content, turn.trained) for turn in conversation], ensure_ascii=True, separators=(",", ":")
    )
    return "row-" + hashlib.sha256(canonical.encode()).hexdigest()[:24]
