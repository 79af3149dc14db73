"""Screening on Ray Data: one actor reads, an actor pool judges and writes, and the driver receives counts only.

A unit is one row of a block, so that Ray can split and merge blocks without splitting a unit. Backpressure stops the
reader while the pool is busy; memory depends on the units in flight, not on the file.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, ExecutionResources
from ray.exceptions import RayError

from reft_ray.core.errors import ReftError, UsageError, first_line
from reft_ray.local_ray import ensure_ray
from reft_ray.screening.config import ScreenConfig
from reft_ray.screening.metrics import ScreeningMetrics
from reft_ray.screening.reading import FilePlan, Unit, groups, read_units
from reft_ray.screening.unit_worker import Finished, Job, Pass, UnitWorker, judges_of, worker_of
from reft_ray.telemetry.shared_recorder import SharedRecorder

IN_FLIGHT_BYTES = 384 << 20
UNITS_IN_FLIGHT = 2

logger = logging.getLogger(__name__)

_UNIT_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("file", pa.int64()),
        pa.field("rows", pa.large_binary()),
        pa.field("native", pa.large_binary()),
        pa.field("error", pa.string()),
    ]
)
_DONE_SCHEMA = pa.schema([pa.field("unit", pa.string()), pa.field("rows", pa.int64()), pa.field("error", pa.string())])


def screen_on_ray(plans: Sequence[FilePlan], done: frozenset[str], job: Job) -> Iterator[Finished]:
    """Do the job's pass on every unit that is not done and yield each as it finishes, in any order.

    Raises ReftError where a reader, a scorer or Ray fails.
    """
    tasks = [
        {"file": plan.index, "numbers": [unit.number for unit in group]}
        for plan in plans
        for group in groups(plan, done)
    ]
    if not tasks:
        return
    config = job.config
    _ensure_ray_for(config)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks))
    context = dataset.context
    context.target_max_block_size = 1  # one block per unit, for progress and cheap retries
    context.enable_progress_bars = False
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=IN_FLIGHT_BYTES)
    finished = dataset.map_batches(
        _Reader,
        fn_constructor_args=(list(plans),),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=0,
        compute=ActorPoolStrategy(size=1),
    ).map_batches(
        _Worker,
        fn_constructor_args=(job,),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=config.cpus_per_actor,
        num_gpus=(job.step is not Pass.WRITE and config.gpus_per_actor) or None,
        compute=ActorPoolStrategy(
            min_size=1,
            max_size=config.actors,
            initial_size=config.actors,
            max_tasks_in_flight_per_actor=UNITS_IN_FLIGHT,
        ),
    )
    try:
        for batch in finished.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for done_unit in batch.to_pylist():  # type: ignore[union-attr]
                if done_unit["error"] is not None:
                    raise _error_from(done_unit["error"])
                yield Finished(done_unit["unit"], done_unit["rows"])
    except RayError as error:
        raise ReftError(f"screening stopped: {type(error).__name__}; run again to resume") from error


def _ensure_ray_for(config: ScreenConfig) -> None:
    """Join or start a Ray.

    Raises UsageError where a local Ray lacks the resources of a single actor, which would wait forever; any other
    cluster may grow.
    """
    if not ensure_ray():
        return
    for name, needed in (("CPU", config.cpus_per_actor), ("GPU", config.gpus_per_actor)):
        if needed > (available := ray.cluster_resources().get(name, 0.0)):
            raise UsageError(f"an actor asks for {needed:g} {name}s and this machine has {available:g}")


def judges_on_ray(job: Job) -> dict[str, Any]:
    """The judges of the job, loaded with the resources of a worker."""
    config = job.config
    _ensure_ray_for(config)
    ask = ray.remote(num_cpus=config.cpus_per_actor, num_gpus=config.gpus_per_actor)(judges_of)
    try:
        found: dict[str, Any] = ray.get(ask.remote(job))
    except RayError as error:
        raise ReftError(
            f"could not load the scorer on a worker ({type(error).__name__}); run again to resume"
        ) from error
    return found


class _Reader:
    """Reads groups of ranges, one unit at a time."""

    def __init__(self, plans: Sequence[FilePlan]) -> None:
        self._plans = {plan.index: plan for plan in plans}

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        try:
            for task in batch.to_pylist():
                plan = self._plans[task["file"]]
                for unit in read_units(plan, [plan.cuts.ranges[number] for number in task["numbers"]]):
                    native = None if unit.native is None else _to_ipc(unit.native)
                    yield pa.table(
                        [[unit.id], [unit.file], [_to_ipc(unit.rows)], [native], [None]], schema=_UNIT_SCHEMA
                    )
        except ReftError as error:
            yield pa.table([[None], [None], [None], [None], [_error_text(error)]], schema=_UNIT_SCHEMA)


class _Worker:
    """Judges and writes units. User errors are returned as values: Ray would wrap them in a traceback."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._worker: UnitWorker | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        (packed,) = batch.to_pylist()
        if packed["error"] is not None:
            return pa.table([[None], [None], [packed["error"]]], schema=_DONE_SCHEMA)
        native = None if packed["native"] is None else _from_ipc(packed["native"])
        try:
            if self._worker is None:
                self._recorder = SharedRecorder(self._job.application)
                self._worker = worker_of(self._job, ScreeningMetrics(self._recorder, self._job.project))
            done = self._worker.work(Unit(packed["id"], packed["file"], _from_ipc(packed["rows"]), native))
            # Ray ends the actors of a pool without calling anything.
            self._recorder.flush()
        except ReftError as error:
            return pa.table([[None], [None], [_error_text(error)]], schema=_DONE_SCHEMA)
        except Exception as error:  # scorers and guards may raise anything; the traceback stays in the worker's log
            logger.exception("unit %s failed", packed["id"])
            failed = ReftError(f"a worker failed: {type(error).__name__}: {first_line(error)}")
            return pa.table([[None], [None], [_error_text(failed)]], schema=_DONE_SCHEMA)
        return pa.table([[done.unit], [done.rows], [None]], schema=_DONE_SCHEMA)


def _error_text(error: ReftError) -> str:
    return json.dumps([type(error).__name__, str(error)])


def _error_from(text: str) -> ReftError:
    name, message = json.loads(text)
    known: list[type[ReftError]] = [ReftError, *ReftError.__subclasses__()]
    kinds = {kind.__name__: kind for kind in known}
    return kinds.get(name, ReftError)(message)


def _to_ipc(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _from_ipc(content: bytes) -> pa.Table:
    return pa.ipc.open_stream(content).read_all()
