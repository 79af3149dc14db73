"""Token by token answers to several prompts at once: one batch on one adapter, a step at a time.

Shape suffixes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from reft_ray.core.completion import Piece, Sampling
from reft_ray.hf.chat import ChatFormat

_BROKEN = "\ufffd"
"""What a tokenizer writes for half of a character."""


@dataclass(slots=True)
class Answering:
    """One answer as it grows: its tokens, the text that was given out, and what is held back."""

    sampling: Sampling
    prompt_tokens: int
    generator: torch.Generator | None
    ids: list[int] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)
    told: int = 0
    told_tokens: int = 0
    finished: bool = False

    def add(self, token: int, chat: ChatFormat) -> Piece | None:
        """Take the next token; the piece that can be given out now, if any.

        Text that may still become a stop sequence, and half characters, are held back.
        """
        sampling = self.sampling
        ended = token in chat.stop_ids
        if not ended:
            self.ids.append(token)
            self.counts[token] += 1
        text = str(chat.tokenizer.decode(self.ids, skip_special_tokens=True))
        stops = [at for stop in sampling.stop if stop and (at := text.find(stop)) >= 0]
        if stops:
            return self._piece(text[: min(stops)], "stop")
        if ended:
            return self._piece(text, "stop")
        if len(self.ids) >= sampling.max_tokens:
            return self._piece(text, "length")
        safe = len(text) - _held_back(text, sampling.stop)
        return self._piece(text[:safe], None) if safe > self.told else None

    def _piece(self, text: str, reason: str | None) -> Piece:
        first = self.told_tokens == 0 and self.told == 0
        piece = Piece(
            text[self.told :],
            len(self.ids) - self.told_tokens,
            self.prompt_tokens if first else 0,
            reason,  # type: ignore[arg-type]
        )
        self.told, self.told_tokens = max(self.told, len(text)), len(self.ids)
        self.finished = reason is not None
        return piece


def _held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end may be the beginning of a stop sequence, or are half a character."""
    held = len(text) - len(text.rstrip(_BROKEN))
    for stop in stops:
        held = max(held, max((n for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0))
    return held


class DecodingBatch:
    """Rows that are answered together. `step` runs the model once and gives each living row its next token."""

    def __init__(self, prompts: Sequence[list[int]], samplings: Sequence[Sampling], chat: ChatFormat) -> None:
        self._chat = chat
        width = max(map(len, prompts))
        self._next_BT = torch.tensor([[chat.pad_id] * (width - len(ids)) + ids for ids in prompts])
        self._mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
        self._cache = DynamicCache()
        self.rows = [
            Answering(sampling, len(ids), _generator(sampling))
            for ids, sampling in zip(prompts, samplings, strict=True)
        ]

    @property
    def finished(self) -> bool:
        """Whether every row has ended."""
        return all(row.finished for row in self.rows)

    @torch.inference_mode()
    def step(self, model: nn.Module) -> list[Piece | None]:
        """One token for every row that has not ended; pieces by row, None where nothing can be told yet."""
        device = next(model.parameters()).device
        position_BT = (self._mask_BT.cumsum(1) - 1).clamp(min=0)[:, -self._next_BT.shape[1] :]
        out = model(
            input_ids=self._next_BT.to(device),
            attention_mask=self._mask_BT.to(device),
            position_ids=position_BT.to(device),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_BV = out.logits[:, -1].float().cpu()
        pieces: list[Piece | None] = []
        tokens = []
        for row, logits_V in zip(self.rows, logits_BV, strict=True):
            if row.finished:
                pieces.append(None)
                tokens.append(self._chat.pad_id)
                continue
            token = choose(logits_V, row)
            tokens.append(token)
            pieces.append(row.add(token, self._chat))
        self._next_BT = torch.tensor(tokens)[:, None]
        self._mask_BT = torch.cat([self._mask_BT, torch.ones(len(tokens), 1, dtype=torch.long)], dim=1)
        return pieces

    def drop(self, index: int) -> None:
        """Nobody reads this row any more."""
        self.rows[index].finished = True


def choose(logits_V: Tensor, row: Answering) -> int:
    """The next token of one row, as OpenAI documents penalties, temperature and nucleus sampling."""
    sampling = row.sampling
    if row.counts and (sampling.presence_penalty or sampling.frequency_penalty):
        logits_V = logits_V.clone()
        for token, count in row.counts.items():
            logits_V[token] -= sampling.presence_penalty + count * sampling.frequency_penalty
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    probability_V = torch.softmax(logits_V / sampling.temperature, dim=-1)
    if sampling.top_p < 1:
        sorted_V, order_V = probability_V.sort(descending=True)
        # The token that crosses the limit still belongs to the nucleus; the first always does.
        outside_V = sorted_V.cumsum(0) - sorted_V >= sampling.top_p
        outside_V[0] = False
        probability_V = probability_V.clone()
        probability_V[order_V[outside_V]] = 0
    return int(torch.multinomial(probability_V, 1, generator=row.generator))


def _generator(sampling: Sampling) -> torch.Generator | None:
    if sampling.seed is None:
        return None
    return torch.Generator().manual_seed(sampling.seed % 2**63)
