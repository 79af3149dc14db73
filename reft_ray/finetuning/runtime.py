"""Where a training loop runs: one process, or a rank of a Ray Train worker group. The loops know only this."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

Progress = Callable[[Mapping[str, Any]], None]
"""Receives metrics of a step: `step`, `progress` in [0, 1] and the loss terms."""

Stop = Callable[[], bool]
"""Asked between two steps; True ends the run behind a checkpoint, from which the same run id goes on."""


class Runtime(Protocol):
    """One rank's view of its run."""

    rank: int
    world_size: int
    device: torch.device

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over ranks, on the tensor's own device and dtype."""
        ...

    def latest_checkpoint(self) -> Path | None:
        """A local directory with the checkpoint to resume from, or None for a fresh start."""
        ...

    def stop_asked(self) -> bool:
        """Whether to save and end now. Every rank calls it at the same steps and gets the same answer."""
        ...

    def report(self, metrics: Mapping[str, Any], write: Callable[[Path], None] | None = None) -> None:
        """Report metrics; with `write`, also a checkpoint. Every rank calls it at the same steps.

        `write` fills a directory; every rank writes its own files and the directories are merged.
        """
        ...


class LocalRuntime:
    """A run in this process. Checkpoints go under `folder`, where there is one; the newest complete one counts."""

    rank = 0
    world_size = 1

    def __init__(
        self,
        folder: Path | None = None,
        progress: Progress | None = None,
        device: torch.device | str = "cpu",
        stop: Stop | None = None,
    ) -> None:
        self.folder = folder
        self.device = torch.device(device)
        self._progress = progress
        self._stop = stop

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """One rank: the tensor itself."""
        return tensor

    def latest_checkpoint(self) -> Path | None:
        """The checkpoint with the highest number."""
        if self.folder is None or not self.folder.is_dir():
            return None
        return max(self.folder.glob("checkpoint-*"), default=None)

    def stop_asked(self) -> bool:
        """See Runtime."""
        return self._stop is not None and self._stop()

    def report(self, metrics: Mapping[str, Any], write: Callable[[Path], None] | None = None) -> None:
        """Write the checkpoint under a temporary name, rename it, and tell the progress callback."""
        if write is not None and self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder, prefix=".writing-") as scratch:
                content = Path(scratch) / "checkpoint"
                content.mkdir()
                write(content)
                target = self.folder / f"checkpoint-{metrics['step']:08d}"
                shutil.rmtree(target, ignore_errors=True)  # the last step may have been a regular checkpoint too
                content.rename(target)
        if self._progress is not None:
            self._progress(metrics)
