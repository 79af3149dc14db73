"""Metrics of the store: read at each scrape, equal after a restart, without row texts."""

from dataclasses import replace

import pytest
from fixtures.reviews import filed
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import update

from reft_ray.jobs.figures import AUDIT_SECONDS, Figures
from reft_ray.jobs.job import Event, Options, Status
from reft_ray.jobs.job_store import JobStore
from reft_ray.jobs.results import Evaluation, GateCheck, Screening, record_of
from reft_ray.jobs.review import SERVICE, Action
from reft_ray.jobs.review_queue import Filter, ReviewQueue
from reft_ray.jobs.tables import audit_log
from reft_ray.telemetry import catalog
from reft_ray.telemetry.recorder import PrometheusRecorder


@pytest.fixture
def scrape(database):
    def read(metric, figures=None):
        """Scrape a newly started gateway, or the given `figures`."""
        recorder = PrometheusRecorder()
        (figures or Figures(JobStore(database))).expose(recorder)
        return {
            tuple(
                value for name, value in sorted(sample.labels.items()) if name not in ("application", "project")
            ): sample.value
            for family in text_string_to_metric_families(recorder.exposition().decode())
            for sample in family.samples
            if sample.name == metric.name
        }

    return read


@pytest.fixture
def job(jobs, spec):
    spec = replace(spec, options=Options(policy="review"))
    return jobs.create("org", "acme", spec, {}, actor={"type": "api_key", "id": "k"})


def step(jobs, job, name, result):
    with jobs.database.write() as connection:
        jobs.record_step_in(connection, job, name, record_of(result) if result else {})


def test_without_jobs_every_metric_is_zero(scrape):
    assert scrape(catalog.JOBS) == {(str(status),): 0 for status in Status}
    for metric in (catalog.JOB_OLDEST_QUEUED, catalog.REVIEW_OLDEST, catalog.AUDIT_BREAKS):
        assert scrape(metric) == {(): 0}
    assert set(scrape(catalog.QUARANTINE_ROWS).values()) == {0}
    assert scrape(catalog.SAFETY_EVAL) == {}


def test_jobs_and_the_head_of_the_queue(scrape, jobs, job, clock):
    jobs.move(job.id, Status.QUEUED, Event("queued"))
    clock.advance(40)
    assert scrape(catalog.JOBS)[("queued",)] == 1
    assert scrape(catalog.JOB_OLDEST_QUEUED) == {(): 40}


def test_rows_that_wait_for_review(scrape, jobs, job, clock):
    step(jobs, job, "screen", Screening(rows=10, kept=6, review=3, blocked=1, kept_uri="x", teacher_id="t"))
    queue = ReviewQueue(jobs)
    queue.file(job, [filed(number) for number in range(1, 5)])
    clock.advance(70)
    assert scrape(catalog.QUARANTINE_ROWS)[("pending",)] == 4
    assert scrape(catalog.REVIEW_OLDEST) == {(): 70}
    assert scrape(catalog.REVIEW_OVERTURNED) == {}
    *three, last = (item.id for item in queue.list(Filter()).items)
    queue.decide(three[:2], Action.APPROVE, "harmless", "", SERVICE)
    queue.decide(three[2:], Action.REJECT, "illegal", "", SERVICE)
    counts = scrape(catalog.QUARANTINE_ROWS)
    assert [counts[(state,)] for state in ("pending", "approved", "rejected", "expired")] == [1, 2, 1, 0]
    overturned = scrape(catalog.REVIEW_OVERTURNED)
    assert overturned[("estimate", "t")] == pytest.approx(2 / 3)
    assert overturned[("low", "t")] < 2 / 3 < overturned[("high", "t")]
    # Two thirds of 4 withheld rows, against these and 6 kept rows.
    assert scrape(catalog.REVIEW_FALSE_POSITIVES)[("estimate", "t")] == pytest.approx((8 / 3) / (8 / 3 + 6))
    assert scrape(catalog.REVIEW_MISSED) == {}
    jobs.move(job.id, Status.CANCELLED, Event("cancelled"))
    assert scrape(catalog.QUARANTINE_ROWS)[("expired",)] == 1
    queue.decide([last], Action.REJECT, "illegal", "", SERVICE)
    assert scrape(catalog.REVIEW_OLDEST) == {(): 0}


def test_the_last_release_decision_of_base_and_student(scrape, jobs, job):
    checks = (
        GateCheck("harmful_score", "at_most", 5.0, 2.0, 40.0, True),
        GateCheck("incoherent", "at_most", 5.0, 1.0, 0.0, True),
        GateCheck("finetune_accuracy/sums", "drop_at_most", 1.0, 91.0, None, True),
    )
    step(jobs, job, "evaluate", Evaluation(checks))
    found = {key: round(value, 6) for key, value in scrape(catalog.SAFETY_EVAL).items()}
    assert found == {
        ("harmful_score", "student", "release"): 0.02,
        ("harmful_score", "base", "release"): 0.4,
        ("coherence", "student", "release"): 0.99,
        ("coherence", "base", "release"): 1.0,
        ("finetune_accuracy", "student", "sums"): 0.91,
    }


def test_a_changed_audit_log_shows_at_the_next_check(scrape, jobs, job, clock, database):
    figures = Figures(JobStore(database))
    assert scrape(catalog.AUDIT_BREAKS, figures) == {(): 0}
    with database.write() as connection:
        connection.execute(update(audit_log).values(type="nothing.happened"))
    assert scrape(catalog.AUDIT_BREAKS, figures) == {(): 0}, "the whole log is not read at every scrape"
    clock.advance(AUDIT_SECONDS)
    assert scrape(catalog.AUDIT_BREAKS, figures) == {(): 1}
