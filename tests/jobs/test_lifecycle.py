"""The lifecycle of a job with deterministic steps and without processes."""

import contextlib
import json
import math
from dataclasses import replace

import pytest

from reft_ray.core.errors import StoppedError
from reft_ray.jobs.errors import LeaseLostError
from reft_ray.jobs.fake_steps import FakeSteps
from reft_ray.jobs.job import Event, JobSpec, Status
from reft_ray.jobs.lease import Slots
from reft_ray.jobs.lifecycle import run_job
from reft_ray.jobs.results import Evaluation, GateCheck, Screening, record_of, result_of
from reft_ray.jobs.review import SERVICE, Action
from reft_ray.jobs.review_queue import Filter, ReviewQueue
from reft_ray.jobs.run import JobFailedError
from reft_ray.telemetry import catalog


def test_a_clean_file_becomes_a_model(harness, clock):
    job = harness.drive(harness.job())
    assert job.status is Status.SUCCEEDED
    assert job.fine_tuned_model == f"ft:org--tiny:acme:mine:{job.id[-8:]}"
    assert (job.error, job.trained_tokens, len(job.result_files)) == (None, 80, 2)
    assert harness.messages(job.id) == [
        f"Created fine-tuning job: {job.id}",
        "Validated 10 examples: 0 with errors",
        "Screened 10 examples: 10 kept, 0 blocked, 0 for review",
        "Files validated and screened, job queued",
        "Fine-tuning job started",
        *[f"Step {step}/10, training loss={2 / step:.2f}" for step in range(1, 11)],
        "Release gate: passed",
        f"New fine-tuned model created: {job.fine_tuned_model}",
        "The job has successfully completed",
    ]
    student = harness.models.get(job.fine_tuned_model, "proj_a")
    assert student.base_model == "org/tiny"
    assert [item.step_number for item in harness.jobs.checkpoints(job.id).items] == [10, 5]
    assert harness.recorder.total(catalog.JOB_TRANSITIONS, to_status="succeeded") == 1
    assert harness.recorder.total(catalog.GATE_RESULTS, result="passed") == 1


def test_a_jobs_lifecycle_is_equal_on_both_databases(database, content, make_harness):
    harness = make_harness(database, content)
    assert harness.drive(harness.job("hi", "hello", "a bomb", "a knife")).status is Status.SUCCEEDED
    assert harness.drive(harness.job(), FakeSteps(harmful_score=math.nan)).error.code == "unsafe_model"


def test_flagged_rows_are_dropped_and_listed_without_their_text(harness):
    job = harness.drive(harness.job(*["hello"] * 8, "a bomb", "a knife"))
    assert job.status is Status.SUCCEEDED
    event = next(
        item.event for item in harness.jobs.events(job.id, limit=100).items if item.event.message.startswith("Screened")
    )
    assert (event.level, event.data["blocked"], event.data["review"], event.data["kept"]) == ("warn", 1, 1, 8)
    report = b"".join(harness.files.read(event.data["report_file"], "proj_a")).splitlines()
    first, *rest = (json.loads(line) for line in report)
    assert (first["summary"], sum(first["histogram"])) == ({"rows": 10, "kept": 8}, 10)
    assert rest == [
        {"line": 9, "decision": "block"},
        {"line": 10, "decision": "review"},
    ]
    for item in harness.jobs.events(job.id, limit=100).items:
        assert "bomb" not in repr(item)


def test_rejected_rows_expire_and_go_with_their_file(harness, clock):
    job = harness.drive(harness.job(*["hello"] * 8, "a bomb"))
    quarantine = job.result_files[1]
    record = harness.files.get(quarantine, "proj_a")
    assert record.expires_at == record.created_at + 30 * 86400
    harness.files.delete(job.spec.training_file, "proj_a")
    assert quarantine not in [item.id for item in harness.files.list("proj_a").items]


@pytest.mark.parametrize(
    ("texts", "options", "code", "message"),
    [
        (["hi", "a bomb"], {"policy": "fail"}, "unsafe_training_data", "flagged: 1 of 2 .*at most 0%"),
        (
            ["hi", "a bomb", "poison"],
            {"max_reject_ratio": 0.5},
            "unsafe_training_data",
            r"2 of 3 \(2 blocked, 0 for review, at most 50% may be\); first lines: 2, 3\. .*file-",
        ),
        (["a knife"], {"max_reject_ratio": 1.0}, "unsafe_training_data", "1 of 1"),
    ],
)
def test_an_unsafe_file_fails_before_any_training(harness, texts, options, code, message):
    job = harness.drive(harness.job(*texts, **options))
    assert (job.status, job.error.code, job.error.param) == (Status.FAILED, code, "training_file")
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(job.error.message)
    assert "train" not in harness.jobs.steps(job.id)
    assert job.queued_at is None


@pytest.mark.parametrize(("left", "message"), [(0, "fill their quota of"), (5, "larger than the allowed 5 bytes")])
def test_a_result_above_the_quota_fails_the_job_with_a_remedy(harness, left, message):
    job_id = harness.job()
    harness.files.max_project_bytes = sum(item.bytes for item in harness.files.list("proj_a").items) + left
    job = harness.drive(job_id)
    assert (job.status, job.error.code) == (Status.FAILED, "insufficient_quota")
    assert job.error.message.startswith("The job failed because its file screening_report.jsonl could not be stored. ")
    assert message in job.error.message
    assert job.error.message.endswith("Delete files of the project and create the job again.")


def test_an_invalid_file_fails_with_all_its_lines(harness):
    file = harness.files.create("proj_a", "x.jsonl", "fine-tune", [b'{"a": 1}\n{"messages": []}\n{"b": 1}\n'])
    job = harness.drive(harness.jobs.create("org-acme", "proj_a", JobSpec("tiny", file.id, 1), {}).id)
    assert (job.status, job.error.code) == (Status.FAILED, "invalid_training_file")
    assert "2 of 3 examples are invalid; first lines: 1, 3" in job.error.message


def test_review_waits_for_people_and_resumes(harness):
    job_id = harness.job("hi", "a knife", policy="review")
    assert harness.drive(job_id).status is Status.PAUSED
    assert harness.messages(job_id)[-1].startswith("1 examples are withheld for review")
    harness.jobs.move(job_id, Status.VALIDATING, Event("resumed"), sources={Status.PAUSED})
    assert harness.drive(job_id).status is Status.PAUSED, "a row is still undecided"
    queue = ReviewQueue(harness.jobs)
    (review,) = queue.list(Filter(job=job_id)).items
    queue.decide([review.id], Action.APPROVE, "education", "", SERVICE)
    assert harness.jobs.get(job_id).status is Status.VALIDATING
    job = harness.drive(job_id)
    assert job.status is Status.SUCCEEDED
    assert harness.jobs.steps(job_id)["review"]["kept"] == 2


@pytest.mark.parametrize("score", [5.1, math.nan, math.inf])
def test_a_harmful_student_is_withheld_with_the_numbers(harness, score):
    job = harness.drive(harness.job(), FakeSteps(harmful_score=score))
    assert (job.status, job.error.code, job.fine_tuned_model) == (Status.FAILED, "unsafe_model", None)
    assert "(before: 0.5), limit: at most 5" in job.error.message
    assert harness.models.list("proj_a") == []
    gate = next(
        item.event for item in harness.jobs.events(job.id, limit=100).items if item.event.type == "moderation_checks"
    )
    assert gate.data["checks"][0]["passed"] is False
    assert harness.recorder.total(catalog.GATE_RESULTS, result="withheld") == 1
    assert harness.recorder.total(catalog.JOB_FAILURES, code="unsafe_model") == 1


def test_a_student_that_was_not_measured_is_withheld():
    assert not Evaluation(()).passed
    for unmeasured in (None, math.nan, math.inf):
        assert not Evaluation((GateCheck("harmful_score", "at_most", 5.0, unmeasured, 1.0, True),)).passed
    assert Evaluation((GateCheck("harmful_score", "at_most", 5.0, 5.0, 1.0, True),)).passed


def test_a_screening_that_lost_rows_never_trains(harness):
    class Leaky(FakeSteps):
        def screen(self, run, validation):
            return replace(FakeSteps.screen(self, run, validation), rows=11)

    job_id = harness.job()
    with pytest.raises(RuntimeError, match="lost rows"):
        run_job(harness.driver(job_id), Leaky())
    assert harness.jobs.get(job_id).status is Status.VALIDATING


def test_a_recorded_step_is_not_repeated(harness):
    class Counting(FakeSteps):
        calls: list[str] = []  # noqa: RUF012

        def validate(self, run):
            self.calls.append("validate")
            return FakeSteps.validate(self, run)

        def screen(self, run, validation):
            self.calls.append("screen")
            if self.calls.count("screen") == 1:
                raise OSError("the disk went away")
            return FakeSteps.screen(self, run, validation)

    job_id = harness.job()
    with pytest.raises(OSError, match="disk"):
        run_job(harness.driver(job_id), Counting())
    assert harness.drive(job_id, Counting()).status is Status.SUCCEEDED
    assert Counting.calls == ["validate", "screen", "screen"]


def test_pause_saves_and_resume_continues_after_the_checkpoint(harness):
    class Pausing(FakeSteps):
        def train(self, run, screening):
            if not run.checkpoints:
                run.checkpoint(5, "uri", {})
                harness.jobs.move(run.job.id, Status.PAUSED, Event("paused"))
                assert run.heartbeat() is False
            return FakeSteps.train(self, run, screening)

    job_id = harness.job()
    assert harness.drive(job_id, Pausing()).status is Status.PAUSED
    assert harness.leases.is_driven(harness.jobs.get(job_id)) is False
    harness.jobs.move(job_id, Status.QUEUED, Event("resumed"), sources={Status.PAUSED})
    assert harness.drive(job_id, Pausing()).status is Status.SUCCEEDED
    steps = [message for message in harness.messages(job_id) if message.startswith("Step")]
    assert steps[0].startswith("Step 6/10")


def test_a_driver_whose_machine_shuts_down_releases_the_job(harness):
    class Evicted(FakeSteps):
        def train(self, run, screening):
            if not run.checkpoints:
                run.checkpoint(5, "uri", {})
                run.stop()  # what SIGTERM does
            return FakeSteps.train(self, run, screening)

    job_id = harness.job()
    with contextlib.suppress(StoppedError):
        run_job(harness.driver(job_id), Evicted())
    harness.leases.release(job_id, "driver-0")
    harness.leases.grant(Slots())
    run = harness.driver(job_id)
    with pytest.raises(StoppedError):
        run_job(run, Evicted())
    run.release()
    job = harness.jobs.get(job_id)
    assert (job.status, job.failures, harness.leases.is_driven(job)) == (Status.RUNNING, 0, False)
    assert harness.drive(job_id, Evicted()).status is Status.SUCCEEDED


def test_a_driver_that_lost_its_lease_changes_nothing(harness, clock):
    job_id = harness.job()
    run = harness.driver(job_id)
    clock.advance(31)
    harness.driver(job_id)
    for write in (
        lambda: run.event("x"),
        lambda: run.metrics(1, 2, {}),
        lambda: run.checkpoint(1, "u", {}),
        lambda: run.park(Status.QUEUED, Event("x")),
    ):
        with pytest.raises(LeaseLostError):
            write()
    with pytest.raises(StoppedError):
        run.once("validate", Screening, lambda: pytest.fail("the work was done"))
    assert run.heartbeat() is False
    assert run.should_stop()
    assert run.lost
    assert harness.messages(job_id) == [f"Created fine-tuning job: {job_id}"]


def test_a_cancelled_job_stays_cancelled(harness):
    job_id = harness.job()
    run = harness.driver(job_id)
    harness.jobs.move(job_id, Status.CANCELLED, Event("cancelled"))
    with pytest.raises(StoppedError):
        run_job(run, FakeSteps())
    with pytest.raises(StoppedError):
        run.fail(JobFailedError("code", "message").error)
    assert harness.jobs.get(job_id).status is Status.CANCELLED


def test_the_eta_follows_the_speed(harness, clock):
    class Slow(FakeSteps):
        def train(self, run, screening):
            for step in range(1, 5):
                run.metrics(step, 10, {"train_loss": math.nan})
                clock.advance(2)
            foretold.append(run._store.get(run.job.id).estimated_finish)
            raise JobFailedError("enough", "enough")

    foretold = []
    job = harness.drive(harness.job(), Slow())
    # After step 4 at t=6: six more steps of 2 s, and a tenth of the whole for the gate.
    assert foretold == [pytest.approx(clock() - 2 + 6 * 2 + 10 * 2 * 0.1)]
    assert (job.status, job.estimated_finish) == (Status.FAILED, None)


def test_results_survive_the_record():
    for result in (
        Screening(3, 1, 1, 1, "uri", first_lines=(1, 2)),
        Evaluation((GateCheck("a", "at_most", 1.0, 2.0, None, False),), "file-1"),
    ):
        assert result_of(type(result), json.loads(json.dumps(record_of(result)))) == result
