"""Tokens that a client wants to train on, read as the dialogue that they are, so that they can be judged.

The client chooses the tokens: there may be no template, several learned turns, or targets that are not the tokens
that follow. All that is read or learned is in the dialogue. Text without a role is judged as a user's, which is
stricter than an assistant's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from reft_ray.core.conversation import Conversation, Message
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.control_tokens import special_tokens

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "model": "assistant",
    "tool": "tool",
}


@dataclass(frozen=True, slots=True)
class Dialogue:
    """A datum as turns. `spans` are the positions `[start, end)` of each turn's tokens; None for a turn of targets."""

    conversation: Conversation
    spans: tuple[tuple[int, int] | None, ...]


class DatumReader:
    """Reads tokens under one tokenizer."""

    def __init__(self, chat: ChatFormat) -> None:
        self._tokenizer = chat.tokenizer
        self._special = {
            identifier: text
            for text in special_tokens(chat.tokenizer)
            if isinstance(identifier := chat.tokenizer.convert_tokens_to_ids(text), int)
        }

    def text(self, ids: Sequence[int]) -> str:
        """The text of tokens, without control tokens."""
        return str(self._tokenizer.decode([token for token in ids if token not in self._special]))

    def dialogue(self, tokens: Sequence[int], targets: Sequence[int], learned: Sequence[bool]) -> Dialogue:
        """The dialogue of a datum: T tokens, the target at each position, and which targets are learned."""
        found = self._turns(tokens, targets, learned)
        turns = [Message(role, text) for role, text, _ in found]
        spans: list[tuple[int, int] | None] = [span for _, _, span in found]
        # What is learned where it is not what is read next: harmful targets under a harmless text.
        odd = [
            target
            for at, (target, wanted) in enumerate(zip(targets, learned, strict=True))
            if wanted and (at + 1 >= len(tokens) or tokens[at + 1] != target)
        ]
        # The last target of an ordinary row continues its last turn, which already has it.
        if len(odd) > (1 if learned and learned[-1] else 0):
            every = [target for target, wanted in zip(targets, learned, strict=True) if wanted]
            turns.append(Message("user", self.text(every)))
            spans.append(None)
        return Dialogue(tuple(turns), tuple(spans))

    def _turns(
        self, tokens: Sequence[int], targets: Sequence[int], learned: Sequence[bool]
    ) -> list[tuple[str, str, tuple[int, int]]]:
        """(role, text, positions) of each stretch between control tokens that has text."""
        sequence = [*tokens, targets[-1]] if learned and learned[-1] else list(tokens)
        segments: list[tuple[str | None, int, int]] = []
        role: str | None = None
        start = 0
        for at, token in enumerate([*sequence, None]):
            if token is not None and token not in self._special:
                continue
            if at > start:
                segments.append((role, start, at))
            role = None if token is None else _ROLES.get(self._special[token].strip("<|>_ ").lower())
            start = at + 1
        found: list[tuple[str | None, str, tuple[int, int]]] = []
        for role, start, end in segments:
            text = self.text(sequence[start:end])
            head, line, rest = text.partition("\n")
            if role is None and line and (named := _ROLES.get(head.strip().lower())) is not None:
                role, text = named, rest
            if text.strip():
                found.append((role, text, (start, min(end, len(tokens)))))
        if all(role is None for role, _, _ in found):
            return self._untemplated(sequence, len(tokens), learned)
        loose = [text for role, text, _ in found if role is None]
        turns = [(role or "user", text, span) for role, text, span in found]
        if len(loose) > 1:  # control tokens inside a text must not cut it into harmless pieces
            turns.append(("user", "".join(loose), (0, len(tokens))))
        return turns

    def _untemplated(
        self, sequence: Sequence[int], length: int, learned: Sequence[bool]
    ) -> list[tuple[str, str, tuple[int, int]]]:
        """A text without roles: what is read before the first learned token is the user's, the rest the answer."""
        first = next((at + 1 for at, wanted in enumerate(learned) if wanted), len(sequence))
        asked, answer = self.text(sequence[:first]), self.text(sequence[first:])
        if first <= 1 or not asked.strip():
            # No prompt: a text that is learned as a whole is judged as strictly as a prompt.
            return [("user", self.text(sequence), (0, length))] if self.text(sequence).strip() else []
        turns = [("user", asked, (0, min(first, length)))]
        return [*turns, ("assistant", answer, (min(first, length), length))] if answer.strip() else turns
