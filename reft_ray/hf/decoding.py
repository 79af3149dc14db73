"""Continuous batching: rows are added and removed between steps, and each step gives every row one token.

The cache is padded on the left, so that all rows write at the same position; removing a row frees its part.

Shape suffixes: B rows, T tokens, C tokens in the cache, H heads, D width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache

from reft_ray.hf.sampling import DecodingRow, next_tokens
from reft_ray.hf.shared_base import SharedBase


class DecodingBatch:
    """The rows being completed. Methods return one token per row, None where the model's logits are NaN."""

    def __init__(self, base: SharedBase) -> None:
        self.base = base
        self.rows: list[DecodingRow] = []
        self._cache = DynamicCache()
        self._mask_BC = torch.zeros(0, 0, dtype=torch.long, device=base.device)

    @torch.inference_mode()
    def add(self, rows: Sequence[DecodingRow]) -> list[int | None]:
        """Run the prompts of new rows and add them; their first tokens. Raises without changing the batch."""
        ids_BT, mask_BT = self.base.chat.pad_left([row.prompt for row in rows], self.base.device)
        positions_BT = (mask_BT.cumsum(dim=1) - 1).clamp_min(0)
        cache = DynamicCache()
        logits_BV = self.base.logits(ids_BT, mask_BT, positions_BT, cache, [row.adapter for row in rows])
        tokens = next_tokens(logits_BV, rows)
        if self.rows:
            width = max(self._mask_BC.shape[1], mask_BT.shape[1])
            cache = _merged(self._cache, cache, width)
            mask_BT = torch.cat([pad(mask, (width - mask.shape[1], 0)) for mask in (self._mask_BC, mask_BT)])
        self._cache, self._mask_BC = cache, mask_BT
        self.rows += rows
        return _appended(rows, tokens)

    @torch.inference_mode()
    def step(self) -> list[int | None]:
        """One more token for every row, in the order of `rows`."""
        last_B1 = torch.tensor([[row.tokens[-1]] for row in self.rows], device=self.base.device)
        positions_B1 = self._mask_BC.sum(dim=1, keepdim=True)
        mask_BC = pad(self._mask_BC, (0, 1), value=1)
        logits_BV = self.base.logits(last_B1, mask_BC, positions_B1, self._cache, [row.adapter for row in self.rows])
        self._mask_BC = mask_BC
        return _appended(self.rows, next_tokens(logits_BV, self.rows))

    @torch.inference_mode()
    def remove(self, rows: Sequence[DecodingRow]) -> None:
        """Remove rows, and the padding that only they needed."""
        kept = [index for index, row in enumerate(self.rows) if row not in rows]
        self.rows = [self.rows[index] for index in kept]
        if not kept:
            self.clear()
            return
        index_B = torch.tensor(kept, device=self.base.device)
        mask_BC = self._mask_BC[index_B]
        first = int(mask_BC.any(dim=0).int().argmax())
        self._mask_BC = mask_BC[:, first:]
        self._cache = _mapped(self._cache, lambda states_BHCD: states_BHCD[index_B, :, first:])

    def clear(self) -> None:
        """Remove all rows."""
        self.rows = []
        self._cache = DynamicCache()
        self._mask_BC = self._mask_BC.new_zeros(0, 0)


def _appended(rows: Sequence[DecodingRow], tokens: list[int | None]) -> list[int | None]:
    for row, token in zip(rows, tokens, strict=True):
        # A row without a token has to be removed; until then it needs one like the others.
        row.tokens.append(0 if token is None else token)
    return tokens


def _mapped(cache: DynamicCache, change: Callable[[Tensor], Tensor]) -> DynamicCache:
    """A cache of changed keys and values [B, H, C, D]."""
    return DynamicCache(tuple(None if s is None else change(s) for s in layer[:2]) for layer in cache)


def _merged(cache: DynamicCache, other: DynamicCache, width: int) -> DynamicCache:
    """The rows of two caches in one, padded on the left to `width` tokens."""

    def joined(pair: tuple[Tensor | None, Tensor | None]) -> Tensor | None:
        present = [pad(states, (0, 0, width - states.shape[2], 0)) for states in pair if states is not None]
        # Layers that read another layer's states hold none.
        return torch.cat(present) if present else None

    layers = zip(cache, other, strict=True)
    return DynamicCache(tuple(map(joined, zip(ours[:2], theirs[:2], strict=True))) for ours, theirs in layers)
