"""A run's metrics, step by step, as entries of the catalogue, for the dashboards and alerts of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from reft_ray.finetuning.runtime import Progress
from reft_ray.telemetry import catalog
from reft_ray.telemetry.recorder import Recorder

_TERMS = {
    "loss": "total",
    "total": "total",
    "task": "task",
    "distill": "distill",
    "cross_entropy": "cross_entropy",
    "separation": "refusal",
}
_KINDS = ("user", "alignment")


class TrainingMetrics:
    """A Progress that records the metrics it receives and passes them on.

    Totals of a run are cumulative; after the loss of a worker they fall back to those of a checkpoint, and repeated
    work is not counted again.
    """

    def __init__(self, recorder: Recorder, stage: Literal["teacher", "student"], then: Progress | None = None) -> None:
        self._recorder, self._stage, self._then = recorder, stage, then
        self._step = 0
        self._seen: dict[str, float] = {}

    def __call__(self, metrics: Mapping[str, Any]) -> None:
        self._count(metrics)
        if self._then is not None:
            self._then(metrics)

    def _count(self, metrics: Mapping[str, Any]) -> None:
        record, stage = self._recorder, self._stage
        step = int(metrics["step"])
        if step < self._step:
            record.count(catalog.TRAIN_RESTARTS, stage=stage)
        self._step = step
        for metric, unit in ((catalog.TRAIN_ROWS, "rows"), (catalog.TRAIN_TOKENS, "tokens")):
            for kind in _KINDS:
                grown = self._grown(f"{kind}_{unit}", metrics)
                if grown > 0:
                    record.count(metric, grown, stage=stage, rows=kind)
        for name, term in _TERMS.items():
            if name in metrics:
                record.set(catalog.TRAIN_LOSS, float(metrics[name]), stage=stage, term=term)
        record.count(catalog.UNSCREENED_ROWS, metrics.get("unscreened_rows", 0))
        record.count(catalog.UNACCOUNTED_ROWS, metrics.get("missing_rows", 0), where="training")
        if metrics.get("step_seconds"):
            record.observe(catalog.TRAIN_STEP_SECONDS, float(metrics["step_seconds"]), stage=stage)
        if metrics.get("soft_labels"):
            record.set(catalog.TRAIN_KL, float(metrics["distill"]))

    def _grown(self, name: str, metrics: Mapping[str, Any]) -> float:
        total = float(metrics.get(name, 0))
        grown = total - self._seen.get(name, 0.0)
        self._seen[name] = max(total, self._seen.get(name, 0.0))
        return grown
