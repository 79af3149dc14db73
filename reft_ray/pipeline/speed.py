"""The speed of a base model's jobs on this machine, from a small run of each stage: for estimates before the first job.

`python -m reft_ray.pipeline.speed MODEL...` measures as a driver would work, and keeps what it found in the service's
content store; the service starts it (`reft_ray.serving.finetuning_service`).
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from reft_ray.core.conversation import Example
from reft_ray.core.errors import BlockedByPolicyError, ReftError
from reft_ray.evaluation.suite import Suite
from reft_ray.finetuning.config import FinetuneConfig
from reft_ray.finetuning.rows import enough_alignment
from reft_ray.finetuning.targets import ensure_soft_targets, soft_targets_path
from reft_ray.finetuning.trainer import FinetuneInputs, finetune
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.loading import context_of, load_tokenizer
from reft_ray.hf.ref_teacher import load_scorer
from reft_ray.hf.soft_targets import is_complete
from reft_ray.jobs.content import ContentStore
from reft_ray.jobs.driver import DriverConfig
from reft_ray.jobs.estimate import FirstSpeeds, Speed
from reft_ray.openmp import spin_briefly
from reft_ray.pipeline.measure import MeasureRequest, measure
from reft_ray.pipeline.model_context import ModelContext
from reft_ray.pipeline.steps import PipelineSteps
from reft_ray.rows.text import messages_json
from reft_ray.screening.config import ScreenConfig
from reft_ray.screening.dataset import screen
from reft_ray.telemetry import logs

FEW, MORE = 8, 40
"""Rows of the runs of a stage: what they have in common is its fixed time."""

LEAST_SHARE = 0.02
"""Of a run's time that its rows take at least, however noisy the clock."""

STEPS = 4
DRIVERS = 2
"""A job has one before the queue and one after it; each imports everything."""

logger = logging.getLogger("reft_ray.pipeline.speed")


def measure_speed(context: ModelContext, shared: Path, device: str = "auto", devices: int = 1) -> Speed:
    """Screen, train and gate a few alignment rows under the base's own settings, and time each of it.

    Soft labels that are not in `shared` yet belong to the fixed time: the first job makes them. Raises ReftError where
    the base has no alignment rows, or a stage fails.
    """
    rows = [row for row in context.alignment(None) if row.answered]
    if not rows:
        raise ReftError("without alignment rows there is nothing to measure with; set `speed` of the base model")
    with tempfile.TemporaryDirectory(prefix="reft-speed-") as folder:
        scratch = Path(folder)
        imports = _seconds(lambda: subprocess.run([sys.executable, "-c", "import reft_ray.pipeline.steps"], check=True))
        screening, per_row = _line(lambda count, name: _screen(context, rows, count, scratch / f"screen-{name}"))
        gate, per_prompt = _line(lambda count, _: _gate(context, count, device))
        prompts = len(context.harmful()) + len(context.harmless())
        training = _train(context, rows, scratch)
        labels = _labels(context, rows, shared, scratch)
    return Speed(
        training_tokens=training.tokens / training.seconds,
        screening_rows=1 / per_row,
        # The gate asks the student, and the base once for all jobs.
        start_seconds=DRIVERS * imports + screening + training.fixed + labels + 2 * (gate + prompts * per_prompt),
        devices=devices,
        overhead=0.0,
        step_seconds=training.seconds / training.steps,
    )


class _Training:
    """What `STEPS` steps took between their first and last report, and a run without them."""

    def __init__(self, tokens: float, seconds: float, steps: int, fixed: float) -> None:
        self.tokens, self.seconds, self.steps, self.fixed = tokens, seconds, steps, fixed


def _train(context: ModelContext, rows: Sequence[Example], scratch: Path) -> _Training:
    preset = FinetuneConfig.of({"base": context.base, **context.args.finetune})
    config = FinetuneConfig.of(
        preset.model_dump() | {"epochs": 1, "min_steps": 0, "log_every": 1, "checkpoint_every": STEPS, "seed": 0}
    )
    users = _cycled(rows, (STEPS + 1) * config.batch_rows)
    resources = context.args.resources.model_copy(
        update={"storage": str(scratch / "runs"), "shared": str(scratch / "shared")}
    )
    inputs = FinetuneInputs(users, len(users), rows[:MORE] if config.method.distills else (), context.teacher)
    reports: list[tuple[float, Mapping[str, Any]]] = []
    began = time.perf_counter()
    # Labels of the few rows are made first: those of a job are counted by themselves.
    made = 0.0
    if config.caches_labels:
        made = _seconds(
            lambda: ensure_soft_targets(config, context.teacher, rows[:MORE], scratch / "shared" / "targets")
        )
    finetune(
        config, inputs, scratch / "student", resources, "speed",
        lambda metrics: reports.append((time.perf_counter(), dict(metrics))),
    )  # fmt: skip
    whole = time.perf_counter() - began - made
    chat, longest = ChatFormat(load_tokenizer(context.base)), config.longest_row(context_of(context.base))
    tokens = sum(min(longest, sum(map(len, chat.sequences(row)))) for row in users) / len(users)
    (first, _), *_, (last, _) = (report for report in reports if "step" in report[1])
    seconds, steps = last - first, STEPS
    return _Training(
        tokens * config.batch_rows * steps, seconds, steps, max(0.0, whole - seconds * (steps + 1) / steps)
    )


def _labels(context: ModelContext, rows: Sequence[Example], shared: Path, scratch: Path) -> float:
    """The seconds of the soft labels that the first small job makes; 0 where they are made."""
    config = FinetuneConfig.of({"base": context.base, **context.args.finetune})
    alignment = enough_alignment(context.alignment(None), 0)
    if not config.caches_labels or is_complete(
        soft_targets_path(config, context.teacher, alignment, shared / "targets")
    ):
        return 0.0
    fixed, per_row = _line(
        lambda count, name: _seconds(
            lambda: ensure_soft_targets(config, context.teacher, _cycled(rows, count), scratch / f"labels-{name}")
        )
    )
    return fixed + per_row * len(alignment)


def _screen(context: ModelContext, rows: Sequence[Example], count: int, out: Path) -> float:
    args, file = context.args.screening, out.with_suffix(".jsonl")
    lines = (f'{{"messages":{messages_json(row.messages)}}}\n' for row in _cycled(rows, count))
    file.write_text("".join(lines))
    config = ScreenConfig(findings=args.findings, batch_rows=args.batch_rows, small_rows=args.small_rows)

    def run() -> None:
        with suppress(BlockedByPolicyError):
            screen([str(file)], str(out), partial(load_scorer, context.teacher.folder, context.base), config)

    return _seconds(run)


def _gate(context: ModelContext, count: int, device: str) -> float:
    args = context.args.gate
    prompts = [row.prompt for row in _cycled([*context.harmful(), *context.harmless()], count)]
    request = MeasureRequest(Suite(prompts), (), args.max_new_tokens, args.batch_tokens)
    return _seconds(lambda: measure(context.base, None, request, device))


def _line(run: Callable[[int, str], float]) -> tuple[float, float]:
    """Fixed seconds and those per row, of runs of FEW and of MORE rows, each with a name.

    The first run also pays for what a process does once, as a job does: the rows' time is that of the two after it.
    """
    first, few, more = run(FEW, "first"), run(FEW, "few"), run(MORE, "more")
    per_row = max(LEAST_SHARE * more / MORE, (more - few) / (MORE - FEW))
    return max(0.0, first - FEW * per_row), per_row


def _cycled(rows: Sequence[Example], count: int) -> list[Example]:
    return list(islice(cycle(rows), count))


def _seconds(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def measured(config: DriverConfig, models: Sequence[str]) -> Iterator[str]:
    """Measure those of these models that have no speed, and keep it; yields each of them. A failure is logged.

    Of several processes of one service on this machine only one measures.
    """
    steps = config.make_steps()
    if not isinstance(steps, PipelineSteps):
        return
    kept, folder = FirstSpeeds(ContentStore(config.files_uri)), steps.config.folder
    folder.mkdir(parents=True, exist_ok=True)
    with suppress(Timeout), FileLock(folder / "speed.lock", timeout=0):
        for name in models:
            if kept.of(name) is not None:
                continue
            try:
                speed = measure_speed(ModelContext(steps.config.base(name)), folder, steps.config.device)
            except ReftError as error:
                logger.warning("the speed of %s was not measured: %s", name, error)
                continue
            kept.put(name, speed)
            logger.info("the speed of %s: %s", name, json.dumps(speed.model_dump()))
            yield name


def main() -> int:
    """The command line: the models' names; the configuration is a driver's, from the environment."""
    spin_briefly()
    logs.configure(whole_process=True)
    list(measured(DriverConfig.from_environment(), sys.argv[1:]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
