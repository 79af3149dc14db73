"""The interface of a training loop to its process: this one, or a rank of a Ray Train worker group."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from reft_ray.atomic import atomic_directory

Progress = Callable[[Mapping[str, Any]], None]
"""Receives metrics of a step: `step`, `progress` in [0, 1] and the loss terms."""

Stop = Callable[[], bool]
"""Called between two steps; True stops the run after saving a checkpoint, and the same run id resumes."""


Phase = Callable[[str, float, str], None]
"""Receives what a run does now (`loading`, `training`, ...), the share of it that is done, and a note."""


def no_phase(_name: str, _share: float, _note: str = "") -> None:
    """Where nothing follows a run."""


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
        """Whether to save and stop now. Every rank calls it at the same steps and gets the same answer."""
        ...

    def phase(self, name: str, share: float = 0.0, note: str = "") -> None:
        """Pass on what the run does now. Any rank may call it at any time; only rank 0's is followed."""
        ...

    def report(self, metrics: Mapping[str, Any], write: Callable[[Path], None] | None = None) -> None:
        """Report metrics; with `write`, also a checkpoint. Every rank calls it at the same steps.

        `write` fills a directory; every rank writes its own files and the directories are merged.
        """
        ...


class LocalRuntime:
    """A run in this process. Checkpoints go to `folder`, if given; the newest complete one counts."""

    rank = 0
    world_size = 1

    def __init__(
        self,
        folder: Path | None = None,
        progress: Progress | None = None,
        device: torch.device | str = "cpu",
        stop: Stop | None = None,
        phase: Phase = no_phase,
    ) -> None:
        self.folder = folder
        self.device = torch.device(device)
        self._progress = progress
        self._stop = stop
        self._phase = phase

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """One rank: the tensor itself."""
        return tensor

    def latest_checkpoint(self) -> Path | None:
        """The checkpoint with the highest number."""
        if self.folder is None or not self.folder.is_dir():
            return None
        return max(self.folder.glob("checkpoint-*"), default=None)

    def stop_asked(self) -> bool:
        return self._stop is not None and self._stop()

    def phase(self, name: str, share: float = 0.0, note: str = "") -> None:
        self._phase(name, share, note)

    def report(self, metrics: Mapping[str, Any], write: Callable[[Path], None] | None = None) -> None:
        """Write the checkpoint whole or not at all, and call the progress callback."""
        if write is not None and self.folder is not None:
            # The last step may have been a regular checkpoint too.
            with atomic_directory(self.folder / f"checkpoint-{metrics['step']:08d}", replace=True) as content:
                write(content)
        if self._progress is not None:
            self._progress(metrics)
