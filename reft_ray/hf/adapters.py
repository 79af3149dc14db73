"""Adapters by their URIs on one base: loaded when they are first asked for, the least recently used goes first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from peft import PeftModel
from torch import nn

from reft_ray.core.errors import ReftError
from reft_ray.hf.loading import Base
from reft_ray.hf.lora import attach_saved

Fetch = Callable[[str], AbstractContextManager[Path]]
"""Brings an adapter's directory here for the time of a block."""


class Adapters:
    """At most `limit` adapters on a base that is held once. Not for several threads at a time."""

    def __init__(self, base: Base, fetch: Fetch, limit: int = 8) -> None:
        if limit < 1:
            raise ReftError(f"at least one adapter must fit, got a limit of {limit}")
        self.base = base
        self._fetch = fetch
        self._limit = limit
        self._model: nn.Module = base.model
        self._names: OrderedDict[str, str] = OrderedDict()
        self._made = 0

    @property
    def loaded(self) -> list[str]:
        """URIs of the adapters in memory, least recently used first."""
        return list(self._names)

    @contextmanager
    def acting(self, uri: str | None) -> Iterator[nn.Module]:
        """The base with one adapter at work, or alone. Raises ReftError where there is no adapter in safetensors."""
        if uri is None:
            if isinstance(self._model, PeftModel):
                with self._model.disable_adapter():
                    yield self._model
            else:
                yield self._model
            return
        name = self._loaded(uri)
        assert isinstance(self._model, PeftModel)
        if self._model.active_adapter != name:
            self._model.set_adapter(name)
        yield self._model

    def _loaded(self, uri: str) -> str:
        if uri in self._names:
            self._names.move_to_end(uri)
            return self._names[uri]
        self._made += 1
        name = f"student-{self._made}"
        try:
            with self._fetch(uri) as folder:
                self._model = attach_saved(self._model, name, folder)
        except FileNotFoundError as error:
            raise ReftError(f"no adapter at {error.filename}") from None
        self._model.eval()
        self._names[uri] = name
        while len(self._names) > self._limit:
            # The new one acts by now, so that the model never loses the adapter at work.
            _, oldest = self._names.popitem(last=False)
            self._model.delete_adapter(oldest)
        return name
