"""Screening a dataset: kept rows, withheld rows with evidence, invalid rows with reasons, and a report."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from reft_ray.core.errors import BlockedByPolicyError, ReftError, StoppedError
from reft_ray.screening.config import ScorerFactory, ScreenConfig
from reft_ray.screening.file_parsing import shape_of
from reft_ray.screening.findings import check_names, sample_share
from reft_ray.screening.html_report import PAGE, render
from reft_ray.screening.manifest import Manifest, manifest_of, open_output
from reft_ray.screening.metrics import ScreeningMetrics
from reft_ray.screening.outputs import UNITS, Output, done_units
from reft_ray.screening.policy import Status
from reft_ray.screening.reading import FilePlan, Unit, groups, plan_files, read_units
from reft_ray.screening.report import REPORT, RowsLostError, ScreenReport, compose
from reft_ray.screening.reviews import Reviews
from reft_ray.screening.sources import find_sources
from reft_ray.screening.unit_state import UnitState
from reft_ray.screening.unit_worker import Finished, Job, UnitWorker, judges_of


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a screening is. `resumed` rows were done by an earlier run; rows are lines, blank ones included."""

    done: int
    total: int
    resumed: int
    seconds: float

    @property
    def rows_per_second(self) -> float:
        """Speed of this run."""
        return (self.done - self.resumed) / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Time to the end at this speed; None while nothing is known."""
        speed = self.rows_per_second
        return (self.total - self.done) / speed if speed > 0 else None


def screen(
    inputs: Sequence[str],
    out: str,
    scorer_factory: ScorerFactory,
    config: ScreenConfig | None = None,
    progress: Callable[[Progress], None] | None = None,
    counting: ScreeningMetrics | None = None,
) -> ScreenReport:
    """Screen every row of the inputs into the directory `out` and report.

    Up to `config.small_rows` rows are screened in this process, more on Ray. Work is done in units whose files appear
    whole or not at all; the same call after a crash does what is missing and ends with the same output.
    `scorer_factory` builds a scorer in each process that judges, so it must pickle; so do workers on Ray count for
    `counting`'s project, each through Ray.

    Raises BlockedByPolicyError, with everything written, when the policy refuses the dataset or asks for a review;
    UsageError for input that cannot be read; ReftError when the output does not add up.
    """
    config = config or ScreenConfig()
    counting = counting or ScreeningMetrics()
    started = time.monotonic()
    try:
        report = _screened(inputs, out, scorer_factory, config, progress, counting)
    except StoppedError:
        raise
    except ReftError as error:
        counting.failed(config, error.rows if isinstance(error, RowsLostError) else 0)
        raise
    counting.ended(report, time.monotonic() - started)
    if report.status is not Status.PASSED:
        raise BlockedByPolicyError(f"{Output(out).name}: {report.status_reason}; see {PAGE} there")
    return report


def _screened(
    inputs: Sequence[str],
    out: str,
    scorer_factory: ScorerFactory,
    config: ScreenConfig,
    progress: Callable[[Progress], None] | None,
    counting: ScreeningMetrics,
) -> ScreenReport:
    check_names(config.findings_off)
    sources = find_sources(inputs, config.container)
    plans = plan_files(sources, config.limits)
    shapes = [shape_of(plan, config.format, config.columns) for plan in plans]
    output = Output(out)
    manifest = manifest_of(config.fingerprint(sources), config.columns, plans, shapes)
    open_output(output, manifest)
    total = sum(plan.cuts.rows for plan in plans)
    sample, application = sample_share(total), counting.recorder.application
    job = Job(scorer_factory, config, shapes, output.uri, sample, counting.project, application)
    done = frozenset(done_units(output))
    _run(plans, done, job, manifest, progress, counting)
    # Where nothing was left to do nobody was built who judges, and another teacher would get the old one's report.
    finished = bool(done) and len(done) == len(manifest.units)
    asked = _who_judges(job, total) if finished else None
    report = compose(_states(output, manifest), plans, shapes, config, Reviews(output.uri).counts(), asked)
    output.write(PAGE, render(report, output, manifest))
    output.write(REPORT, report.to_json())
    return report


def _run(
    plans: Sequence[FilePlan],
    done: frozenset[str],
    job: Job,
    manifest: Manifest,
    progress: Callable[[Progress], None] | None,
    counting: ScreeningMetrics,
) -> None:
    lines = {unit: last - first + 1 for unit, (first, last) in zip(manifest.units, manifest.spans, strict=True)}
    total = sum(plan.cuts.rows for plan in plans)
    resumed = count = sum(lines[unit] for unit in done)
    start = time.monotonic()
    if job.config.threads:
        finished = _in_threads(plans, done, job, counting)
    elif total <= job.config.small_rows:
        finished = _in_process(plans, done, job, counting)
    else:
        finished = _on_ray(plans, done, job)
    for unit in finished:
        count += lines[unit.unit]
        if progress:
            progress(Progress(count, total, resumed, time.monotonic() - start))


def _who_judges(job: Job, total: int) -> dict[str, Any]:
    """Asked where a unit would be judged: only there is room for the models."""
    if job.config.threads or total <= job.config.small_rows:
        return judges_of(job)
    from reft_ray.screening.distributed import judges_on_ray

    return judges_on_ray(job)


def _in_process(
    plans: Sequence[FilePlan], done: frozenset[str], job: Job, counting: ScreeningMetrics
) -> Iterator[Finished]:
    worker = None
    for plan in plans:
        for ranges in groups(plan, done):
            worker = worker or UnitWorker(job, counting)
            yield from map(worker.work, read_units(plan, ranges))


def _in_threads(
    plans: Sequence[FilePlan], done: frozenset[str], job: Job, counting: ScreeningMetrics
) -> Iterator[Finished]:
    """A worker per thread, and as many units in memory as there are threads."""
    own = threading.local()

    def work(unit: Unit) -> Finished:
        if not hasattr(own, "worker"):
            own.worker = UnitWorker(job, counting)
        finished: Finished = own.worker.work(unit)
        return finished

    units = (unit for plan in plans for ranges in groups(plan, done) for unit in read_units(plan, ranges))
    flying: deque[Future[Finished]] = deque()
    pool = ThreadPoolExecutor(job.config.threads)
    try:
        for unit in units:
            flying.append(pool.submit(work, unit))
            if len(flying) >= job.config.threads:
                yield flying.popleft().result()
        while flying:
            yield flying.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _on_ray(plans: Sequence[FilePlan], done: frozenset[str], job: Job) -> Iterator[Finished]:
    from reft_ray.screening.distributed import screen_on_ray

    return screen_on_ray(plans, done, job)


def _states(output: Output, manifest: Manifest) -> Iterator[UnitState]:
    """The state of every unit, in row order; their parts must all be there, whole."""
    sizes = output.sizes()
    for unit in manifest.units:
        name = f"{UNITS}/{unit}.json"
        if name not in sizes:
            raise ReftError(f"{output.name}: unit {unit} was not screened; run again to finish")
        state = UnitState.from_json(output.read(name))
        for part, size in state.parts.items():
            if sizes.get(part) != size:
                raise ReftError(f"{output.name}: {part} is missing or damaged; run again to write it anew")
        yield state
