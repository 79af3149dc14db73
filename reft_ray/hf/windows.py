"""Long texts as overlapping windows and single sentences, each framed by the chat template as a separate prompt.

Shape suffixes: B texts, W windows of all texts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from reft_ray.core.batch import TokenizedExample
from reft_ray.core.conversation import chat
from reft_ray.hf.chat import ChatFormat

# Prompts whose renderings share nothing but the template: their common beginning and end are its constant parts.
_PROBES = ("a", "Z", "1", "\n", " x", "'", "é", "<", "中")
_QUANTILE = 0.99
_MULTIPLE = 16
_SENTENCE_END = re.compile(r"[.!?。！？]['\"”’)\]]*\s*$|\n")
_LEAST_SENTENCE = 4
"""Tokens; a shorter sentence is read together with the next one."""


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of at most `size` tokens: some that overlap by a quarter, and each sentence that fits by itself.

    In the middle of a window a harmful sentence is diluted by those around it. `head` and `tail` are the template's
    constant ends, `ends_sentence` recognises a token. `most` bounds the windows of one text; the rest of the text is
    reported as truncated.
    """

    size: int
    head: tuple[int, ...]
    tail: tuple[int, ...]
    ends_sentence: Callable[[int], bool]
    most: int = 512

    @classmethod
    def of(cls, chat_format: ChatFormat, size: int, most: int = 512) -> Windows:
        """Windows under a chat template."""
        prompts = [chat_format.prompt(chat(probe)) for probe in _PROBES]
        head, tail = _common_prefix(prompts), _common_prefix([prompt[::-1] for prompt in prompts])[::-1]
        decode = chat_format.tokenizer.decode

        @cache
        def ends_sentence(token: int) -> bool:
            return _SENTENCE_END.search(str(decode([token]))) is not None

        return cls(size, tuple(head), tuple(tail), ends_sentence, most)

    def split(self, ids: list[int]) -> tuple[list[list[int]], bool]:
        """(windows of a templated prompt, whether a part of it comes after the last one)."""
        if len(ids) <= self.size:
            return [ids], False
        body = self._body(ids)
        spans = self._spans(body)
        return [[*self.head, *body[s:e], *self.tail] for s, e in spans[: self.most]], len(spans) > self.most

    def place(self, ids: list[int], window: int) -> tuple[list[int], list[int]]:
        """(tokens of the text before a window of `split`, tokens in it), without the template."""
        body = self._body(ids)
        start, end = self._spans(body)[window]
        return body[:start], body[start:end]

    def _spans(self, body: list[int]) -> list[tuple[int, int]]:
        """(start, end) of every window of a long text among its tokens, by their start."""
        width = max(1, self.size - len(self.head) - len(self.tail))
        step = max(1, width - width // 4)
        spans = {(start, min(start + width, len(body))) for start in range(0, max(1, len(body) - width + step), step)}
        start = 0
        for end in range(1, len(body) + 1):
            if end - start >= _LEAST_SENTENCE and (end == len(body) or self.ends_sentence(body[end - 1])):
                if end - start <= width:
                    spans.add((start, end))
                start = end
        return sorted(spans)

    def _body(self, ids: list[int]) -> list[int]:
        return ids[len(self.head) : len(ids) - len(self.tail)]

    def split_all(self, prompts: Sequence[TokenizedExample]) -> tuple[list[TokenizedExample], Tensor]:
        """(windows of all prompts, the index of each window's prompt [W])."""
        pieces, owner = [], []
        for index, prompt in enumerate(prompts):
            for ids in self.split(prompt.prompt_only().ids)[0]:
                pieces.append(replace(prompt, ids=ids, loss_mask=[False] * len(ids), last_prompt_index=len(ids) - 1))
                owner.append(index)
        return pieces, torch.tensor(owner)


def max_per_text(score_W: Tensor, owner_W: Tensor, count: int) -> Tensor:
    """The highest score of each text's windows, [B]; a NaN stays NaN."""
    out = torch.full((count,), -math.inf, dtype=score_W.dtype)
    return out.scatter_reduce(0, owner_W, score_W, "amax")


def p99_length(prompts: Sequence[TokenizedExample]) -> int:
    """The window of a teacher: the 99th percentile of its training prompts' lengths, rounded up to 16 tokens.

    A longer text is outside the teacher's training distribution, and its harmful part is diluted.
    """
    lengths = sorted(row.last_prompt_index + 1 for row in prompts)
    return _MULTIPLE * math.ceil(lengths[int(_QUANTILE * (len(lengths) - 1))] / _MULTIPLE)


def _common_prefix(rows: list[list[int]]) -> list[int]:
    shared = 0
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        shared += 1
    # At least the last token has to be run: it carries the feature.
    return rows[0][: min(shared, min(map(len, rows)) - 1)]
