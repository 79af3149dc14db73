"""One base in memory with several adapters that are trained in turn, and rows completed with any of them.

Shape suffixes: B rows, T tokens, C tokens in the cache and new ones, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from reft_ray.core.errors import ReftError
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.forward import ModelForward
from reft_ray.hf.loading import Base
from reft_ray.hf.lora import LoraSettings, activate, adapter_state, attach, differing, load_adapter_state, save_adapter

_RESIDENT = "resident"
"""An adapter without effect that is always there: PEFT cannot be left with none."""


class AdapterBank:
    """Adapters by name on one base. Not thread-safe."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.chat = ChatFormat(base.tokenizer)
        self.model = attach(base.model, _RESIDENT, LoraSettings(rank=1)).requires_grad_(False).eval()
        self.forward = ModelForward(self.model)
        self._active = _RESIDENT

    @property
    def device(self) -> torch.device:
        """The device of the base."""
        return next(self.model.parameters()).device

    @property
    def names(self) -> list[str]:
        """The adapters in memory."""
        return [name for name in self.model.peft_config if name != _RESIDENT]

    def add(self, name: str, settings: LoraSettings, seed: int, state: Mapping[str, Tensor] | None = None) -> None:
        """Add a new adapter, with the tensors of `state` if given. Raises ReftError for tensors that do not fit."""
        attach(self.model, name, settings, seed)
        if state is not None:
            try:
                self.load(name, state)
            except ReftError:
                self.remove(name)
                raise
        self._rest()

    def load(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Replace an adapter's tensors. Raises ReftError where their names or shapes differ."""
        if odd := differing(self.model, name, state):
            raise ReftError(f"the weights do not fit this model's rank and layers: {odd} differs")
        load_adapter_state(self.model, name, dict(state))

    def remove(self, name: str) -> None:
        """Remove an adapter from memory."""
        self._rest()
        self.model.delete_adapter(name)

    def state(self, name: str) -> dict[str, Tensor]:
        """An adapter's tensors as copies on the CPU."""
        return {key: tensor.clone() for key, tensor in adapter_state(self.model, name).items()}

    def save(self, name: str, folder: Path, base_name: str) -> None:
        """Write an adapter as a directory that plain `peft` loads."""
        save_adapter(self.model, name, folder, base_name)

    def parameters(self, name: str) -> dict[str, nn.Parameter]:
        """An adapter's parameters by name."""
        return {key: value for key, value in self.model.named_parameters() if f".{name}." in key}

    @contextmanager
    def training(self, name: str) -> Iterator[None]:
        """Train this adapter in the block: gradients are kept for it alone."""
        activate(self.model, name, trainable=True)
        self._active = name
        try:
            yield
        finally:
            self._rest()

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Run passes with this adapter in the block, without gradients; None for the base alone."""
        self._use(name or _RESIDENT)
        try:
            with nullcontext() if name else self.model.disable_adapter():
                yield
        finally:
            self._rest()

    @torch.inference_mode()
    def logits(
        self, ids_BT: Tensor, mask_BC: Tensor, positions_BT: Tensor, cache: DynamicCache, adapters: Sequence[str | None]
    ) -> Tensor:
        """Logits [B, V] after the last of `ids_BT`, as `hf.decoding.DecodingBatch` asks; in a block of `using`."""
        output = self.model(
            input_ids=ids_BT,
            attention_mask=mask_BC,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_BTV: Tensor = output.logits
        return logits_BTV[:, -1]

    def _use(self, name: str) -> None:
        activate(self.model, name, trainable=False)
        self._active = name

    def _rest(self) -> None:
        if self._active != _RESIDENT or self.model.active_adapter != _RESIDENT:
            self._use(_RESIDENT)
