"""Ray Train: both stages as data-parallel runs over N workers that survive the loss of some.

`workers=0` runs the same loop in this process, without a cluster.
"""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray.data
import ray.train
import torch
from ray.train import CheckpointConfig, DataConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from reft_ray.core.conversation import Example
from reft_ray.core.errors import ReftError, StoppedError
from reft_ray.finetuning.config import FinetuneConfig, Resources, TeacherConfig
from reft_ray.finetuning.dataset import ShardRows, dataset_of, tokenised
from reft_ray.finetuning.export import EXPORT, collect_export
from reft_ray.finetuning.metrics import TrainingMetrics
from reft_ray.finetuning.progress import Channel, Sender
from reft_ray.finetuning.ray_runtime import RayRuntime, as_tasks, cause_of, set_threads
from reft_ray.finetuning.rows import RowSource, digest_of, enough_alignment
from reft_ray.finetuning.runtime import LocalRuntime, Phase, Progress, Runtime, Stop, no_phase
from reft_ray.finetuning.student_loop import train_student
from reft_ray.finetuning.targets import ensure_soft_targets, soft_targets_on_worker, soft_targets_path
from reft_ray.finetuning.teacher_gate import check_teacher, few_steps
from reft_ray.finetuning.teacher_loop import TeacherData, train_teacher
from reft_ray.hf.adapter_files import ADAPTER, MODEL, OutputKind, check_replaceable
from reft_ray.hf.compute import use_threads
from reft_ray.hf.ref_teacher import TEACHER, RefTeacher
from reft_ray.hf.soft_targets import PART_ROWS, is_complete
from reft_ray.openmp import waiting_variables
from reft_ray.telemetry.recorder import Recorder

logger = logging.getLogger(__name__)

_USER = "user"
_START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
_KEPT_CHECKPOINTS = 2


@dataclass(frozen=True, slots=True)
class FinetuneInputs:
    """What a finetuning run reads besides its configuration.

    `rows` were screened already: a dataset with the columns of `finetuning.rows`, of `count` rows, or examples.
    `validation` rows are not learned, and every worker has them in memory. `identity` identifies the rows of a dataset,
    so that no run resumes with other rows; that of examples is computed.
    """

    rows: ray.data.Dataset | Sequence[Example]
    count: int
    alignment: Sequence[Example] = ()
    teacher: RefTeacher | None = None
    validation: Sequence[Example] = ()
    identity: str = ""

    @property
    def rows_identity(self) -> str:
        """The identity of the rows in a checkpoint."""
        known = self.identity or ("" if isinstance(self.rows, ray.data.Dataset) else digest_of(self.rows))
        return f"{self.count} {known}"

    def for_run(self, config: FinetuneConfig) -> FinetuneInputs:
        """The same with no more alignment rows than the run needs."""
        return replace(self, alignment=enough_alignment(self.alignment, config.alignment_draws(self.count)))


def prepare_teacher(
    config: TeacherConfig,
    data: TeacherData,
    out: Path,
    resources: Resources | None = None,
    run_id: str | None = None,
    progress: Progress | None = None,
    recorder: Recorder | None = None,
) -> RefTeacher:
    """Stage 1: train a Ref-Teacher and write its artefact to `out`. The same `run_id` resumes."""
    resources = resources or Resources()
    progress = TrainingMetrics(recorder, "teacher", progress) if recorder else progress
    sharded = resources.strategy == "fsdp"

    def loop(runtime: Runtime, _rows: ray.data.DataIterator | None) -> None:
        train_teacher(runtime, config, data, sharded)

    _run(loop, None, out, TEACHER, resources, run_id or f"teacher-{uuid.uuid4().hex[:12]}", progress)
    return RefTeacher.load(out)


def finetune(
    config: FinetuneConfig,
    inputs: FinetuneInputs,
    out: Path,
    resources: Resources | None = None,
    run_id: str | None = None,
    progress: Progress | None = None,
    recorder: Recorder | None = None,
    stop: Stop | None = None,
    phase: Phase = no_phase,
) -> Path:
    """Stage 2: finetune a student and export it to `out`. The same `run_id` on the same storage resumes.

    Raises StoppedError once `stop` was True and a checkpoint is written, or while soft labels are made;
    ReftError when something is missing, or when the run fails more often than its resources allow.
    """
    resources = resources or Resources()
    inputs = inputs.for_run(config)
    progress = TrainingMetrics(recorder, "student", progress) if recorder else progress
    if inputs.teacher is None and config.reads_teacher:
        raise ReftError(f"method={config.method} with labels={config.labels}, init={config.init} needs a Ref-Teacher")
    # Raised here, once: a worker that raises it would be restarted `max_failures` times.
    if inputs.teacher and config.init == "aligned" and inputs.teacher.manifest.weights != "lora":
        raise ReftError(f"init=aligned starts from a LoRA teacher, and {inputs.teacher.id} has full weights")
    for warning in (check_teacher(config, inputs.teacher), few_steps(config, inputs.teacher, inputs.count)):
        if warning:
            logger.warning("%s", warning)
    if out.resolve() == Path(config.base).resolve():
        raise ReftError(f"{out} is the base model that is finetuned: choose another directory")
    targets: Path | None = None
    if inputs.teacher and config.caches_labels:
        targets = Path(resources.shared or _storage(resources, out)) / "targets"
        _make_soft_targets(config, inputs.teacher, inputs.alignment, targets, resources, stop, phase)
    rows, dataset = inputs.rows, None
    if resources.workers and not isinstance(rows, ray.data.Dataset):
        rows = dataset_of(rows)
    if isinstance(rows, ray.data.Dataset):
        phase("tokenising", 0.0, "")
        dataset = tokenised(rows, config)
    examples = [] if isinstance(rows, ray.data.Dataset) else rows
    count, alignment, teacher, validation = inputs.count, inputs.alignment, inputs.teacher, inputs.validation
    sharded, identity = resources.strategy == "fsdp", inputs.rows_identity

    def loop(runtime: Runtime, shard: ray.data.DataIterator | None) -> None:
        source: RowSource = examples if shard is None else ShardRows(shard, count)
        train_student(runtime, config, source, alignment, teacher, targets, sharded, validation, identity)

    product = ADAPTER if config.weights == "lora" else MODEL
    run_id = run_id or f"finetune-{uuid.uuid4().hex[:12]}"
    return _run(loop, dataset, out, product, resources, run_id, progress, stop, phase)


def _make_soft_targets(
    config: FinetuneConfig,
    teacher: RefTeacher,
    alignment: Sequence[Example],
    folder: Path,
    resources: Resources,
    stop: Stop | None,
    phase: Phase,
) -> None:
    gpu = resources.gpus_per_worker > 0
    phase("soft labels", 0.0, "")
    if resources.workers == 0:
        use_threads(resources.cpus_per_worker)
        device = "cuda" if gpu and torch.cuda.is_available() else "cpu"
        ensure_soft_targets(config, teacher, alignment, folder, device, lambda share: phase("soft labels", share, ""))
    elif not is_complete(soft_targets_path(config, teacher, alignment, folder)):
        # The process that drives a run may lack the memory for a whole teacher.
        tasks = max(1, min(resources.workers, -(-len(alignment) // PART_ROWS)))
        shares = [(config, teacher, alignment, folder, gpu, (rank, tasks)) for rank in range(tasks)]
        as_tasks("making soft labels", soft_targets_on_worker, shares, resources, stop)


Loop = Callable[[Runtime, "ray.data.DataIterator | None"], None]


def _storage(resources: Resources, out: Path) -> str:
    storage = resources.storage or str(out.parent / ".runs")
    return storage if "://" in storage else str(Path(storage).absolute())


def _run(
    loop: Loop,
    dataset: ray.data.Dataset | None,
    out: Path,
    product: OutputKind,
    resources: Resources,
    run_id: str,
    progress: Progress | None,
    stop: Stop | None = None,
    phase: Phase = no_phase,
) -> Path:
    check_replaceable(out, product)
    storage = _storage(resources, out)
    if resources.workers == 0:
        device = "cuda" if resources.gpus_per_worker else "cpu"
        use_threads(resources.cpus_per_worker)
        runtime = LocalRuntime(Path(storage) / run_id, progress, device, stop, phase)
        loop(runtime, dataset.iterator() if dataset is not None else None)
        return _collected(runtime.latest_checkpoint(), out, product, run_id, stop)
    phase("starting workers", 0.0, "")
    followed = progress or stop or phase is not no_phase
    with Channel(progress, stop, phase) if followed else nullcontext() as channel:
        sender = Sender(channel.queue, channel.flag) if channel else None

        def worker(_config: Mapping[str, Any]) -> None:
            set_threads()
            loop(RayRuntime(sender), ray.train.get_dataset_shard(_USER) if dataset is not None else None)

        trainer = TorchTrainer(
            worker,
            train_loop_config={},
            scaling_config=ScalingConfig(
                num_workers=_worker_range(resources),  # type: ignore[arg-type]  # a range is of Train's version 2
                use_gpu=resources.gpus_per_worker > 0,
                resources_per_worker={"CPU": resources.cpus_per_worker or 1}
                | ({"GPU": resources.gpus_per_worker} if resources.gpus_per_worker else {}),
            ),
            run_config=RunConfig(
                name=run_id,
                storage_path=storage,
                worker_runtime_env={"env_vars": waiting_variables()},
                # Without a limit on controller failures it retries an infeasible request forever. Nodes that are taken
                # away with notice count as neither.
                failure_config=FailureConfig(max_failures=resources.max_failures, controller_failure_limit=3),  # type: ignore[call-arg]
                checkpoint_config=CheckpointConfig(num_to_keep=_KEPT_CHECKPOINTS),
            ),
            datasets={_USER: dataset} if dataset is not None else None,
            dataset_config=_every_rank_reads_all(),
        )
        try:
            with _start_timeout(resources.start_minutes):
                result = trainer.fit()
        except ray.train.TrainingFailedError as error:
            raise ReftError(f"run {run_id} failed: {cause_of(error)}") from error
    if result.checkpoint is None:
        return _collected(None, out, product, run_id, stop)
    with result.checkpoint.as_directory() as folder:
        return _collected(Path(folder), out, product, run_id, stop)


def _worker_range(resources: Resources) -> int | tuple[int, int]:
    """The workers, or the least and the most of an elastic run."""
    least = resources.min_workers
    return resources.workers if least is None or least >= resources.workers else (least, resources.workers)


@contextmanager
def _start_timeout(minutes: float) -> Iterator[None]:
    """Let a group of workers take this long to start: by default Ray waits one minute, less than a GPU node boots."""
    before = os.environ.get(_START_TIMEOUT)
    if before is None:
        os.environ[_START_TIMEOUT] = str(60 * minutes)
    try:
        yield
    finally:
        if before is None:
            del os.environ[_START_TIMEOUT]


def _collected(checkpoint: Path | None, out: Path, product: OutputKind, run_id: str, stop: Stop | None) -> Path:
    if checkpoint is None:
        raise ReftError(f"run {run_id} ended without a checkpoint")
    if stop is not None and not (checkpoint / EXPORT).is_dir():
        raise StoppedError(f"run {run_id} was stopped; its state is saved")
    return collect_export(checkpoint, out, product)


def _every_rank_reads_all() -> DataConfig:
    """Rows in one fixed order on every rank, which takes its slice of each global batch (`finetuning.rows`).

    Ray's equal split drops up to a row per rank and assigns rows as they arrive.
    """
    options = ray.data.ExecutionOptions(preserve_order=True)
    return DataConfig(datasets_to_split=[], execution_options=options)
