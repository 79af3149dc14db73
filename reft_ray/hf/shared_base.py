"""One base model in memory with a few adapters loaded on it; the least recently used is unloaded first.

Shape suffixes: B rows, T tokens, C tokens in the cache and new ones, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from reft_ray.core.errors import ReftError
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.loading import Base
from reft_ray.hf.lora import BASE_ROW, LoraSettings, attach, attach_saved, row_adapters
from reft_ray.hf.sampling import TokenScore, token_scores

_SCORED_TOKENS = 256
"""Tokens of a prompt whose logits are computed at a time."""
_RESIDENT = "resident"
"""An adapter without effect that is always loaded: PEFT cannot be left with none, nor undo a failed first one."""


class SharedBase:
    """Runs rows of several adapters in one forward pass: the base's products are shared, the low-rank ones are not.

    Not thread-safe. Raises ReftError for a model whose cache is not plain attention (state-space layers), whose rows
    could not be added to and removed from a running batch.
    """

    def __init__(self, base: Base, max_adapters: int = 8) -> None:
        self.chat = ChatFormat(base.tokenizer)
        self.context = base.context
        self.max_adapters = max_adapters
        self._model = attach(base.model, _RESIDENT, LoraSettings(rank=1)).requires_grad_(False).eval()
        self._active = _RESIDENT
        self._names: dict[str, str] = {}
        self._loaded = 0
        self._check_cache(base.name)

    @property
    def device(self) -> torch.device:
        """The device of the base."""
        return next(self._model.parameters()).device

    @property
    def adapters(self) -> list[str]:
        """The keys of the loaded adapters, least recently used first."""
        return list(self._names)

    def ensure_adapter(self, key: str, folder: Path, busy: Container[str | None] = ()) -> bool:
        """Load an adapter from its directory unless it is loaded; False if all others are `busy` and none may go.

        Raises ReftError if it does not fit this base.
        """
        if key in self._names:
            self._names[key] = self._names.pop(key)
            return True
        while len(self._names) >= self.max_adapters:
            idle = next((name for name in self._names if name not in busy), None)
            if idle is None:
                return False
            self._delete(self._names.pop(idle))
        self._loaded += 1
        # Not the key: PEFT puts the name into module paths, where a URI's dots and slashes are invalid.
        name = f"a{self._loaded}"
        try:
            self._model = attach_saved(self._model, name, folder)
        except (RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
            self._delete(name)
            raise ReftError(f"the adapter {key} does not fit this base model: {type(error).__name__}") from None
        finally:
            self._model.eval()
        self._active = self._names[key] = name
        return True

    @torch.inference_mode()
    def logits(
        self, ids_BT: Tensor, mask_BC: Tensor, positions_BT: Tensor, cache: DynamicCache, adapters: Sequence[str | None]
    ) -> Tensor:
        """Logits [B, V] after the last of `ids_BT`; `mask_BC` covers the cache and the new tokens."""
        return self._run(ids_BT, mask_BC, positions_BT, cache, adapters, 1)[:, -1]

    def _run(
        self,
        ids_BT: Tensor,
        mask_BC: Tensor,
        positions_BT: Tensor,
        cache: DynamicCache,
        adapters: Sequence[str | None],
        kept: int,
    ) -> Tensor:
        """Logits [B, kept, V] after the last `kept` of `ids_BT`."""
        names = [BASE_ROW if key is None else self._names[key] for key in adapters]
        mixing: AbstractContextManager[None] = row_adapters(self._model, names)
        if len(set(names)) == 1 and names[0] != BASE_ROW:
            # A single adapter needs no sorting of rows, which every layer would repeat.
            self._activate(names[0])
            mixing = nullcontext()
        with mixing:
            output = self._model(
                input_ids=ids_BT,
                attention_mask=mask_BC,
                position_ids=positions_BT,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=kept,
            )
        logits_BTV: Tensor = output.logits
        return logits_BTV

    @torch.inference_mode()
    def prompt_scores(self, ids: Sequence[int], adapter: str | None, top: int) -> list[TokenScore]:
        """The scores of a prompt's tokens but the first, in parts of `_SCORED_TOKENS`: logits of all would be large."""
        cache, scores = DynamicCache(), []
        for start in range(0, len(ids) - 1, _SCORED_TOKENS):
            part = list(ids[start : start + _SCORED_TOKENS])
            ids_1T = torch.tensor([part], device=self.device)
            mask_1C = torch.ones(1, start + len(part), dtype=torch.long, device=self.device)
            positions_1T = torch.arange(start, start + len(part), device=self.device)[None]
            following = list(ids[start + 1 : start + 1 + len(part)])
            logits_1TV = self._run(ids_1T, mask_1C, positions_1T, cache, [adapter], len(part))
            scores += token_scores(logits_1TV[0, : len(following)], following, top)
        return scores

    def trial_run(self) -> DynamicCache:
        """Run one token through the base alone until the device is done; the cache. Raises the device's errors."""
        cache = DynamicCache()
        one_11 = torch.ones(1, 1, dtype=torch.long, device=self.device)
        self.logits(one_11, one_11, torch.zeros_like(one_11), cache, [None])[0, 0].item()
        return cache

    def _activate(self, name: str) -> None:
        if name != self._active:
            self._model.set_adapter(name)
            self._active = name

    def _delete(self, name: str) -> None:
        if name in self._model.peft_config:
            # PEFT would choose another adapter itself, with a warning, and only inside its layers.
            self._activate(_RESIDENT)
            self._model.delete_adapter(name)

    def _check_cache(self, name: str) -> None:
        try:
            cache = self.trial_run()
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            raise ReftError(f"{name} cannot be served in batches: {type(error).__name__} in a trial run") from None
        if not all(type(layer) is DynamicLayer for layer in cache.layers):
            raise ReftError(f"{name} keeps state other than keys and values, and cannot be served in batches")
