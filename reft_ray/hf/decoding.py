"""Continuous batching: rows join and leave between two steps, and each step gives every row one token.

The cache is padded on the left, so that all rows write at the same place; a row that leaves takes its share along.

Shape suffixes: B rows, T tokens, C tokens in the cache, H heads, D width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from reft_ray.hf.sampling import Draw, choose
from reft_ray.hf.shared_base import SharedBase


@dataclass(slots=True, eq=False)
class Row:
    """A completion on its way: the prompt's ids, the adapter's key, and its tokens so far."""

    prompt: list[int]
    adapter: str | None
    draw: Draw


class DecodingBatch:
    """The rows that are being completed. Methods give one token per row, None where the model gave no numbers."""

    def __init__(self, base: SharedBase) -> None:
        self.base = base
        self.rows: list[Row] = []
        self._cache = DynamicCache()
        self._mask_BC = torch.zeros(0, 0, dtype=torch.long, device=base.device)

    @torch.inference_mode()
    def join(self, rows: Sequence[Row]) -> list[int | None]:
        """Read the prompts of new rows and take them in; their first tokens. When it raises nothing has changed."""
        width = max(len(row.prompt) for row in rows)
        pad_id, device = self.base.chat.pad_id, self.base.device
        ids_BT = torch.tensor([[pad_id] * (width - len(row.prompt)) + row.prompt for row in rows], device=device)
        mask_BT = torch.tensor([[0] * (width - len(row.prompt)) + [1] * len(row.prompt) for row in rows], device=device)
        positions_BT = (mask_BT.cumsum(dim=1) - 1).clamp_min(0)
        cache = DynamicCache()
        logits_BV = self.base.logits(ids_BT, mask_BT, positions_BT, cache, [row.adapter for row in rows])
        tokens = _recorded(rows, choose(logits_BV, [row.draw for row in rows]))
        self._take_in(cache, mask_BT)
        self.rows += rows
        return tokens

    @torch.inference_mode()
    def step(self) -> list[int | None]:
        """One more token for every row, in the order of `rows`."""
        last_B1 = torch.tensor([[row.draw.tokens[-1]] for row in self.rows], device=self.base.device)
        positions_B1 = self._mask_BC.sum(dim=1, keepdim=True)
        mask_BC = pad(self._mask_BC, (0, 1), value=1)
        logits_BV = self.base.logits(last_B1, mask_BC, positions_B1, self._cache, [row.adapter for row in self.rows])
        self._mask_BC = mask_BC
        return _recorded(self.rows, choose(logits_BV, [row.draw for row in self.rows]))

    @torch.inference_mode()
    def leave(self, rows: Sequence[Row]) -> None:
        """Let rows go, with the padding that nobody needs any more."""
        kept = [index for index, row in enumerate(self.rows) if row not in rows]
        self.rows = [self.rows[index] for index in kept]
        if not kept:
            self.clear()
            return
        index_B = torch.tensor(kept, device=self.base.device)
        self._mask_BC = self._mask_BC[index_B]
        first = int(self._mask_BC.any(dim=0).int().argmax())
        self._mask_BC = self._mask_BC[:, first:]
        self._cache = _mapped(self._cache, lambda states_BHCD: states_BHCD[index_B, :, first:])

    def clear(self) -> None:
        """Let all rows go."""
        self.rows = []
        self._cache = DynamicCache()
        self._mask_BC = self._mask_BC.new_zeros(0, 0)

    def _take_in(self, cache: DynamicCache, mask_BT: Tensor) -> None:
        if not self.rows:
            self._cache, self._mask_BC = cache, mask_BT
            return
        width = max(self._mask_BC.shape[1], mask_BT.shape[1])
        joined = DynamicCache()
        for (index, *ours), (_, *theirs) in zip(_states(self._cache), _states(cache), strict=True):
            keys, values = (
                torch.cat([pad(states, (0, 0, width - states.shape[2], 0)) for states in pair])
                for pair in zip(ours, theirs, strict=True)
            )
            joined.update(keys, values, index)
        masks = [pad(mask, (width - mask.shape[1], 0)) for mask in (self._mask_BC, mask_BT)]
        self._cache, self._mask_BC = joined, torch.cat(masks)


def _recorded(rows: Sequence[Row], tokens: list[int | None]) -> list[int | None]:
    for row, token in zip(rows, tokens, strict=True):
        # A row without a token has to leave; until then it needs one like the others.
        row.draw.tokens.append(0 if token is None else token)
    return tokens


def _mapped(cache: DynamicCache, change: Callable[[Tensor], Tensor]) -> DynamicCache:
    changed = DynamicCache()
    for index, keys, values in _states(cache):
        changed.update(change(keys), change(values), index)
    return changed


def _states(cache: DynamicCache) -> Iterator[tuple[int, Tensor, Tensor]]:
    """A layer's number, its keys [B, H, C, D] and its values; layers that read another layer's have none."""
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicLayer) and layer.is_initialized:
            assert layer.keys is not None
            assert layer.values is not None
            yield index, layer.keys, layer.values
