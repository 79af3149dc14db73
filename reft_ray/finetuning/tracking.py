"""A run's metrics in W&B, MLflow or TensorBoard: the figures of every report, and the configuration.

The tracker is in the process that starts the run, never in a worker. Text of rows is not sent. A tracker that fails
costs its metrics, not the run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from reft_ray.core.errors import UsageError
from reft_ray.finetuning.runtime import Progress

logger = logging.getLogger(__name__)

Log = Callable[[int, dict[str, float]], None]
"""Receives a step and its figures."""

_UNTRACKED = frozenset({"step", "pid", "saved", "soft_labels"})


class Tracker(StrEnum):
    """Where metrics go. Servers, projects and keys are those of the tracker's own environment variables."""

    WANDB = "wandb"
    MLFLOW = "mlflow"
    TENSORBOARD = "tensorboard"


_MODULES = {Tracker.WANDB: "wandb", Tracker.MLFLOW: "mlflow", Tracker.TENSORBOARD: "tensorboardX"}
_INSTALL = {
    Tracker.WANDB: "pip install wandb",
    Tracker.MLFLOW: "pip install mlflow",
    Tracker.TENSORBOARD: "pip install tensorboardX",
}


@contextmanager
def tracked(
    kind: str | None, name: str, config: Mapping[str, Any], folder: Path, then: Progress | None = None
) -> Iterator[Progress | None]:
    """A Progress that passes reports on to `then` and sends their figures to the tracker `kind`; without one, `then`.

    `name` is the run's, `config` its settings; TensorBoard writes into `folder`. Raises UsageError for an unknown
    tracker or one that is not installed.
    """
    if kind is None:
        yield then
        return
    if kind not in set(Tracker):
        raise UsageError(f"--track {kind}: one of {', '.join(Tracker)}")
    tracker = Tracker(kind)
    if find_spec(_MODULES[tracker]) is None:
        raise UsageError(f"--track {kind} needs a package that is not installed: {_INSTALL[tracker]}")
    start = {Tracker.WANDB: _wandb, Tracker.MLFLOW: _mlflow, Tracker.TENSORBOARD: _tensorboard}[tracker]
    log, end = start(import_module(_MODULES[tracker]), name, _flat(config), folder)
    progress = _Tracked(tracker, log, then)
    finished = False
    try:
        yield progress
        finished = True
    finally:
        end(finished)


class _Tracked:
    def __init__(self, tracker: Tracker, log: Log, then: Progress | None) -> None:
        self._tracker, self._log, self._then = tracker, log, then
        self._step = -1

    def __call__(self, metrics: Mapping[str, Any]) -> None:
        for report in (*metrics.get("earlier", ()), metrics):
            self._send(report)
        if self._then is not None:
            self._then(metrics)

    def _send(self, report: Mapping[str, Any]) -> None:
        step = int(report.get("step", 0))
        if step <= self._step:
            return  # a run that resumed repeats its last reports
        figures = {
            name: float(value)
            for name, value in report.items()
            if name not in _UNTRACKED and isinstance(value, int | float) and not isinstance(value, bool)
        }
        try:
            self._log(step, figures)
            self._step = step
        except Exception as error:
            logger.warning("%s did not take the metrics of step %d: %s", self._tracker, step, type(error).__name__)


def _wandb(wandb: Any, name: str, config: dict[str, Any], folder: Path) -> tuple[Log, Callable[[bool], None]]:
    folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(name=name, config=config, dir=str(folder), resume="allow")
    return (
        lambda step, figures: run.log(figures, step=step),
        lambda finished: run.finish(exit_code=0 if finished else 1),
    )


def _mlflow(mlflow: Any, name: str, config: dict[str, Any], folder: Path) -> tuple[Log, Callable[[bool], None]]:
    mlflow.start_run(run_name=name)
    mlflow.log_params(config)
    return (
        lambda step, figures: mlflow.log_metrics(figures, step=step),
        lambda finished: mlflow.end_run("FINISHED" if finished else "FAILED"),
    )


def _tensorboard(module: Any, name: str, config: dict[str, Any], folder: Path) -> tuple[Log, Callable[[bool], None]]:
    writer = module.SummaryWriter(str(folder / name))
    writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in config.items()))

    def log(step: int, figures: dict[str, float]) -> None:
        for key, value in figures.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return log, lambda _finished: writer.close()


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names, as `--set` writes them; settings that are not set are left out."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat
