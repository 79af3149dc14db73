"""A database of each kind, a manual clock, and a content store in a temporary directory."""

import contextlib
import json

import pytest
from fixtures.sqlite import sqlite_url

from reft_ray.core.errors import StoppedError
from reft_ray.jobs.content import ContentStore
from reft_ray.jobs.database import Database
from reft_ray.jobs.fake_steps import FakeSteps
from reft_ray.jobs.files import FileStore
from reft_ray.jobs.job import JobSpec, Options, Status
from reft_ray.jobs.job_store import JobStore
from reft_ray.jobs.lease import Leases, Slots
from reft_ray.jobs.lifecycle import run_job
from reft_ray.jobs.models import ModelStore
from reft_ray.jobs.run import JobRun
from reft_ray.telemetry.recorder import MemoryRecorder


class Clock:
    """Seconds since the epoch, moved by hand."""

    def __init__(self) -> None:
        self.time = 1_800_000_000.0

    def __call__(self) -> float:
        return self.time

    def advance(self, seconds: float) -> None:
        self.time += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.servers)])
def database(request, tmp_path, clock):
    """The same contract on both databases."""
    url = sqlite_url(tmp_path) if request.param == "sqlite" else request.getfixturevalue("new_postgres")()
    database = Database.open(url, clock)
    yield database
    database.close()


@pytest.fixture
def sqlite_database(tmp_path, clock):
    database = Database.open(sqlite_url(tmp_path), clock)
    yield database
    database.close()


@pytest.fixture
def content(tmp_path) -> ContentStore:
    return ContentStore(str(tmp_path / "content"))


@pytest.fixture
def jobs(database) -> JobStore:
    return JobStore(database)


@pytest.fixture
def files(database, content) -> FileStore:
    return FileStore(database, content)


@pytest.fixture
def spec() -> JobSpec:
    return JobSpec(model="tiny", training_file="file-1", seed=7)


class Harness:
    """A store, and drivers in this process."""

    def __init__(self, database, content):
        self.recorder = MemoryRecorder()
        self.jobs = JobStore(database, self.recorder)
        self.files = FileStore(database, content)
        self.models = ModelStore(database)
        self.leases = Leases(self.jobs)

    def job(self, *texts, **options):
        rows = [json.dumps({"messages": [{"role": "user", "content": text}]}) for text in texts or ("hello",) * 10]
        file = self.files.create("proj_a", "train.jsonl", "fine-tune", ["\n".join(rows).encode()])
        spec = JobSpec(model="org/tiny", training_file=file.id, seed=1, suffix="mine", options=Options(**options))
        return self.jobs.create("org-acme", "proj_a", spec, {}).id

    def driver(self, job_id):
        owner = f"driver-{self.jobs.get(job_id).attempt}"
        job = self.leases.acquire(job_id, self.leases.claim(self.jobs.get(job_id)), owner)
        return JobRun(job, self.leases, owner, self.files)

    def drive(self, job_id, steps=None, **options):
        """One driver's turn, then the scheduler's; until the job ends or waits for a person."""
        steps = steps or FakeSteps()
        while self.jobs.get(job_id).status in (Status.VALIDATING, Status.QUEUED, Status.RUNNING):
            self.leases.grant(Slots())
            run = self.driver(job_id)
            with contextlib.suppress(StoppedError):
                run_job(run, steps, self.recorder, **options)
            run.release()
        return self.jobs.get(job_id)

    def messages(self, job_id):
        return [item.event.message for item in self.jobs.events(job_id, limit=100).items][::-1]


@pytest.fixture
def make_harness():
    return Harness


@pytest.fixture
def harness(sqlite_database, content):
    return Harness(sqlite_database, content)
