"""Screening on Ray Data: tasks read units in parallel, an actor pool judges them, and the driver receives counts only.

Writing parts from stored verdicts needs no teacher, so it is done by tasks: a screening starts one pool. A unit, or
some small ones of as many rows together, is one row of a block, so that Ray can split and merge blocks without
splitting a unit. Backpressure stops the readers while the pool is busy; memory depends on the units in flight, which
are as many as the actors need, not on the file.
"""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, Datasource, ExecutionResources, ReadTask
from ray.data.block import BlockMetadata
from ray.exceptions import RayError

from reft_ray.core.errors import ReftError, UsageError, first_line
from reft_ray.local_ray import ensure_ray
from reft_ray.screening.config import ScreenConfig
from reft_ray.screening.metrics import ScreeningMetrics
from reft_ray.screening.pieces import SPAN_BYTES, batches
from reft_ray.screening.ranges import Cuts, Limits, Range
from reft_ray.screening.reading import GROUP_BYTES, FilePlan, Unit, groups, read_units
from reft_ray.screening.unit_worker import Finished, Job, Pass, UnitWorker, judges_of, worker_of
from reft_ray.telemetry.shared_recorder import SharedRecorder

IN_FLIGHT_BYTES = 384 << 20
IN_FLIGHT_BYTES_PER_ACTOR = 32 << 20
"""What is in flight at least, and for each actor: two units that are judged and a few that were read."""
UNITS_IN_FLIGHT = 2

Item = TypeVar("Item")
Result = TypeVar("Result")

logger = logging.getLogger(__name__)

_UNIT = pa.struct(
    [
        pa.field("id", pa.string()),
        pa.field("file", pa.int64()),
        pa.field("rows", pa.large_binary()),
        pa.field("native", pa.large_binary()),
    ]
)
_UNITS_SCHEMA = pa.schema([pa.field("units", pa.list_(_UNIT)), pa.field("error", pa.string())])
_DONE = pa.struct([pa.field("unit", pa.string()), pa.field("rows", pa.int64())])
_DONE_SCHEMA = pa.schema([pa.field("done", pa.list_(_DONE)), pa.field("error", pa.string())])


def screen_on_ray(plans: Sequence[FilePlan], done: frozenset[str], job: Job) -> Iterator[Finished]:
    """Do the job's pass on every unit that is not done and yield each as it finishes, in any order.

    Raises ReftError where a reader, a scorer or Ray fails.
    """
    config = job.config
    tasks = reading_tasks(plans, done)
    if not tasks:
        return
    _ensure_ray_for(config)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    source = _UnitsDatasource(tasks, config.limits)
    dataset = ray.data.read_datasource(source, override_num_blocks=len(tasks))
    context = dataset.context
    context.target_max_block_size = 1  # a block for each row: for progress and cheap retries
    context.enable_progress_bars = False
    in_flight = max(IN_FLIGHT_BYTES, config.actors * IN_FLIGHT_BYTES_PER_ACTOR)
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=in_flight)
    finished = dataset.map_batches(
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
            for row in batch.to_pylist():
                yield from (Finished(**one) for one in row["done"])
                if row["error"] is not None:
                    raise _error_from(row["error"])
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


def each_on_ray(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """`map` in tasks, each of which has items of about `pieces.SPAN_BYTES` together: in order, as they are done.

    Raises the ReftError of an item, and ReftError where Ray fails.
    """
    ensure_ray()
    task: Any = ray.remote(num_cpus=1)(_each)
    pending = deque(task.options(name="planning").remote(work, batch) for batch in batches(items, SPAN_BYTES))
    try:
        while pending:
            results, error = ray.get(pending.popleft())
            yield from results
            if error is not None:
                raise _error_from(error)
    except RayError as error:
        raise ReftError(f"planning stopped: {type(error).__name__}; run again") from error
    finally:
        for task_left in pending:
            ray.cancel(task_left)


def _each(work: Callable[[Item], Result], items: Sequence[Item]) -> tuple[list[Result], str | None]:
    """The results up to the first error, and that error: Ray would wrap it in a traceback."""
    results: list[Result] = []
    try:
        for item in items:
            results.append(work(item))
    except ReftError as error:
        return results, _error_text(error)
    return results, None


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


@dataclass(frozen=True, slots=True)
class _Ranges:
    """Ranges of a file that are read together, and about how many bytes they have."""

    plan: FilePlan
    size: int

    @classmethod
    def of(cls, plan: FilePlan, group: tuple[Range, ...]) -> _Ranges:
        """A group of the plan's ranges."""
        size = plan.source.size * len(group) // max(1, len(plan.cuts.ranges))
        return cls(replace(plan, cuts=Cuts(group, plan.cuts.rows, plan.cuts.header)), size)


def reading_tasks(plans: Sequence[FilePlan], done: frozenset[str] = frozenset()) -> list[list[_Ranges]]:
    """What is left to read, by task: a group of ranges of a large file, or those of several small ones."""
    return list(batches([_Ranges.of(plan, group) for plan in plans for group in groups(plan, done)], GROUP_BYTES))


class _UnitsDatasource(Datasource):
    """Each batch of ranges as a read task, whose units come together up to the limits of one."""

    def __init__(self, tasks: Sequence[Sequence[_Ranges]], limits: Limits) -> None:
        super().__init__()
        self._tasks, self._limits = tasks, limits

    def estimate_inmemory_data_size(self) -> int | None:
        """Bytes of all units, about those of the files."""
        return sum(item.size for task in self._tasks for item in task)

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        """One task for each batch."""
        plans = ([item.plan for item in task] for task in self._tasks)
        return [ReadTask(partial(_units, of_task, self._limits), _METADATA) for of_task in plans]


_METADATA = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)


def _units(plans: Sequence[FilePlan], limits: Limits) -> Iterator[pa.Table]:
    packed: list[dict[str, Any]] = []
    rows, size, error = 0, 0, None
    try:
        for plan in plans:
            for unit in read_units(plan, plan.cuts.ranges):
                native = None if unit.native is None else _to_ipc(unit.native)
                found = _to_ipc(unit.rows)
                packed.append({"id": unit.id, "file": unit.file, "rows": found, "native": native})
                rows, size = rows + unit.rows.num_rows, size + len(found) + len(native or b"")
                if rows >= limits.rows or size >= limits.bytes:
                    yield pa.Table.from_pylist([{"units": packed}], schema=_UNITS_SCHEMA)
                    packed, rows, size = [], 0, 0
    except ReftError as failure:
        error = _error_text(failure)
    if packed or error:
        yield pa.Table.from_pylist([{"units": packed, "error": error}], schema=_UNITS_SCHEMA)


class _Worker:
    """Judges and writes units. User errors are returned as values: Ray would wrap them in a traceback."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._worker: UnitWorker | None = None

    def __call__(self, batch: pa.Table) -> pa.Table:
        (packed,) = batch.to_pylist()
        done: list[dict[str, Any]] = []
        error = packed["error"]
        for unit in packed["units"]:
            try:
                done.append(self._work(unit)._asdict())
            except ReftError as failure:
                error = _error_text(failure)
                break
            except Exception as failure:
                # Scorers and guards may raise anything; the traceback stays in the worker's log.
                logger.exception("unit %s failed", unit["id"])
                error = _error_text(ReftError(f"a worker failed: {type(failure).__name__}: {first_line(failure)}"))
                break
        if self._worker is not None:
            # Ray ends the actors of a pool without calling anything.
            self._recorder.flush()
        # One row: Ray takes a tenth of a second to pass on a block, and makes one of each row.
        return pa.Table.from_pylist([{"done": done, "error": error}], schema=_DONE_SCHEMA)

    def _work(self, packed: dict[str, Any]) -> Finished:
        if self._worker is None:
            self._recorder = SharedRecorder(self._job.application)
            self._worker = worker_of(self._job, ScreeningMetrics(self._recorder, self._job.project))
        native = None if packed["native"] is None else _from_ipc(packed["native"])
        return self._worker.work(Unit(packed["id"], packed["file"], _from_ipc(packed["rows"]), native))


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
