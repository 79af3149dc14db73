"""A guard that uses an OpenAI-compatible `/v1/moderations` endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from reft_ray.core.cascade import Opinion
from reft_ray.core.conversation import Conversation, parts
from reft_ray.core.errors import ReftError
from reft_ray.core.hazards import OPENAI_CATEGORIES
from reft_ray.core.verdict import finite
from reft_ray.evaluation.endpoint import Endpoint
from reft_ray.guards.taxonomy import opinion

BATCH_TEXTS = 32


class ModerationGuard:
    """Sends every part of a conversation to a moderation endpoint; the highest probability counts.

    `categories` restricts what counts as harm; the default is `flagged` and all scores.
    """

    def __init__(
        self, guard_id: str, endpoint: Endpoint, threshold: float = 0.5, categories: Sequence[str] = ()
    ) -> None:
        self.guard_id = guard_id
        self.threshold = threshold
        self._endpoint = endpoint
        self._categories = frozenset(categories)

    def opinions(self, conversations: Sequence[Conversation]) -> list[Opinion]:
        """One Opinion per conversation, in order; a conversation without text counts as harmful."""
        texts: dict[str, int] = {}
        rows = [
            [(part.name, texts.setdefault(part.text, len(texts))) for part in parts(turns)] for turns in conversations
        ]
        wanted = list(texts)
        found: list[tuple[float, tuple[str, ...]]] = []
        for start in range(0, len(wanted), BATCH_TEXTS):
            found += self._ask(wanted[start : start + BATCH_TEXTS])
        return [self._worst(row, found) for row in rows]

    def _worst(self, row: Sequence[tuple[str, int]], found: Sequence[tuple[float, tuple[str, ...]]]) -> Opinion:
        if not row:
            return Opinion(1.0)
        part, worst = max(row, key=lambda item: found[item[1]][0])
        labels = [label for _, index in row for label in found[index][1]]
        return opinion(found[worst][0], labels, {}, part)

    def _ask(self, texts: list[str]) -> list[tuple[float, tuple[str, ...]]]:
        results = self._endpoint.post("moderations", {"input": texts}).get("results")
        if not isinstance(results, list) or len(results) != len(texts):
            raise ReftError(f"guard {self.guard_id}: expected {len(texts)} results from {self._endpoint.url}")
        return [self._read(result) for result in results]

    def _read(self, result: Any) -> tuple[float, tuple[str, ...]]:
        """(probability, categories that are flagged or reach the threshold)."""
        try:
            scores = result.get("category_scores") or {}
            flags = result.get("categories") or {}
            counted = {
                name: finite(float(scores.get(name) or 0.0))
                for name in dict.fromkeys((*scores, *flags))
                if not self._categories or name in self._categories
            }
            flagged = bool(result["flagged"]) if not self._categories else any(flags.get(name) for name in counted)
        except (AttributeError, KeyError, TypeError, ValueError, ReftError) as error:
            raise ReftError(f"guard {self.guard_id}: a result without flagged and category_scores") from error
        labels = [name for name, score in counted.items() if flags.get(name) or score >= self.threshold]
        lowest = self.threshold if flagged else 0.0
        named = [name for name in labels if name in OPENAI_CATEGORIES]
        return min(1.0, max(lowest, *counted.values(), 0.0)), tuple(named or labels)
