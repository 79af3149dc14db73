"""SIGKILL for the gateway, the driver, a training worker or all of them, at every point of a job."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fixtures.sqlite import sqlite_url
from sqlalchemy import select

from reft_ray.jobs.content import ContentStore
from reft_ray.jobs.database import Database
from reft_ray.jobs.files import FileStore
from reft_ray.jobs.job import TERMINAL, Event, JobSpec, Status
from reft_ray.jobs.job_store import JobStore
from reft_ray.jobs.models import ModelStore
from reft_ray.jobs.tables import metadata

HERE = Path(__file__).parent
SECONDS = 120
WORDS = b"how amber is found"
STEPS = ("validate", "screen", "train", "evaluate", "export")


class Killed:
    """A service whose gateway is restarted whenever it dies."""

    def __init__(self, root: Path, point: str, url: str) -> None:
        self.root = root
        (root / "database").write_text(url)
        (root / "point").write_text(point)
        (root / "tmp").mkdir()
        self.database = Database.open(url)
        self.jobs = JobStore(self.database)
        files = FileStore(self.database, ContentStore(str(root / "files")))
        row = json.dumps({"messages": [{"role": "user", "content": WORDS.decode()}]}).encode() + b"\n"
        file = files.create("proj_a", "train.jsonl", "fine-tune", [row * 10])
        self.job_id = self.jobs.create("org-acme", "proj_a", JobSpec("tiny", file.id, 1), {}).id
        self.gateway = None
        self.restarts = -1

    def _keep_up(self) -> None:
        if self.gateway is None or self.gateway.poll() is not None:
            environment = {
                **os.environ,
                "TMPDIR": str(self.root / "tmp"),
                "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parents[1])]),
            }
            self.gateway = subprocess.Popen(
                [sys.executable, str(HERE / "kill_kit.py"), str(self.root)], env=environment
            )
            self.restarts += 1

    def until(self, condition) -> None:
        """Let the service work until the condition holds."""
        end = time.monotonic() + SECONDS
        while not condition():
            self._keep_up()
            assert time.monotonic() < end, f"{self.job().status}; journal: {self.journal()}; {self.messages()}"
            time.sleep(0.05)

    def finish(self):
        """The job at its end, with everything collected."""
        self.until(lambda: self.job().status in TERMINAL)
        self.until(lambda: not self.jobs.with_handle())
        return self.job()

    def job(self):
        return self.jobs.get(self.job_id)

    def journal(self):
        path = self.root / "journal"
        return path.read_text().split() if path.exists() else []

    def messages(self):
        return [item.event.message for item in self.jobs.events(self.job_id, limit=200).items][::-1]

    def processes(self):
        """Drivers and workers that are still there."""
        found = []
        for process in psutil.process_iter(["pid", "cmdline"]):
            command = process.info["cmdline"] or []
            ours = str(self.root) in command and "time.sleep(600)" in " ".join(command)
            if ours or self.job_id in command:
                found.append(command)
        return found

    def close(self) -> None:
        if self.gateway is not None:
            self.gateway.kill()
            self.gateway.wait()
        self.database.close()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=[pytest.mark.servers, pytest.mark.slow])])
def killed(tmp_path, request):
    made = []
    url = sqlite_url(tmp_path) if request.param == "sqlite" else request.getfixturevalue("new_postgres")()

    def make(point):
        made.append(Killed(tmp_path, point, url))
        return made[-1]

    yield make
    for service in made:
        service.close()


LIFE = [
    "Validated 10 examples: 0 with errors",
    "Screened 10 examples: 10 kept, 0 blocked, 0 for review",
    "Files validated and screened, job queued",
    "Fine-tuning job started",
    *[f"Step {step}/10, training loss={2 / step:.2f}" for step in range(1, 11)],
    "Release gate: passed",
    "New fine-tuned model created: ",
    "The job has successfully completed",
]

POINTS = {
    # The gateway: before it has seen the job, between claim and start, between start and the handle's record.
    "gateway": {},
    "claimed": {},
    "launched": {},
    # The driver, at the start of each step, and just before and after its results are written down.
    "validate": {"validate": 2},
    "screen": {"screen": 2},
    "screened": {"screen": 2},
    "parking": {},
    "releasing": {},
    "train": {"train": 2},
    "step 7": {"train": 2},
    "evaluate": {"evaluate": 2},
    "export": {"export": 2},
    "succeeding": {},
    # A training worker; the driver crashes with it.
    "worker": {"train": 2},
    # The gateway and the driver at once, then the gateway alone while the driver continues.
    "all:screen": {"screen": 2},
    "all:step 7": {"train": 2},
    "gateway:train": {},
}
QUICK = ("step 7",)


@pytest.mark.parametrize(
    "point", [pytest.param(point, marks=() if point in QUICK else pytest.mark.slow) for point in POINTS]
)
def test_a_job_survives_a_kill(killed, point):
    service = killed(point)
    job = service.finish()
    assert job.status is Status.SUCCEEDED, job.error
    assert (service.root / "killed").exists()
    # No recorded step is repeated; the interrupted one is.
    expected = {step: POINTS[point].get(step, 1) for step in STEPS}
    assert {step: service.journal().count(step) for step in STEPS} == expected
    # Every event of a run without a kill, once and in order, plus a warning for the user.
    logged = [message for message in service.messages()[1:] if not message.startswith("The job was interrupted")]
    assert [message.split("ft:")[0] for message in logged] == LIFE
    assert [item.step_number for item in service.jobs.checkpoints(job.id).items] == [10, 5]
    assert [student.job_id for student in ModelStore(service.database).list("proj_a")] == [job.id]
    assert service.processes() == []
    # Row text is where erasures and sweeps reach it, and nowhere else.
    kept = [path for path in service.root.rglob("*") if path.is_file() and WORDS in path.read_bytes()]
    assert {path.relative_to(service.root).parts[0] for path in kept} == {"files"}
    with service.database.read() as connection:
        stored = [str(connection.execute(select(table)).all()) for table in metadata.tables.values()]
    assert sum(map(len, stored)) > 1000
    assert not [rows for rows in stored if WORDS.decode() in rows]
    if point.startswith(("gateway", "claimed", "launched", "all")):
        assert service.restarts == 1


@pytest.mark.slow
@pytest.mark.parametrize(("verb", "status"), [("cancel", Status.CANCELLED), ("pause", Status.PAUSED)])
def test_a_job_that_is_stopped_while_the_service_is_down_stays_so(killed, verb, status):
    service = killed("none")
    (service.root / "hold").touch()
    service.until((service.root / "holding").exists)
    service.gateway.kill()
    service.jobs.move(service.job_id, status, Event(verb))
    service.until(lambda: not service.jobs.with_handle())
    assert service.job().status is status
    assert service.processes() == []
    if verb == "pause":
        (service.root / "hold").unlink()
        service.jobs.move(service.job_id, Status.QUEUED, Event("resumed"), sources={Status.PAUSED})
        assert service.finish().status is Status.SUCCEEDED
        assert service.journal().count("train") == 2
