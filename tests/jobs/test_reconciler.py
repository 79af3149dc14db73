"""The reconciler's decisions, with a launcher whose drivers start and die on command."""

import pytest

from reft_ray.jobs.job import Event, Status
from reft_ray.jobs.job_store import JobStore
from reft_ray.jobs.lease import START_SECONDS, Leases, Slots
from reft_ray.jobs.reconciler import Reconciler, RetryPolicy


class Drivers:
    """A Launcher that only records calls; `alive` is True, False or None per handle, `waiting` has handles."""

    def __init__(self):
        self.started, self.stopped, self.alive, self.waiting = [], [], {}, set()

    def start(self, job_id, attempt):
        handle = f"{job_id}/{attempt}"
        self.started.append(handle)
        self.alive[handle] = True
        return handle

    def stop(self, handle):
        self.stopped.append(handle)
        self.alive[handle] = False

    def is_alive(self, handle):
        return self.alive[handle]

    def is_waiting(self, handle):
        return handle in self.waiting


@pytest.fixture
def drivers():
    return Drivers()


@pytest.fixture
def jobs(sqlite_database):
    return JobStore(sqlite_database)


@pytest.fixture
def reconciler(jobs, drivers):
    return Reconciler(
        jobs,
        Leases(jobs),
        drivers,
        Slots(training=1, validating=2),
        RetryPolicy(stop=10, pause=100, backoff=1, failures=3, resources=1000),
    )


@pytest.fixture
def create(jobs, spec):
    return lambda project="proj_a": jobs.create("org-a", project, spec, {}).id


def test_a_new_job_gets_one_driver(reconciler, drivers, create, jobs):
    job_id = create()
    reconciler.tick()
    reconciler.tick()
    assert drivers.started == [f"{job_id}/1"]
    assert jobs.get(job_id).handle == f"{job_id}/1"


def test_validation_alternates_between_projects(reconciler, drivers, create):
    first = create("proj_a")
    create("proj_a")
    other = create("proj_b")
    reconciler.tick()
    assert drivers.started == [f"{first}/1", f"{other}/1"]


def test_a_dead_driver_is_replaced_at_once_and_its_children_ended_first(reconciler, drivers, create, jobs, clock):
    job_id = create()
    reconciler.tick()
    reconciler.leases.acquire(job_id, 1, "owner")
    drivers.alive[f"{job_id}/1"] = False
    clock.advance(2)
    reconciler.tick()
    assert drivers.stopped == [f"{job_id}/1"]
    assert drivers.started[-1] == f"{job_id}/2"
    newest = jobs.events(job_id).items[0].event
    assert (newest.level, newest.data) == ("warn", {"attempt": 2})


def test_a_driver_that_hangs_is_ended_when_its_lease_is_over(reconciler, drivers, create, clock):
    job_id = create()
    reconciler.tick()
    reconciler.leases.acquire(job_id, 1, "owner")
    clock.advance(29)
    reconciler.tick()
    assert drivers.stopped == []
    clock.advance(2)
    reconciler.tick()
    assert drivers.stopped == [f"{job_id}/1"]
    assert drivers.started[-1] == f"{job_id}/2"


def test_a_driver_on_another_machine_depends_on_its_lease_only(reconciler, drivers, create, clock):
    job_id = create()
    reconciler.tick()
    reconciler.leases.acquire(job_id, 1, "owner")
    drivers.alive[f"{job_id}/1"] = None
    clock.advance(29)
    reconciler.tick()
    assert len(drivers.started) == 1
    clock.advance(2)
    reconciler.tick()
    assert len(drivers.started) == 2


def test_a_driver_that_waits_for_resources_is_not_a_failure(reconciler, drivers, create, jobs, clock):
    job_id = create()
    drivers.waiting.add(f"{job_id}/1")
    for _ in range(10):
        reconciler.tick()
        clock.advance(99)
    assert (drivers.started, drivers.stopped) == ([f"{job_id}/1"], [])
    reconciler.leases.acquire(job_id, 1, "owner")
    reconciler.tick()
    assert jobs.get(job_id).lease_owner == "owner"


@pytest.mark.parametrize(
    ("waiting", "alive", "seconds"),
    [(True, True, 1000), (False, True, START_SECONDS), (False, None, START_SECONDS), (False, False, 1)],
)
def test_a_driver_without_a_lease_has_time_to_start(reconciler, drivers, create, clock, waiting, alive, seconds):
    job_id = create()
    reconciler.tick()
    drivers.alive[f"{job_id}/1"] = alive
    drivers.waiting.update([f"{job_id}/1"] if waiting else [])
    clock.advance(seconds - 1)
    reconciler.tick()
    clock.advance(2)
    reconciler.tick()
    assert drivers.started == [f"{job_id}/1", f"{job_id}/2"]


def test_starts_without_progress_slow_down_and_end(reconciler, drivers, create, jobs, clock):
    job_id = create()
    starts = []
    for second in range(30):
        before = len(drivers.started)
        reconciler.tick()
        if len(drivers.started) > before:
            starts.append(second)
            drivers.alive[drivers.started[-1]] = False
        clock.advance(1)
    assert starts == [0, 1, 3]
    job = jobs.get(job_id)
    assert (job.status, job.error.code) == (Status.FAILED, "server_error")
    assert "3 times" in job.error.message


def test_progress_resets_the_failures(reconciler, drivers, create, jobs, clock):
    job_id = create()
    for attempt in range(1, 8):
        reconciler.tick()
        assert len(drivers.started) == attempt
        reconciler.leases.acquire(job_id, attempt, f"owner-{attempt}")
        jobs.record_step(job_id, f"owner-{attempt}", f"step-{attempt}", {})
        drivers.alive[drivers.started[-1]] = False
    assert jobs.get(job_id).status is Status.VALIDATING


@pytest.mark.parametrize(("status", "seconds"), [(Status.CANCELLED, 10), (Status.PAUSED, 100)])
def test_a_superfluous_driver_has_time_to_exit(reconciler, drivers, create, jobs, clock, status, seconds):
    job_id = create()
    reconciler.tick()
    reconciler.leases.acquire(job_id, 1, "owner")
    jobs.move(job_id, status, Event("on"))
    reconciler.tick()
    clock.advance(seconds - 1)
    reconciler.tick()
    assert drivers.stopped == []
    clock.advance(2)
    reconciler.tick()
    assert drivers.stopped == [f"{job_id}/1"]
    job = jobs.get(job_id)
    assert (job.handle, job.lease_owner, job.status) == (None, None, status)


def test_the_time_limit_restarts_for_a_driver_that_was_needed_again(reconciler, drivers, create, jobs, clock):
    job_id = create()
    reconciler.tick()
    reconciler.leases.acquire(job_id, 1, "owner")
    for status in (Status.PAUSED, Status.VALIDATING, Status.PAUSED):
        jobs.move(job_id, status, Event("on"))
        reconciler.tick()
        clock.advance(60)
        reconciler.leases.renew(job_id, "owner")
    reconciler.tick()
    assert drivers.stopped == []
    clock.advance(41)
    reconciler.tick()
    assert drivers.stopped == [f"{job_id}/1"]


def test_a_failed_launch_is_retried_and_delays_no_other_job(reconciler, drivers, create, clock, caplog):
    first, second = create(), create()
    start = drivers.start

    def fail_once(job_id, attempt):
        if (job_id, attempt) == (first, 1):
            raise OSError("disk full")
        return start(job_id, attempt)

    drivers.start = fail_once
    reconciler.tick()
    assert drivers.started == [f"{second}/1"]
    assert "could not be launched" in caplog.text
    clock.advance(61)
    drivers.alive[f"{second}/1"] = None
    reconciler.tick()
    assert f"{first}/2" in drivers.started
