"""Train the student on the kept rows; the job's id is the run id, so that another driver can resume."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from reft_ray.core.errors import StoppedError
from reft_ray.finetuning.export import ADAPTER, EXPORT
from reft_ray.finetuning.trainer import finetune
from reft_ray.hf.lora import ADAPTER_WEIGHTS
from reft_ray.jobs.artefacts import copy_folder, files_in, put_folder
from reft_ray.jobs.errors import LeaseLostError
from reft_ray.jobs.results import Screening, Training
from reft_ray.jobs.run import JobRun
from reft_ray.local_ray import ensure_training_ray
from reft_ray.pipeline.kept_file import save_kept
from reft_ray.pipeline.local_run import kept_inputs
from reft_ray.pipeline.model_context import ModelContext
from reft_ray.pipeline.run_config import finetune_config
from reft_ray.pipeline.uploaded_rows import answered_examples
from reft_ray.screening.kept_rows import kept_count

CSV = "step_metrics.csv"
VALIDATION_ROWS = 512
"""Validation rows measured at every checkpoint; the release gate uses all of them."""

_SAVED = re.compile(rf"checkpoint-(\d+)/(?:{ADAPTER}|{EXPORT})/{ADAPTER_WEIGHTS}")

_TERMS = {
    "train_loss": "task",
    "train_mean_token_accuracy": "accuracy",
    "valid_loss": "valid_loss",
    "valid_mean_token_accuracy": "valid_accuracy",
    "distill_loss": "distill",
    "loss": "loss",
}
"""Metric of the job -> metric of the training loop. The first four are OpenAI's names."""

_VALUES = frozenset({"trained_tokens", *_TERMS})

logger = logging.getLogger(__name__)


def train_student(run: JobRun, context: ModelContext, shared: Path, screening: Screening) -> Training:
    """Train, or resume from the last checkpoint. Raises StoppedError once the state is saved."""
    config = finetune_config(run.job.spec, context.args, context.base)
    storage = f"{run.scratch}/train"
    resources = context.args.resources.model_copy(
        update={"storage": storage, "shared": context.args.resources.shared or str(shared)}
    )
    reporter = _Reporter(run, f"{storage}/{run.job.id}", config.total_steps(kept_count(screening.kept_uri)))
    if run.should_stop():
        raise StoppedError("stop requested")
    if resources.workers:
        ensure_training_ray(keep_sigterm=True)
    with tempfile.TemporaryDirectory(prefix="reft-student-") as scratch:
        try:
            inputs = kept_inputs(
                screening.kept_uri,
                screening.kept_sha256,
                resources,
                context.alignment(run.job.spec.options.alignment_dataset) if config.method.distills else (),
                context.teacher,
                tuple(islice(answered_examples(run, run.job.spec.validation_file, context.base), VALIDATION_ROWS)),
            )
            out = Path(scratch) / "student"
            student = finetune(
                config, inputs, out, resources, run.job.id, reporter.report, run.recorder, run.should_stop
            )
        except StoppedError:
            reporter.record_checkpoints()
            raise
        reporter.record_checkpoints()
        uri = put_folder(student, f"{run.workspace}/adapter")
    history = run.metrics_history
    return Training(
        adapter_uri=uri,
        steps=int(history[-1]["step"]),
        trained_tokens=int(history[-1]["trained_tokens"]),
        result_file=run.save_file(CSV, [_csv(history)]),
        kept_file=save_kept(run, screening),
    )


class _Reporter:
    """Records the run's metrics and checkpoints in the job; called from a thread of the run."""

    def __init__(self, run: JobRun, folder: str, total: int) -> None:
        self._run = run
        self._folder = folder
        self._total = total
        # Those of earlier drivers; a resumed loop repeats its last reports, in case a driver died before recording.
        self._metrics = {
            int(data["step"]): {k: v for k, v in data.items() if k in _VALUES} for data in run.metrics_history
        }
        self._recorded = {checkpoint.step_number for checkpoint in run.checkpoints}
        self._saved_at: int | None = None

    def report(self, metrics: Mapping[str, Any]) -> None:
        """Record one report of the loop. A database that is down for a while costs a metric, never the run."""
        try:
            self._record_metrics(metrics)
        except (LeaseLostError, StoppedError) as stop:
            logger.info("%s", stop)
        except Exception as error:
            logger.warning("metrics of step %s were not recorded: %s", metrics.get("step"), type(error).__name__)

    def _record_metrics(self, metrics: Mapping[str, Any]) -> None:
        for report in metrics.get("earlier", ()):
            if report["step"] not in self._metrics:
                self._record_metrics(report)
        step = int(metrics["step"])
        values = {"trained_tokens": float(metrics["row_tokens"])}
        values |= {ours: float(metrics[theirs]) for ours, theirs in _TERMS.items() if theirs in metrics}
        self._run.metrics(step, self._total, values)
        self._metrics[step] = values
        if metrics.get("note"):
            self._run.event(f"Left out: {metrics['note']}", level="warn", key="train/left_out")
        if self._saved_at is not None and step > self._saved_at:
            # The loop waits for a checkpoint to be saved, so this one is complete.
            self.record_checkpoints(self._saved_at)
        if metrics.get("saved"):
            self._saved_at = step

    def record_checkpoints(self, upto: int | None = None) -> None:
        """Copy and record saved checkpoints, up to a step; all of them after the run."""
        saved = {int(match[1]): name for name in files_in(self._folder) if (match := _SAVED.fullmatch(name))}
        for step in sorted(saved.keys() - self._recorded):
            if upto is not None and step > upto:
                continue
            uri = f"{self._run.workspace}/checkpoints/step-{step}"
            copy_folder(f"{self._folder}/{saved[step].rpartition('/')[0]}", uri)
            self._run.checkpoint(step, uri, {"step": float(step), **self._metrics.get(step, {})})
            self._recorded.add(step)


def _csv(history: list[Mapping[str, Any]]) -> bytes:
    columns = ["step", *_TERMS]
    # OpenAI's table and events name this metric differently.
    lines = [",".join(columns).replace("train_mean_token_accuracy", "train_accuracy")]
    lines += [",".join(_number(data.get(name)) for name in columns) for data in history]
    return ("\n".join(lines) + "\n").encode()


def _number(value: object) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
