"""The contract of the job records, on SQLite and on PostgreSQL."""

import threading

import pytest

from reft_ray.core.errors import StoppedError
from reft_ray.jobs.errors import ConflictError, InvalidError, LeaseLostError, NotFoundError
from reft_ray.jobs.job import TERMINAL, TRANSITIONS, Event, Hyperparameters, JobError, JobSpec, Options, Status
from reft_ray.jobs.job_store import JobStore
from reft_ray.jobs.lease import Leases, Slots


def create(jobs: JobStore, spec: JobSpec, project: str = "proj_a", **metadata: str) -> str:
    return jobs.create("org-a", project, spec, metadata).id


def drive(jobs: JobStore, job_id: str, owner: str = "me") -> Leases:
    leases = Leases(jobs)
    attempt = leases.claim(jobs.get(job_id))
    leases.acquire(job_id, attempt, owner)
    return leases


def test_a_job_comes_back_as_it_was_created(jobs, clock):
    spec = JobSpec(
        model="base",
        training_file="file-1",
        seed=3,
        suffix="mine",
        hyperparameters=Hyperparameters(n_epochs=3, learning_rate_multiplier=0.5),
        options=Options(policy="review", gate={"harmful_score": 2.0}),
        integrations=({"type": "wandb", "wandb": {"project": "p"}},),
    )
    job = jobs.get(create(jobs, spec, team="red"))
    assert job.spec == spec
    assert (job.status, job.metadata, job.created_at) == (Status.VALIDATING, {"team": "red"}, clock())
    assert [item.event.message for item in jobs.events(job.id).items] == [f"Created fine-tuning job: {job.id}"]


def test_another_projects_job_does_not_exist(jobs, spec):
    job_id = create(jobs, spec)
    assert jobs.get(job_id, "proj_a").id == job_id
    with pytest.raises(NotFoundError):
        jobs.get(job_id, "proj_b")
    with pytest.raises(NotFoundError):
        jobs.get("ftjob-none")


def test_every_other_transition_is_refused(jobs, spec):
    paths = {
        Status.VALIDATING: [],
        Status.QUEUED: [Status.QUEUED],
        Status.RUNNING: [Status.QUEUED, Status.RUNNING],
        Status.PAUSED: [Status.PAUSED],
        Status.SUCCEEDED: [Status.QUEUED, Status.RUNNING, Status.SUCCEEDED],
        Status.FAILED: [Status.FAILED],
        Status.CANCELLED: [Status.CANCELLED],
    }
    for start, path in paths.items():
        for target in Status:
            job_id = create(jobs, spec)
            for status in path:
                jobs.move(job_id, status, Event("on"))
            if target in TRANSITIONS[start]:
                assert jobs.move(job_id, target, Event("move")).status is target
            else:
                with pytest.raises(ConflictError, match=f"is {start} and cannot become {target}"):
                    jobs.move(job_id, target, Event("move"))
                assert jobs.get(job_id).status is start
                assert "move" not in {item.event.message for item in jobs.events(job_id).items}


def test_of_many_that_end_a_job_at_once_exactly_one_does(jobs, spec):
    job_id = create(jobs, spec)
    outcomes = []
    start = threading.Barrier(6)

    def end(number: int) -> None:
        start.wait()
        try:
            jobs.move(job_id, Status.CANCELLED, Event(f"cancelled by {number}"))
            outcomes.append("won")
        except ConflictError:
            outcomes.append("lost")

    threads = [threading.Thread(target=end, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["lost"] * 5 + ["won"]
    assert len(jobs.events(job_id).items) == 2


def test_a_failed_job_keeps_its_error_and_its_time(jobs, spec, clock):
    job_id = create(jobs, spec)
    clock.advance(5)
    error = JobError("unsafe_training_data", "3 of 10 rows", "training_file")
    job = jobs.move(job_id, Status.FAILED, Event("failed", level="error"), error=error)
    assert (job.error, job.finished_at) == (error, clock())
    assert job.status in TERMINAL


def test_pages_cover_every_job_once_newest_first(jobs, spec):
    made = [create(jobs, spec) for _ in range(7)]
    create(jobs, spec, project="proj_b")
    seen, after = [], None
    while True:
        page = jobs.list("proj_a", after=after, limit=3)
        seen += [job.id for job in page.items]
        if not page.has_more:
            break
        after = seen[-1]
    assert seen == made[::-1]
    with pytest.raises(InvalidError, match="no item 'ftjob-none'"):
        jobs.list("proj_a", after="ftjob-none")
    with pytest.raises(InvalidError):
        jobs.list("proj_b", after=made[0])


def test_lists_filter_by_metadata(jobs, spec):
    red = create(jobs, spec, team="red", run="1")
    create(jobs, spec, team="blue")
    plain = create(jobs, spec)
    assert [job.id for job in jobs.list("proj_a", metadata={"team": "red"}).items] == [red]
    assert jobs.list("proj_a", metadata={"team": "red", "run": "2"}).items == ()
    assert [job.id for job in jobs.list("proj_a", without_metadata=True).items] == [plain]


def test_an_event_with_a_key_is_written_once(jobs, spec):
    job_id = create(jobs, spec)
    for loss in (2.0, 1.0):
        jobs.append(job_id, Event("Step 1", type="metrics", data={"train_loss": loss}, key="train/1"))
    jobs.append(job_id, Event("again"))
    jobs.append(job_id, Event("again"))
    events = jobs.events(job_id).items
    assert [item.event.message for item in events] == ["again", "again", "Step 1", f"Created fine-tuning job: {job_id}"]
    assert events[2].event.data == {"train_loss": 2.0}


def test_only_the_holder_of_the_lease_records_steps(jobs, spec):
    job_id = create(jobs, spec)
    drive(jobs, job_id, "me")
    jobs.record_step(job_id, "me", "validate", {"rows": 3}, event=Event("ok"), result_files=["file-r"])
    with pytest.raises(LeaseLostError):
        jobs.record_step(job_id, "you", "screen", {})
    assert jobs.steps(job_id) == {"validate": {"rows": 3}}
    assert jobs.get(job_id).result_files == ("file-r",)
    jobs.move(job_id, Status.CANCELLED, Event("cancelled"))
    with pytest.raises(StoppedError):
        jobs.record_step(job_id, "me", "screen", {})


def test_checkpoints_are_one_per_step_newest_first(jobs, spec):
    job_id = create(jobs, spec)
    drive(jobs, job_id, "me")
    for step, uri in ((10, "a"), (20, "b"), (10, "c")):
        jobs.add_checkpoint(job_id, "me", step, uri, {"train_loss": 1.0})
    checkpoints = jobs.checkpoints(job_id).items
    assert [(item.step_number, item.uri) for item in checkpoints] == [(20, "b"), (10, "c")]


def test_a_lease_has_one_owner_until_it_expires(jobs, spec, clock):
    job_id = create(jobs, spec)
    leases = drive(jobs, job_id, "me")
    job = jobs.get(job_id)
    assert leases.is_driven(job)
    with pytest.raises(LeaseLostError):
        leases.acquire(job_id, job.attempt, "you")
    clock.advance(29)
    leases.renew(job_id, "me")
    clock.advance(31)
    seen = jobs.get(job_id)
    assert not leases.is_driven(seen)
    second = leases.claim(seen)
    assert second == job.attempt + 1
    assert leases.claim(seen) is None
    with pytest.raises(LeaseLostError):
        leases.renew(job_id, "me")
    with pytest.raises(LeaseLostError):
        leases.acquire(job_id, job.attempt, "me")
    leases.acquire(job_id, second, "you")
    leases.release(job_id, "you")
    assert not leases.is_driven(jobs.get(job_id))


def test_a_launched_driver_has_time_to_start(jobs, spec, clock):
    job_id = create(jobs, spec)
    leases = Leases(jobs)
    leases.claim(jobs.get(job_id))
    assert leases.is_driven(jobs.get(job_id))
    clock.advance(61)
    assert not leases.is_driven(jobs.get(job_id))


def test_slots_alternate_between_projects(jobs, spec, clock):
    order = []
    for project in ("proj_a", "proj_a", "proj_a", "proj_b"):
        job_id = create(jobs, spec, project)
        clock.advance(1)
        jobs.move(job_id, Status.QUEUED, Event("queued"))
        order.append(job_id)
    leases = Leases(jobs)
    granted = leases.grant(Slots(training=2, training_per_project=2))
    assert [job.id for job in granted] == [order[0], order[3]]
    assert leases.grant(Slots(training=2, training_per_project=2)) == []
    jobs.move(order[0], Status.SUCCEEDED, Event("done"))
    assert [job.id for job in leases.grant(Slots(training=3, training_per_project=1))] == [order[1]]
    assert jobs.counts()["proj_a", Status.QUEUED] == 1


def test_two_gateways_never_grant_the_same_slot(jobs, spec):
    for _ in range(4):
        jobs.move(create(jobs, spec), Status.QUEUED, Event("queued"))
    start = threading.Barrier(4)

    def grant() -> None:
        start.wait()
        Leases(jobs).grant(Slots(training=2, training_per_project=2))

    threads = [threading.Thread(target=grant) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert jobs.counts()["proj_a", Status.RUNNING] == 2
