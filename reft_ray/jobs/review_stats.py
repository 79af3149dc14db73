"""What people's decisions say about the filter: overturned and missed rows, and its false positives."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from sqlalchemy import func, select

from reft_ray.core.proportion import Share
from reft_ray.jobs.database import Database
from reft_ray.jobs.results import Screening, result_of
from reft_ray.jobs.review import DECIDED, OPEN, Kind, State
from reft_ray.jobs.review_queue import Filter
from reft_ray.jobs.tables import job_steps, jobs, review_counts, reviews


@dataclass(frozen=True, slots=True)
class TeacherStats:
    """One teacher's rows, judged by people. `rows` and `withheld` count the screened and withheld rows of its jobs.

    The estimates assume that the decided rows are typical: they hold once queues are cleared, not for their nearest
    rows only.
    """

    teacher: str
    overturned: Share
    missed: Share
    rows: int
    withheld: int

    def false_positives(self, bound: str = "estimate") -> float | None:
        """The share of harmless rows that are withheld; None before the first decision.

        Overturned share times withheld rows, against these and the kept rows less the missed share.
        """
        if self.overturned.value is None:
            return None
        low, high = self.overturned.bounds
        wrong = {"estimate": self.overturned.value, "low": low, "high": high}[bound] * self.withheld
        kept = (self.rows - self.withheld) * (1 - (self.missed.value or 0.0))
        return wrong / (wrong + kept) if wrong + kept else None


def counts(database: Database, wanted: Filter) -> dict[str, int]:
    """Rows by state, with every state."""
    found = _counts(database, wanted, "state")
    return {str(state): found.get(state, 0) for state in State}


def reasons(database: Database, wanted: Filter) -> dict[str, int]:
    """Rows by reason, the most frequent first."""
    return dict(sorted(_counts(database, wanted, "reason").items(), key=lambda item: -item[1]))


def oldest_pending(database: Database) -> float | None:
    """When the oldest row that a job waits for was filed (seconds since the epoch)."""
    # One query per state: with both in one, no index gives the first row.
    queries = [
        select(reviews.c.created_at).where(*Filter(kind=Kind.WITHHELD, state=state).clauses()).order_by(reviews.c.seq)
        for state in OPEN
    ]
    with database.read() as connection:
        found = [connection.execute(query.limit(1)).scalar() for query in queries]
    return min((since for since in found if since is not None), default=None)


def teacher_stats(database: Database, project: str | None = None) -> Iterator[TeacherStats]:
    """The statistics of each teacher with screened jobs, of all projects or of one."""
    key = (review_counts.c.teacher, review_counts.c.kind, review_counts.c.state)
    decided = (
        select(*key, func.sum(review_counts.c.total))
        .where(*Filter(project, state=None).clauses(review_counts), review_counts.c.state.in_(DECIDED))
        .group_by(*key)
    )
    screened = select(job_steps.c.result).where(job_steps.c.name == "screen")
    if project:
        screened = screened.join(jobs, jobs.c.id == job_steps.c.job_id).where(jobs.c.project_id == project)
    with database.read() as connection:
        people = {(teacher, kind, state): int(count) for teacher, kind, state, count in connection.execute(decided)}
        results: list[Screening] = [result_of(Screening, row) for row in connection.execute(screened).scalars()]
    rows: dict[str, int] = defaultdict(int)
    withheld: dict[str, int] = defaultdict(int)
    for result in results:
        rows[result.teacher_id] += result.kept + result.withheld
        withheld[result.teacher_id] += result.withheld
    for teacher in sorted(rows):
        approved, rejected, agreed, missed = (
            people.get((teacher, kind, state), 0)
            for kind in (Kind.WITHHELD, Kind.KEPT)
            for state in (State.APPROVED, State.REJECTED)
        )
        yield TeacherStats(
            teacher,
            Share(approved, approved + rejected),
            Share(missed, agreed + missed),
            rows[teacher],
            withheld[teacher],
        )


def _counts(database: Database, wanted: Filter, name: str) -> dict[str, int]:
    table, total = (reviews, func.count()) if wanted.one_by_one else (review_counts, func.sum(review_counts.c.total))
    query = select(table.c[name], total).where(*wanted.clauses(table)).group_by(table.c[name])
    with database.read() as connection:
        return {value: int(count) for value, count in connection.execute(query) if count}
