"""One base in memory with several adapters that are trained, in turn or in one batch, and rows completed with any.

Shape suffixes: B rows, T tokens, N labelled positions, C tokens in the cache and new ones, D width, V vocabulary.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import DynamicCache

from reft_ray.core.batch import Batch, collate_targets
from reft_ray.core.errors import ReftError, first_line
from reft_ray.core.forward import Predictions
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.forward import ModelForward, head_of
from reft_ray.hf.loading import Base
from reft_ray.hf.lora import (
    BASE_ROW,
    LoraSettings,
    activate,
    adapter_scale,
    adapter_state,
    attach,
    differing,
    fitted,
    load_adapter_state,
    read_adapter,
    row_adapters,
    save_adapter,
    saved_scale,
)

logger = logging.getLogger(__name__)

_RESIDENT = "resident"
"""An adapter without effect that is always there: PEFT cannot be left with none."""


class _MixedForward(ModelForward):
    """Passes in which each row has the adapter of `names`."""

    names: Sequence[str] = ()

    @property
    def defers_head(self) -> bool:
        """Whether the head can be run after the pass, which the rows' adapters need."""
        return self._finish is not None

    def _run(self, batch: Batch) -> Any:
        with row_adapters(cast(PeftModel, self.model), self.names):
            return super()._run(batch)


class AdapterBank:
    """Adapters by name on one base. Not thread-safe."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.chat = ChatFormat(base.tokenizer)
        self.model = attach(base.model, _RESIDENT, LoraSettings(rank=1)).requires_grad_(False).eval()
        self.forward = ModelForward(self.model)
        self._mixed = _MixedForward(self.model)
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

    def start_from(self, name: str, folder: Path) -> None:
        """Begin an adapter with the update of a saved one, as far as its rank and layers hold it."""
        ratio = saved_scale(folder) / adapter_scale(self.model, name)
        self.load(name, fitted(read_adapter(folder), self.state(name), ratio))

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
    def training(self, name: str, *others: str) -> Iterator[None]:
        """Train these adapters in the block: gradients are kept for them alone. The first one is active."""
        activate(self.model, name, trainable=True)
        self._active = name
        for other in others:
            for parameter in self.parameters(other).values():
                parameter.requires_grad_(True)
        try:
            yield
        finally:
            self._rest()

    @cached_property
    def mixes(self) -> bool:
        """Whether rows of several adapters can be in one pass of this model: not with every kind of layer."""
        if not self._mixed.defers_head:
            return False
        try:
            with torch.no_grad():
                rows = [([0], [0])] * 2
                self.predictions(collate_targets(rows, self.chat.pad_id, self.device), [_RESIDENT, BASE_ROW])
        except (ValueError, TypeError, RuntimeError, NotImplementedError, AttributeError) as error:
            # Which layers can is known to PEFT alone, and each kind says no in its own way.
            logger.warning(
                "models are trained one by one, not in one pass (%s: %s)", type(error).__name__, first_line(error)
            )
            return False
        return True

    def predictions(self, batch: Batch, names: Sequence[str]) -> Predictions:
        """The head's input at the labelled positions, each row with its adapter; in a block of `training`.

        Where the adapters differ, take a `part` for each of them.
        """
        if set(names) == {self._active}:
            return self.forward.predictions(batch)
        self._mixed.names = names
        return self._mixed.predictions(batch)

    def part(self, predictions: Predictions, where: slice, name: str) -> Predictions:
        """The predictions at some positions, all of one adapter."""
        head = predictions.head if name == self._active else partial(self._under_head, name, predictions.head)
        weights = tuple(value for key, value in head_of(self.model).named_parameters() if f".{name}." in key)
        return Predictions(predictions.hidden_ND[where], head, predictions.vocabulary, weights)

    def _under_head(self, name: str, run: Callable[[Tensor], Tensor], hidden_ND: Tensor) -> Tensor:
        """Run the head with the part of this adapter that is on it, if there is one."""
        head = head_of(self.model)
        if not isinstance(head, BaseTunerLayer):
            return run(hidden_ND)
        before = list(head.active_adapters)
        _switch(head, [name])
        try:
            return run(hidden_ND)
        finally:
            _switch(head, before)

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


def _switch(layer: BaseTunerLayer, names: list[str]) -> None:
    """Switch one layer's adapter. PEFT would also change which parameters have gradients: all rows' adapters have."""
    module: nn.Module = layer  # type: ignore[assignment]
    wanted = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    layer.set_adapter(names)
    for parameter, needed in wanted:
        parameter.requires_grad_(needed)
