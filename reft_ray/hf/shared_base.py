"""One base model in memory, and the adapters that are on it now: a few, the least recently used out first.

Shape suffixes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from reft_ray.core.errors import ReftError
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.loading import Base
from reft_ray.hf.lora import LoraSettings, attach, attach_saved

_BASE = "__base__"
"""How PEFT calls the base without any adapter."""
_RESIDENT = "resident"
"""An adapter that does nothing and never leaves: PEFT cannot be left with none, nor undo a first one that failed."""


class SharedBase:
    """Runs rows of several adapters in one forward pass: the base's products are shared, the low-rank ones are not.

    Not for several threads. Raises ReftError for a model whose cache is not plain attention (state-space layers), whose
    rows could not join and leave a running batch.
    """

    def __init__(self, base: Base, most_adapters: int = 8) -> None:
        self.chat = ChatFormat(base.tokenizer)
        self.context = base.context
        self.most_adapters = most_adapters
        self._model = attach(base.model, _RESIDENT, LoraSettings(rank=1)).requires_grad_(False).eval()
        self._active = _RESIDENT
        self._names: OrderedDict[str, str] = OrderedDict()
        self._made = 0
        self._probe(base.name)

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return next(self._model.parameters()).device

    @property
    def adapters(self) -> list[str]:
        """The keys of the adapters that are loaded, least recently used first."""
        return list(self._names)

    def hold(self, key: str, folder: Path, busy: Container[str | None] = ()) -> bool:
        """Have an adapter loaded, from its directory if need be; False while all places are `busy`.

        Raises ReftError when it does not fit onto this base.
        """
        if key in self._names:
            self._names.move_to_end(key)
            return True
        while len(self._names) >= self.most_adapters:
            idle = next((name for name in self._names if name not in busy), None)
            if idle is None:
                return False
            self._drop(idle)
        self._made += 1
        # A name of our own: PEFT puts it into module paths, where a URI's dots and slashes would do harm.
        name = f"a{self._made}"
        try:
            self._model = attach_saved(self._model, name, folder)
        except (RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
            self._forget(name)
            raise ReftError(f"the adapter {key} does not fit onto this base model: {type(error).__name__}") from None
        finally:
            self._model.eval()
        self._active = name
        self._names[key] = name
        return True

    @torch.inference_mode()
    def logits(
        self, ids_BT: Tensor, mask_BC: Tensor, positions_BT: Tensor, cache: DynamicCache, adapters: Sequence[str | None]
    ) -> Tensor:
        """Logits [B, V] behind the last of `ids_BT`; `mask_BC` covers the cache and the new tokens."""
        names = [_BASE if key is None else self._names[key] for key in adapters]
        options: dict[str, Any] = {}
        if len(set(names)) == 1 and names[0] != _BASE:
            # One adapter for the whole batch needs no sorting of rows, which every layer would repeat.
            self._activate(names[0])
        else:
            options["adapter_names"] = names
        output = self._model(
            input_ids=ids_BT,
            attention_mask=mask_BC,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            **options,
        )
        logits_BV: Tensor = output.logits[:, -1]
        return logits_BV

    def try_out(self) -> DynamicCache:
        """Read one token with the base alone, to its very end; the cache behind it. Raises what the device raises."""
        cache = DynamicCache()
        one_11 = torch.ones(1, 1, dtype=torch.long, device=self.device)
        self.logits(one_11, one_11, torch.zeros_like(one_11), cache, [None])[0, 0].item()
        return cache

    def _activate(self, name: str) -> None:
        if name != self._active:
            self._model.set_adapter(name)
            self._active = name

    def _drop(self, key: str) -> None:
        self._forget(self._names.pop(key))

    def _forget(self, name: str) -> None:
        if name in self._model.peft_config:
            # PEFT would choose another one itself, with a warning, and only inside its layers.
            self._activate(_RESIDENT)
            self._model.delete_adapter(name)

    def _probe(self, name: str) -> None:
        try:
            cache = self.try_out()
        except (TypeError, ValueError, AttributeError, IndexError) as error:
            raise ReftError(f"{name} cannot be served in batches: {type(error).__name__} in a trial run") from None
        if not all(type(layer) is DynamicLayer for layer in cache.layers):
            raise ReftError(f"{name} keeps state other than keys and values, and cannot be served in batches")
