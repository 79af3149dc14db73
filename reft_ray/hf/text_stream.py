"""Tokens become text as they come: whole characters only, and nothing that may yet turn out to be a stop sequence."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from reft_ray.core.errors import ReftError


class TextStream:
    """The text of one completion. Special tokens are not part of it, and neither are stop sequences."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ReftError(f"{type(tokenizer).__name__} is no fast tokenizer: it cannot decode token by token")
        self._backend = backend
        self._decode = DecodeStream(skip_special_tokens=True)
        self._stop = tuple(stop)
        self._held = ""

    def push(self, token: int) -> tuple[str, bool]:
        """The text that may be shown after one more token, and whether a stop sequence was met."""
        self._held += self._decode.step(self._backend, token) or ""
        met = [place for place in (self._held.find(stop) for stop in self._stop) if place >= 0]
        if met:
            shown, self._held = self._held[: min(met)], ""
            return shown, True
        kept = _overlap(self._held, self._stop)
        shown, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return shown, False

    def rest(self) -> str:
        """What was held back, once no token follows."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, stops: Sequence[str]) -> int:
    """How many characters at the text's end may be the beginning of a stop sequence."""
    return max(
        (size for stop in stops for size in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:size])),
        default=0,
    )
