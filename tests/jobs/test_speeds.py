"""The speed of finished jobs, from their records."""

import contextlib
import json

import pytest

from reft_ray.core.errors import StoppedError
from reft_ray.jobs.estimate import Defaults, Size, Speed, estimate
from reft_ray.jobs.fake_steps import FakeSteps
from reft_ray.jobs.job import Event, Hyperparameters, JobSpec, Status
from reft_ray.jobs.lease import Leases, Slots
from reft_ray.jobs.lifecycle import run_job
from reft_ray.jobs.run import JobRun
from reft_ray.jobs.speeds import measured_speed

LOAD, PER_ROW, START, PER_STEP, GATE, QUEUE = 3.0, 0.5, 7.0, 2.0, 11.0, 1000.0


class TimedSteps:
    """FakeSteps that take time by the clock: `LOAD` + rows to screen, `START` and steps to train, `GATE` to judge."""

    def __init__(self, clock, steps=10):
        self.clock, self.fake = clock, FakeSteps(train_steps=steps)

    def validate(self, run):
        return self.fake.validate(run)

    def screen(self, run, validation):
        self.clock.advance(LOAD + validation.rows * PER_ROW)
        return self.fake.screen(run, validation)

    def train(self, run, screening):
        self.clock.advance(START)
        report = run.metrics

        def metrics(step, total, values):
            self.clock.advance(PER_STEP)
            report(step, total, values)

        run.metrics = metrics
        return self.fake.train(run, screening)

    def evaluate(self, run, training):
        self.clock.advance(GATE)
        return self.fake.evaluate(run, training)

    def export(self, *args):
        return self.fake.export(*args)


@pytest.fixture
def finish(jobs, files, clock):
    """Run a job of `rows` rows to its end, with an optional pause."""

    def run(rows, model="tiny", preset=None, pause=False, steps=10):
        row = json.dumps({"messages": [{"role": "user", "content": "hello"}]}).encode() + b"\n"
        file = files.create("proj_a", "train.jsonl", "fine-tune", [row * rows])
        job_id = jobs.create("org-a", "proj_a", JobSpec(model, file.id, 1, preset=preset), {}).id
        leases = Leases(jobs)
        if pause:
            jobs.move(job_id, Status.PAUSED, Event("paused"))
            clock.advance(500)
            jobs.move(job_id, Status.VALIDATING, Event("resumed"))
            leases.claim(jobs.get(job_id))
        while jobs.get(job_id).status is not Status.SUCCEEDED:
            leases.grant(Slots())
            job = jobs.get(job_id)
            owner = f"driver-{job.attempt}"
            driver = JobRun(leases.acquire(job_id, leases.claim(job), owner), leases, owner, files)
            with contextlib.suppress(StoppedError):
                run_job(driver, TimedSteps(clock, steps))
            driver.release()
            clock.advance(QUEUE if jobs.get(job_id).status is Status.QUEUED else 0.0)
        return jobs.get(job_id)

    return run


def test_measured_speed_predicts_the_next_job_of_its_kind(finish, database):
    job = finish(rows=40)
    speed = measured_speed(database, "tiny", devices=2)
    assert job.trained_tokens == 320
    # 9 of the 10 steps are between the first report and the last; the time before is start-up.
    assert speed.training_tokens == pytest.approx(320 / 10 / PER_STEP)
    assert speed.screening_rows == pytest.approx(40 / (LOAD + 40 * PER_ROW))
    assert speed.start_seconds == pytest.approx(START + GATE)
    busy = LOAD + 40 * PER_ROW + START + 10 * PER_STEP + GATE
    found = estimate(Size(40, 320, True), Hyperparameters(n_epochs=1), Defaults(batch_size=8), speed)
    assert found.seconds == pytest.approx(busy)
    assert found.device_hours == pytest.approx(busy * 2 / 3600)


def test_small_files_are_predicted_from_the_minimum_steps(finish, database):
    finish(rows=400, steps=50)
    speed = measured_speed(database, "tiny")
    assert speed.step_seconds == pytest.approx(PER_STEP)
    few = Size(8, 64, True)
    alone = estimate(few, Hyperparameters(n_epochs=1), Defaults(batch_size=8), speed)
    padded = estimate(few, Hyperparameters(n_epochs=1), Defaults(batch_size=8, min_steps=30), speed)
    assert (alone.steps, padded.steps) == (1, 30)
    assert padded.seconds - alone.seconds == pytest.approx(30 * PER_STEP - 64 / speed.training_tokens)


def test_large_files_are_predicted_from_the_largest_so_far(finish, database):
    for rows in (10, 400):
        finish(rows)
    assert measured_speed(database, "tiny").screening_rows == pytest.approx(400 / (LOAD + 400 * PER_ROW))


def test_only_undisturbed_jobs_of_the_same_kind_count(finish, database):
    finish(rows=40, model="other")
    finish(rows=40, preset="gpu")
    finish(rows=40, pause=True)
    # Too short to measure: one report has no duration.
    finish(rows=40, steps=1)
    assert measured_speed(database, "tiny") is None
    assert isinstance(measured_speed(database, "tiny", "gpu"), Speed)
