"""Incremental detokenization: whole characters only, and no text that may still turn out to be a stop sequence."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from reft_ray.core.errors import ReftError


class TextStream:
    """The text of one completion, without special tokens and stop sequences. Raises ReftError for slow tokenizers."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ReftError(f"{type(tokenizer).__name__} is not a fast tokenizer: it cannot decode token by token")
        self._backend = backend
        self._decode = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._held = ""

    def push(self, token: int) -> tuple[str, bool]:
        """The text that is final after one more token, and whether a stop sequence was found."""
        self._held += self._decode.step(self._backend, token) or ""
        found = [start for start in (self._held.find(stop) for stop in self._stop) if start >= 0]
        end = min(found) if found else len(self._held) - _overlap(self._held, self._stop)
        text, self._held = self._held[:end], "" if found else self._held[end:]
        return text, bool(found)

    def flush(self) -> str:
        """The text held back, once no more tokens follow."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stops: Sequence[str]) -> int:
    """How many characters at the text's end may be the beginning of a stop sequence."""
    return max(
        (size for stop in stops for size in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:size])),
        default=0,
    )
