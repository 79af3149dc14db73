"""Passes in which each row has an adapter of its own (mixed batches of PEFT)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

BASE = "__base__"
"""PEFT's name for the base without any adapter."""


@contextmanager
def row_adapters(model: PeftModel, names: Sequence[str]) -> Iterator[None]:
    """Give row b of each pass in this block the adapter `names[b]`, or none for `BASE`.

    As PEFT's `adapter_names`, whose hooks stay on the layers after a pass that failed: each later one would fail too.
    """
    rows = list(names)

    def give(_module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**inputs, "adapter_names": rows}

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    handles = [layer.register_forward_pre_hook(give, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
