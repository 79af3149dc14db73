"""The third step: guided finetuning on the kept rows with Ray Train, under the job's id, so that it can go on."""

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
from reft_ray.hf.lora import ADAPTER_WEIGHTS
from reft_ray.jobs.artefacts import copy_folder, files_in, put_folder
from reft_ray.jobs.errors import LeaseLostError
from reft_ray.jobs.results import Screening, Training
from reft_ray.jobs.run import JobRun
from reft_ray.local_ray import ensure_training_ray
from reft_ray.pipeline.local_run import train_on_kept
from reft_ray.pipeline.model_context import ModelContext
from reft_ray.pipeline.reading import answered_examples
from reft_ray.pipeline.settings import finetune_config
from reft_ray.screening.kept_rows import kept_count

CSV = "step_metrics.csv"
VALIDATION_ROWS = 512
"""So many of the validation file's rows are measured at every checkpoint; the release gate reads all of them."""

_SAVED = re.compile(rf"checkpoint-(\d+)/(?:{ADAPTER}|{EXPORT})/{ADAPTER_WEIGHTS}")

_TERMS = {
    "train_loss": "task",
    "train_mean_token_accuracy": "accuracy",
    "valid_loss": "valid_loss",
    "valid_mean_token_accuracy": "valid_accuracy",
    "distill_loss": "distill",
    "loss": "loss",
}
"""What users read -> what the loop calls it. The first four are OpenAI's names."""

_VALUES = frozenset({"trained_tokens", *_TERMS})

logger = logging.getLogger(__name__)


def train_student(run: JobRun, context: ModelContext, shared: Path, screening: Screening) -> Training:
    """Train, or go on from the last checkpoint. Raises StoppedError once the state is saved."""
    config = finetune_config(run.job.spec, context.args, context.base)
    storage = f"{run.scratch}/train"
    resources = context.args.resources.model_copy(
        update={"storage": storage, "shared": context.args.resources.shared or str(shared)}
    )
    watch = _Watch(run, f"{storage}/{run.job.id}", config.total_steps(kept_count(screening.kept_uri)))
    if run.should_stop():
        raise StoppedError("told to stop")
    if resources.workers:
        ensure_training_ray(keep_sigterm=True)
    with tempfile.TemporaryDirectory(prefix="reft-student-") as scratch:
        try:
            student = train_on_kept(
                config,
                screening.kept_uri,
                screening.kept_sha256,
                context.alignment(run.job.spec.options.alignment_dataset) if config.method.distills else (),
                context.teacher,
                Path(scratch) / "student",
                resources,
                run.job.id,
                watch.tell,
                run.should_stop,
                run.recorder,
                tuple(islice(answered_examples(run, run.job.spec.validation_file, context.base), VALIDATION_ROWS)),
            )
        except StoppedError:
            watch.record_checkpoints()
            raise
        watch.record_checkpoints()
        uri = put_folder(student, f"{run.workspace}/adapter")
    told = run.metrics_history
    return Training(
        adapter_uri=uri,
        steps=int(told[-1]["step"]),
        trained_tokens=int(told[-1]["trained_tokens"]),
        result_file=run.save_file(CSV, [_csv(told)]),
    )


class _Watch:
    """Tells the job's records what the run reports; called from a thread of the run."""

    def __init__(self, run: JobRun, folder: str, total: int) -> None:
        self._run = run
        self._folder = folder
        self._total = total
        # What drivers before this one told; a loop that goes on tells its last reports again, for one that died.
        self._metrics = {
            int(data["step"]): {k: v for k, v in data.items() if k in _VALUES} for data in run.metrics_history
        }
        self._recorded = {checkpoint.step_number for checkpoint in run.checkpoints}
        self._saved_at: int | None = None

    def tell(self, metrics: Mapping[str, Any]) -> None:
        """One report of the loop. Records that are out of reach for a while cost a metric, never the run."""
        try:
            self._tell(metrics)
        except (LeaseLostError, StoppedError) as stop:
            logger.info("%s", stop)
        except Exception as error:
            logger.warning("metrics of step %s were not recorded: %s", metrics.get("step"), type(error).__name__)

    def _tell(self, metrics: Mapping[str, Any]) -> None:
        for report in metrics.get("earlier", ()):
            if report["step"] not in self._metrics:
                self._tell(report)
        step = int(metrics["step"])
        values = {"trained_tokens": float(metrics["row_tokens"])}
        values |= {ours: float(metrics[theirs]) for ours, theirs in _TERMS.items() if theirs in metrics}
        self._run.metrics(step, self._total, values)
        self._metrics[step] = values
        if metrics.get("note"):
            self._run.event(f"Left out: {metrics['note']}", level="warn", key="train/left_out")
        if self._saved_at is not None and step > self._saved_at:
            # The loop goes on only behind a saved checkpoint, so the earlier one is whole by now.
            self._record(self._saved_at)
        if metrics.get("saved"):
            self._saved_at = step

    def record_checkpoints(self) -> None:
        """Behind the end of a run: everything that it saved."""
        self._record(None)

    def _record(self, upto: int | None) -> None:
        saved = {int(match[1]): name for name in files_in(self._folder) if (match := _SAVED.fullmatch(name))}
        for step in sorted(saved.keys() - self._recorded):
            if upto is not None and step > upto:
                continue
            uri = f"{self._run.workspace}/checkpoints/step-{step}"
            copy_folder(f"{self._folder}/{saved[step].rpartition('/')[0]}", uri)
            self._run.checkpoint(step, uri, {"step": float(step), **self._metrics.get(step, {})})
            self._recorded.add(step)


def _csv(told: list[Mapping[str, Any]]) -> bytes:
    columns = ["step", *_TERMS]
    # OpenAI's table calls it thus, and its events otherwise.
    lines = [",".join(columns).replace("train_mean_token_accuracy", "train_accuracy")]
    lines += [",".join(_number(data.get(name)) for name in columns) for data in told]
    return ("\n".join(lines) + "\n").encode()


def _number(value: object) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
