"""A bounded cache in front of any scorer: identical texts are scored once."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock

from reft_ray.core.scoring import Scorer, TextScore
from reft_ray.core.verdict import Calibration, Thresholds


class CachedScorer:
    """A Scorer that remembers the scores of the last `capacity` distinct texts.

    Only hashes are kept, never texts. Scores depend on the teacher: a new teacher needs a new cache.
    `hits` and `misses` count look-ups. Thread-safe.
    """

    def __init__(self, scorer: Scorer, capacity: int = 100_000) -> None:
        if capacity < 1:
            raise ValueError(f"a cache needs a capacity of at least one text, got capacity={capacity}")
        self._scorer = scorer
        self._capacity = capacity
        self._known: OrderedDict[bytes, TextScore] = OrderedDict()
        self._lock = Lock()
        self.hits = 0
        self.misses = 0

    @property
    def teacher_id(self) -> str:
        """The wrapped scorer's."""
        return self._scorer.teacher_id

    @property
    def thresholds(self) -> Thresholds:
        """The wrapped scorer's."""
        return self._scorer.thresholds

    @property
    def calibration(self) -> Calibration:
        """The wrapped scorer's."""
        return self._scorer.calibration

    @property
    def response_offset(self) -> float:
        """The wrapped scorer's."""
        return self._scorer.response_offset

    def score(self, texts: Sequence[str]) -> list[TextScore]:
        """One TextScore per text, in order; unknown texts go to the scorer in one call, each once."""
        keys = [hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest() for text in texts]
        found: dict[bytes, TextScore] = {}
        missing: dict[bytes, str] = {}
        with self._lock:
            for key, text in zip(keys, texts, strict=True):
                known = self._known.get(key)
                if known is None:
                    missing[key] = text
                else:
                    self._known.move_to_end(key)
                    found[key] = known
            self.hits += len(texts) - len(missing)
            self.misses += len(missing)
        if missing:
            fresh = dict(zip(missing, self._scorer.score(list(missing.values())), strict=True))
            found |= fresh
            with self._lock:
                self._known |= fresh
                while len(self._known) > self._capacity:
                    self._known.popitem(last=False)
        return [found[key] for key in keys]
