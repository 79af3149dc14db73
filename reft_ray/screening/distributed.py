"""Screening on Ray Data: one actor reads, a pool of actors judges and writes, and the driver sees counts only.

A unit travels as one row of a block, so that Ray may split and merge blocks as it likes without ever tearing a unit.
The reader is held back while the others are busy; the rows in flight, not the file, decide how much memory it takes.
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

from reft_ray.core.errors import ReftError, UsageError
from reft_ray.local_ray import ensure_ray
from reft_ray.screening.config import ScreenConfig
from reft_ray.screening.metrics import ScreeningMetrics
from reft_ray.screening.reading import FilePlan, Unit, groups, read_units
from reft_ray.screening.unit_worker import Finished, Job, UnitWorker, judges_of
from reft_ray.telemetry.shared_recorder import SharedRecorder

IN_FLIGHT_BYTES = 384 << 20
UNITS_IN_FLIGHT = 2

logger = logging.getLogger(__name__)

_PARCEL = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("file", pa.int64()),
        pa.field("rows", pa.large_binary()),
        pa.field("native", pa.large_binary()),
        pa.field("error", pa.string()),
    ]
)
_DONE = pa.schema([pa.field("unit", pa.string()), pa.field("rows", pa.int64()), pa.field("error", pa.string())])


def screen_on_ray(plans: Sequence[FilePlan], done: frozenset[str], job: Job) -> Iterator[Finished]:
    """Screen every unit that is not done; yields each as it is finished, in no particular order.

    Raises what a scorer or reader raised, as a ReftError where it was one.
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
    context.target_max_block_size = 1  # a block for each unit: progress is seen, and little is done twice
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
        num_gpus=config.gpus_per_actor or None,
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
        raise ReftError(f"screening stopped: {type(error).__name__}; run it again to resume") from error


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
    """Who would judge a unit of the job, asked with the resources of a worker."""
    config = job.config
    _ensure_ray_for(config)
    ask = ray.remote(num_cpus=config.cpus_per_actor, num_gpus=config.gpus_per_actor)(judges_of)
    try:
        found: dict[str, Any] = ray.get(ask.remote(job))
    except RayError as error:
        raise ReftError(f"nobody said who judges: {type(error).__name__}; run it again to resume") from error
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
                    native = None if unit.native is None else _packed(unit.native)
                    yield pa.table([[unit.id], [unit.file], [_packed(unit.rows)], [native], [None]], schema=_PARCEL)
        except ReftError as error:
            yield pa.table([[None], [None], [None], [None], [_error_text(error)]], schema=_PARCEL)


class _Worker:
    """Judges and writes units. Errors for the user travel as values: Ray would bury them in a traceback."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._worker: UnitWorker | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        (parcel,) = batch.to_pylist()
        if parcel["error"] is not None:
            return pa.table([[None], [None], [parcel["error"]]], schema=_DONE)
        native = None if parcel["native"] is None else _unpacked(parcel["native"])
        try:
            if self._worker is None:
                self._recorder = SharedRecorder(self._job.application)
                self._worker = UnitWorker(self._job, ScreeningMetrics(self._recorder, self._job.project))
            done = self._worker.work(Unit(parcel["id"], parcel["file"], _unpacked(parcel["rows"]), native))
            # The pool ends its actors without a word.
            self._recorder.flush()
        except ReftError as error:
            return pa.table([[None], [None], [_error_text(error)]], schema=_DONE)
        except Exception as error:  # a scorer or guard may raise anything; its traceback stays in the worker's log
            logger.exception("unit %s failed", parcel["id"])
            failed = ReftError(f"a worker failed: {type(error).__name__}: {first_line(error)}")
            return pa.table([[None], [None], [_error_text(failed)]], schema=_DONE)
        return pa.table([[done.unit], [done.rows], [None]], schema=_DONE)


def first_line(error: BaseException) -> str:
    """An error's first line, or nothing."""
    return next(iter(str(error).splitlines()), "")


def _error_text(error: ReftError) -> str:
    return json.dumps([type(error).__name__, str(error)])


def _error_from(text: str) -> ReftError:
    name, message = json.loads(text)
    known: list[type[ReftError]] = [ReftError, *ReftError.__subclasses__()]
    kinds = {kind.__name__: kind for kind in known}
    return kinds.get(name, ReftError)(message)


def _packed(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _unpacked(content: bytes) -> pa.Table:
    return pa.ipc.open_stream(content).read_all()
