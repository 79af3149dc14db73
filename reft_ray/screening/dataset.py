"""Screening a dataset: kept rows, withheld rows with evidence, invalid rows with reasons, and a report."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import orjson

from reft_ray.core.errors import BlockedByPolicyError, ReftError, StoppedError
from reft_ray.screening.config import ScorerFactory, ScreenConfig
from reft_ray.screening.dataset_threshold import THRESHOLD, derive, load_threshold, score_share
from reft_ray.screening.file_parsing import shape_of
from reft_ray.screening.findings import check_names, sample_share
from reft_ray.screening.html_report import PAGE, render
from reft_ray.screening.manifest import Manifest, manifest_of, open_output
from reft_ray.screening.metrics import ScreeningMetrics
from reft_ray.screening.outputs import UNITS, Output, done_units
from reft_ray.screening.policy import Status
from reft_ray.screening.reading import FilePlan, Mapper, Unit, groups, plan_files, read_units
from reft_ray.screening.report import REPORT, RowsLostError, ScreenReport, compose
from reft_ray.screening.reviews import Reviews
from reft_ray.screening.sources import Source, find_sources
from reft_ray.screening.stored_verdicts import judged_units, stored_scores
from reft_ray.screening.unit_state import UnitState
from reft_ray.screening.unit_worker import Finished, Job, Pass, UnitWorker, judges_of, worker_of

_LONG_ROW = 32 << 10
"""Bytes of a row that few have more of."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a pass in lines of input, blank ones included; `resumed` were done by an earlier run.

    `writing` is the second pass, which applies the dataset's threshold.
    """

    done: int
    total: int
    resumed: int
    seconds: float
    writing: bool = False

    @property
    def rows_per_second(self) -> float:
        """Throughput of this run."""
        return (self.done - self.resumed) / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Estimated time left; None before the first unit."""
        speed = self.rows_per_second
        return (self.total - self.done) / speed if speed > 0 else None


def screen(
    inputs: Sequence[str | Source],
    out: str,
    scorer_factory: ScorerFactory,
    config: ScreenConfig | None = None,
    progress: Callable[[Progress], None] | None = None,
    metrics: ScreeningMetrics | None = None,
) -> ScreenReport:
    """Screen every row of the inputs into the directory `out` and report.

    Up to `config.small_rows` rows are screened in this process, more on Ray. With `config.job_threshold` a first pass
    judges all rows and a second one writes them under the dataset's threshold. Units are written atomically: the same
    call after a crash, in or between the passes, resumes and gives the same output. `scorer_factory` builds a scorer in
    each process that judges, so it must pickle. Ray workers record the metrics of `metrics.project` themselves.

    Raises BlockedByPolicyError, with everything written, when the policy refuses the dataset or asks for a review;
    UsageError for unreadable input; ReftError for inconsistent output.
    """
    config = config or ScreenConfig()
    metrics = metrics or ScreeningMetrics()
    started = time.monotonic()
    try:
        report = _screened(inputs, out, scorer_factory, config, progress, metrics)
    except StoppedError:
        raise
    except ReftError as error:
        metrics.failed(config, error.rows if isinstance(error, RowsLostError) else 0)
        raise
    metrics.ended(report, time.monotonic() - started)
    if report.status is not Status.PASSED:
        raise BlockedByPolicyError(f"{Output(out).name}: {report.status_reason}; see {PAGE} there")
    return report


def _screened(
    inputs: Sequence[str | Source],
    out: str,
    scorer_factory: ScorerFactory,
    config: ScreenConfig,
    progress: Callable[[Progress], None] | None,
    metrics: ScreeningMetrics,
) -> ScreenReport:
    check_names(config.findings_off)
    sources = find_sources(inputs, config.container)
    each = _mapper(sources, config)
    plans = plan_files(sources, config.limits, each)
    shape = partial(shape_of, fmt=config.format, columns=config.columns, speakers=config.speakers)
    shapes = list(each(shape, [plan.head for plan in plans]))
    output = Output(out)
    manifest = manifest_of(config, sources, plans, shapes)
    open_output(output, manifest)
    total = sum(plan.cuts.rows for plan in plans)
    samples, application = (sample_share(total), score_share(total)), metrics.recorder.application
    job = Job(scorer_factory, config, shapes, output.uri, *samples, metrics.project, application)
    done = frozenset(done_units(output))
    threshold = None
    if config.job_threshold:
        threshold = load_threshold(output)
        judged = frozenset(judged_units(output)) | (done if threshold else frozenset())
        _run(plans, judged, replace(job, step=Pass.JUDGE), manifest, progress, metrics)
        if threshold is None:
            threshold = derive(stored_scores(output, manifest.units), config)
            output.write(THRESHOLD, orjson.dumps(threshold))
        _run(plans, done, replace(job, step=Pass.WRITE, threshold=threshold), manifest, progress, metrics)
    else:
        judged = done
        _run(plans, done, job, manifest, progress, metrics)
    # Where all units were judged no scorer was loaded: check that the report is not one of another teacher.
    finished = bool(judged) and len(judged) == len(manifest.units)
    judges = _judges_of(job, total) if finished else None
    states, reviewed = _states(output, manifest), Reviews(output.uri).counts()
    report = compose(states, plans, shapes, config, reviewed, judges, threshold)
    output.write(PAGE, render(report, output, manifest))
    output.write(REPORT, report.to_json())
    return report


def _mapper(sources: Sequence[Source], config: ScreenConfig) -> Mapper:
    """Where files are planned: on Ray if they surely have more rows than are screened in this process."""
    if config.threads or sum(source.size for source in sources) <= config.small_rows * _LONG_ROW:
        return map
    from reft_ray.screening.distributed import each_on_ray

    return each_on_ray


def _run(
    plans: Sequence[FilePlan],
    done: frozenset[str],
    job: Job,
    manifest: Manifest,
    progress: Callable[[Progress], None] | None,
    metrics: ScreeningMetrics,
) -> None:
    lines = {unit: last - first + 1 for unit, (first, last) in zip(manifest.units, manifest.spans, strict=True)}
    total = sum(plan.cuts.rows for plan in plans)
    resumed = count = sum(lines[unit] for unit in done)
    start = time.monotonic()
    if job.config.threads:
        finished = _in_threads(plans, done, job, metrics)
    elif total <= job.config.small_rows:
        finished = _in_process(plans, done, job, metrics)
    else:
        finished = _on_ray(plans, done, job)
    for unit in finished:
        count += lines[unit.unit]
        if progress:
            progress(Progress(count, total, resumed, time.monotonic() - start, job.step is Pass.WRITE))


def _judges_of(job: Job, total: int) -> dict[str, Any]:
    """The judges, loaded where units would be judged: only workers may have the memory."""
    if job.config.threads or total <= job.config.small_rows:
        return judges_of(job)
    from reft_ray.screening.distributed import judges_on_ray

    return judges_on_ray(job)


def _in_process(
    plans: Sequence[FilePlan], done: frozenset[str], job: Job, metrics: ScreeningMetrics
) -> Iterator[Finished]:
    worker: UnitWorker | None = None
    for plan in plans:
        for ranges in groups(plan, done):
            worker = worker or worker_of(job, metrics)
            yield from map(worker.work, read_units(plan, ranges))


def _in_threads(
    plans: Sequence[FilePlan], done: frozenset[str], job: Job, metrics: ScreeningMetrics
) -> Iterator[Finished]:
    """One worker per thread and at most one unit in memory per thread."""
    local = threading.local()

    def work(unit: Unit) -> Finished:
        if not hasattr(local, "worker"):
            local.worker = worker_of(job, metrics)
        finished: Finished = local.worker.work(unit)
        return finished

    units = (unit for plan in plans for ranges in groups(plan, done) for unit in read_units(plan, ranges))
    pending: deque[Future[Finished]] = deque()
    pool = ThreadPoolExecutor(job.config.threads)
    try:
        for unit in units:
            pending.append(pool.submit(work, unit))
            if len(pending) >= job.config.threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _on_ray(plans: Sequence[FilePlan], done: frozenset[str], job: Job) -> Iterator[Finished]:
    from reft_ray.screening.distributed import screen_on_ray

    return screen_on_ray(plans, done, job)


def _states(output: Output, manifest: Manifest) -> Iterator[UnitState]:
    """The state of every unit, in row order. Raises ReftError for a missing or damaged part."""
    sizes = output.sizes()
    names = [f"{UNITS}/{unit}.json" for unit in manifest.units]
    for unit, name in zip(manifest.units, names, strict=True):
        if name not in sizes:
            raise ReftError(f"{output.name}: unit {unit} was not screened; run again to finish")
    for content in output.read_all(names):
        state = UnitState.from_json(content)
        for part, size in state.parts.items():
            if sizes.get(part) != size:
                raise ReftError(f"{output.name}: {part} is missing or damaged; run again to rewrite it")
        yield state
