"""The `moderation` option of a chat completion: the online filter on its input and output."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from reft_ray.api.chat_schema import InlineModeration, Mode
from reft_ray.api.errors import busy
from reft_ray.api.moderations import result
from reft_ray.api.moderator import Moderator, ModeratorError
from reft_ray.core.conversation import Conversation, Message

SECONDS = 10.0


@dataclass(slots=True)
class ChatModeration:
    """Moderates one request; with `asked` of None it moderates nothing."""

    moderator: Moderator
    asked: InlineModeration | None
    input: dict[str, Any] = field(default_factory=lambda: _results("", ()))
    output: dict[str, Any] = field(default_factory=lambda: _results("", ()))

    @property
    def holds_output(self) -> bool:
        """Whether the completion must be judged before any of it is sent."""
        return self.asked is not None and self.asked.sides.output.mode == "block"

    @property
    def body(self) -> dict[str, Any] | None:
        """The `moderation` object of the response."""
        return None if self.asked is None else {"input": self.input, "output": self.output}

    async def admit(self, conversation: Conversation) -> bool:
        """Judge the input; False when it is flagged and the policy blocks."""
        if self.asked is None:
            return True
        mode = self.asked.sides.input.mode
        self.input, flags = await self._judged([conversation], mode)
        return mode == "score" or not any(flags)

    async def passes(self, completions: Sequence[str]) -> list[bool]:
        """Judge the completions; False for each that is flagged and that the policy blocks. An empty one passes."""
        if self.asked is None:
            return [True] * len(completions)
        mode = self.asked.sides.output.mode
        indices = [index for index, text in enumerate(completions) if text.strip()]
        flags: list[bool] = []
        if indices:
            rows = [(Message("assistant", completions[index]),) for index in indices]
            self.output, flags = await self._judged(rows, mode)
        blocked = {index for index, flag in zip(indices, flags, strict=True) if flag and mode == "block"}
        return [index not in blocked for index in range(len(completions))]

    async def _judged(self, rows: Sequence[Conversation], mode: Mode) -> tuple[dict[str, Any], list[bool]]:
        try:
            batch = await self.moderator.judge(rows, None, time.monotonic() + SECONDS)
        except ModeratorError:
            if mode == "block":
                # Without a verdict nothing is allowed.
                raise busy("The filter gave no verdict and the policy blocks; try again.", 2, status=503) from None
            error = {"type": "error", "code": "moderation_unavailable", "message": "The filter gave no verdict."}
            return error, [False] * len(rows)
        results = [result(verdict, batch) for verdict in batch.verdicts]
        return _results(batch.teacher, results), [item["flagged"] for item in results]


def _results(model: str, results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    typed = [{"type": "moderation_result", "model": model, **item} for item in results]
    return {"type": "moderation_results", "model": model, "results": typed}
