"""Screening on Ray Data: one actor reads, a pool of actors judges and writes, and the driver sees counts only.

A unit travels as one row of a block, so that Ray may split and merge blocks as it likes without ever tearing a unit.
The reader is held back while the others are busy; the rows in flight, not the file, decide how much memory it takes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import ray
from ray.data import ActorPoolStrategy, ExecutionResources
from ray.exceptions import RayError, RayTaskError

from reft_ray.core.errors import ReftError
from reft_ray.screening.cluster import ensure_ray
from reft_ray.screening.reading import FilePlan, Unit, groups, read_units
from reft_ray.screening.work import Finished, Job, UnitWorker

BLOCK_BYTES = 8 << 20
IN_FLIGHT_BYTES = 384 << 20
UNITS_IN_FLIGHT = 2

_PARCEL = pa.schema(
    [
        pa.field("id", pa.string()),
        pa.field("file", pa.int64()),
        pa.field("rows", pa.large_binary()),
        pa.field("native", pa.large_binary()),
    ]
)


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
    ensure_ray()
    config = job.config
    dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks))
    context = dataset.context
    context.target_max_block_size = BLOCK_BYTES
    context.enable_progress_bars = False
    context.execution_options.resource_limits = ExecutionResources(object_store_memory=IN_FLIGHT_BYTES)
    finished = dataset.map_batches(
        _Reader,
        fn_constructor_args=(ray.put(list(plans)),),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=0,
        compute=ActorPoolStrategy(size=1),
    ).map_batches(
        _Worker,
        fn_constructor_args=(ray.put(job),),
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
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    try:
        for batch in finished.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from map(Finished, batch["unit"].to_pylist(), batch["rows"].to_pylist())  # type: ignore[union-attr]
    except RayTaskError as error:
        if isinstance(error.cause, ReftError):
            raise error.cause from error
        raise ReftError(f"a worker failed: {type(error.cause).__name__}: {error.cause}") from error
    except RayError as error:
        raise ReftError(f"screening stopped: {type(error).__name__}; run it again to resume") from error


class _Reader:
    """Reads groups of ranges, one unit at a time."""

    def __init__(self, plans: Any) -> None:
        self._plans: dict[int, FilePlan] = {plan.index: plan for plan in ray.get(plans)}

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        for task in batch.to_pylist():
            plan = self._plans[task["file"]]
            for unit in read_units(plan, [plan.cuts.ranges[number] for number in task["numbers"]]):
                yield pa.table(
                    [[unit.id], [unit.file], [_packed(unit.rows)], [unit.native and _packed(unit.native)]],
                    schema=_PARCEL,
                )


class _Worker:
    """Judges and writes units."""

    def __init__(self, job: Any) -> None:
        self._worker = UnitWorker(ray.get(job))

    def __call__(self, batch: pa.Table) -> pa.Table:
        finished = []
        for parcel in batch.to_pylist():
            native = parcel["native"] and _unpacked(parcel["native"])
            unit = Unit(parcel["id"], parcel["file"], _unpacked(parcel["rows"]), native)
            finished.append(self._worker.work(unit))
        return pa.table({"unit": [done.unit for done in finished], "rows": [done.rows for done in finished]})


def _packed(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _unpacked(content: bytes) -> pa.Table:
    return pa.ipc.open_stream(content).read_all()
