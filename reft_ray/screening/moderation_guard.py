"""A guard that uses an OpenAI-compatible `/v1/moderations` endpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import httpx

from reft_ray.api.http_retry import send
from reft_ray.core.conversation import Conversation, parts
from reft_ray.core.errors import ReftError, UsageError
from reft_ray.core.verdict import finite

TRIES = 4
BATCH_TEXTS = 32


class ModerationGuard:
    """Sends every part of a conversation to a moderation endpoint; the highest probability counts.

    `url` is the endpoint or its base (`http://host/v1`). The API key is read from the environment variable
    `key_variable`. `categories` restricts what counts as harm; the default is `flagged` and all scores. Overload and
    connection errors are retried with exponential backoff, then raise ReftError.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        threshold: float = 0.5,
        categories: Sequence[str] = (),
        key_variable: str = "REFT_GUARD_API_KEY",
        timeout: float = 30.0,
        pause: float = 0.5,
    ) -> None:
        if not 0.0 < threshold <= 1.0:
            raise UsageError(f"a guard's threshold must be in (0, 1], got {threshold}")
        base = url.rstrip("/")
        self._url = base if base.endswith("/moderations") else f"{base}/moderations"
        self._model = model
        self._categories = frozenset(categories)
        self._pause = pause
        self.threshold = threshold
        self.guard_id = f"moderations:{httpx.URL(self._url).host}" + (f"/{model}" if model else "")
        key = os.environ.get(key_variable)
        self._client = httpx.Client(timeout=timeout, headers={"Authorization": f"Bearer {key}"} if key else {})

    def probabilities(self, conversations: Sequence[Conversation]) -> list[float]:
        """One probability per conversation, in order; a conversation without text counts as harmful."""
        texts: dict[str, int] = {}
        rows = [[texts.setdefault(part.text, len(texts)) for part in parts(turns)] for turns in conversations]
        wanted = list(texts)
        scores: list[float] = []
        for start in range(0, len(wanted), BATCH_TEXTS):
            scores += self._ask(wanted[start : start + BATCH_TEXTS])
        return [max((scores[index] for index in row), default=1.0) for row in rows]

    def _ask(self, texts: list[str]) -> list[float]:
        body: dict[str, Any] = {"input": texts} | ({"model": self._model} if self._model else {})
        answer = self._post(body)
        results = answer.get("results") if isinstance(answer, dict) else None
        if not isinstance(results, list) or len(results) != len(texts):
            raise ReftError(f"guard {self.guard_id}: expected {len(texts)} results from {self._url}")
        return [self._probability(result) for result in results]

    def _probability(self, result: Any) -> float:
        try:
            scores = result.get("category_scores") or {}
            flags = result.get("categories") or {}
            counted = [name for name in {*scores, *flags} if not self._categories or name in self._categories]
            highest = max((finite(float(scores.get(name) or 0.0)) for name in counted), default=0.0)
            flagged = bool(result["flagged"]) if not self._categories else any(flags.get(name) for name in counted)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ReftError(f"guard {self.guard_id}: a result without flagged and category_scores") from error
        lowest = self.threshold if flagged else 0.0
        return min(1.0, max(lowest, highest))

    def _post(self, body: dict[str, Any]) -> Any:
        try:
            response = send(self._client, "POST", self._url, attempts=TRIES, pause=self._pause, json=body)
        except httpx.TransportError as error:
            raise self._failure(type(error).__name__) from None
        if response.status_code != 200:
            raise self._failure(f"HTTP {response.status_code}")
        try:
            return response.json()
        except ValueError:
            raise ReftError(f"guard {self.guard_id}: {self._url} did not answer with JSON") from None

    def _failure(self, problem: str) -> ReftError:
        return ReftError(
            f"guard {self.guard_id}: {self._url}: {problem}; fix the guard endpoint, then run again to resume"
        )
