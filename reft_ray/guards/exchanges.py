"""A conversation as guards read it: exchanges of one user and one assistant, each of them judged."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from reft_ray.core.conversation import Conversation, Message

OVERLAP = 200


@dataclass(frozen=True, slots=True)
class Exchange:
    """Turns that alternate and begin with the user, and the part that is judged, e.g. `messages[1].assistant`."""

    turns: Conversation
    part: str

    @property
    def response(self) -> str | None:
        """The last answer; None where the last turn is the user's."""
        return self.turns[-1].content if self.turns[-1].role == "assistant" else None

    @property
    def prompt(self) -> str:
        """All before the answer: the user's text, or after several turns the whole dialogue."""
        before = self.turns if self.response is None else self.turns[:-1]
        if len(before) == 1:
            return before[0].content
        return "\n".join(f"{turn.role}: {turn.content}" for turn in before)


def exchanges(conversation: Conversation, characters: int) -> list[Exchange]:
    """What to judge of a conversation: it up to each answer, and up to its end.

    Turns of the system and of tools count as the user's, tool calls as text of their turn: templates of guards know
    neither. An exchange of more than `characters` is judged in windows of each of its texts, as a user's.
    """
    found: list[Exchange] = []
    turns: list[Message] = []
    part = ""
    for index, turn in enumerate(conversation):
        text = "\n".join(filter(str.strip, [turn.content, *(call.text for call in turn.calls)]))
        if not text:
            continue
        role = "assistant" if turn.role == "assistant" else "user"
        if not turns and role == "assistant":
            # An answer without a question still needs a turn before it.
            turns.append(Message("user", "-"))
        if turns and turns[-1].role == role:
            turns[-1] = Message(role, f"{turns[-1].content}\n\n{text}")
        else:
            turns.append(Message(role, text))
        part = f"messages[{index}].{turn.role}"
        if role == "assistant":
            found.append(Exchange(tuple(turns), part))
    if turns and turns[-1].role == "user":
        found.append(Exchange(tuple(turns), part))
    return [piece for exchange in found for piece in _fitting(exchange, characters)]


def _fitting(exchange: Exchange, characters: int) -> Iterable[Exchange]:
    if sum(len(turn.content) for turn in exchange.turns) <= characters:
        return [exchange]
    return [
        Exchange((Message("user", text[start : start + characters]),), exchange.part)
        for text in (turn.content for turn in exchange.turns)
        for start in range(0, max(1, len(text) - OVERLAP), max(1, characters - OVERLAP))
    ]
