"""Long texts in overlapping windows, each framed by the chat template as a prompt of its own.

Shape suffix: B texts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from reft_ray.core.batch import TokenizedExample
from reft_ray.core.conversation import chat
from reft_ray.hf.chat import ChatFormat

# Probes whose renderings share nothing but the template: what all of them begin (and end) with is constant.
_PROBES = ("a", "Z", "1", "\n", " x", "'", "é", "<", "中")
_LONGER_THAN = 0.99
_GRAIN = 16


@dataclass(frozen=True, slots=True)
class Windows:
    """Windows of at most `size` tokens that overlap by a quarter; `head` and `tail` are the template's constant ends.

    `most` bounds the windows of one text; what lies behind them is reported as truncated.
    """

    size: int
    head: tuple[int, ...]
    tail: tuple[int, ...]
    most: int = 512

    @classmethod
    def of(cls, chat_format: ChatFormat, size: int, most: int = 512) -> Windows:
        """Windows under a chat template."""
        prompts = [chat_format.prompt(chat(probe)) for probe in _PROBES]
        head = _shared(prompts)
        return cls(size, tuple(head), tuple(_shared([prompt[::-1] for prompt in prompts])[::-1]), most)

    def split(self, ids: list[int]) -> tuple[list[list[int]], bool]:
        """(windows of a templated prompt, whether a part of it lies behind the last one)."""
        if len(ids) <= self.size:
            return [ids], False
        head, tail = list(self.head), list(self.tail)
        body = ids[len(head) : len(ids) - len(tail)]
        room = max(1, self.size - len(head) - len(tail))
        step = max(1, room - room // 4)
        starts = list(range(0, max(1, len(body) - room + step), step))
        return [head + body[s : s + room] + tail for s in starts[: self.most]], len(starts) > self.most

    def split_all(self, prompts: Sequence[TokenizedExample]) -> tuple[list[TokenizedExample], Tensor]:
        """(windows of all prompts, for each the place of its prompt)."""
        pieces, owner = [], []
        for place, prompt in enumerate(prompts):
            for ids in self.split(prompt.prompt_only().ids)[0]:
                pieces.append(replace(prompt, ids=ids, trained=[False] * len(ids), prompt_end=len(ids) - 1))
                owner.append(place)
        return pieces, torch.tensor(owner)


def highest(score_W: Tensor, owner_W: Tensor, count: int) -> Tensor:
    """The highest score of each text's windows, [B]; a score that is no number stays one (it blocks)."""
    out = torch.full((count,), -math.inf, dtype=score_W.dtype)
    return out.scatter_reduce(0, owner_W, score_W, "amax")


def p99_length(prompts: Sequence[TokenizedExample]) -> int:
    """The window of a teacher: as long as 99 % of the prompts that it learns from, in whole sixteens of tokens.

    A text that is longer than what the teacher saw lies outside its training, and its harmful part is diluted.
    """
    lengths = sorted(row.prompt_end + 1 for row in prompts)
    return _GRAIN * math.ceil(lengths[int(_LONGER_THAN * (len(lengths) - 1))] / _GRAIN)


def _shared(rows: list[list[int]]) -> list[int]:
    shared = 0
    for column in zip(*rows, strict=False):
        if len(set(column)) > 1:
            break
        shared += 1
    # At least the last token must be left to run: it carries the feature.
    return rows[0][: min(shared, min(map(len, rows)) - 1)]
