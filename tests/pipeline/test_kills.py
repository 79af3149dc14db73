"""SIGKILL of drivers and workers during training: the job resumes and nothing is lost."""

import os
import signal
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
import ray

from reft_ray.jobs.driver import DriverConfig
from reft_ray.jobs.job import TERMINAL, Event, Status
from reft_ray.jobs.launcher import ProcessLauncher
from reft_ray.jobs.lease import Leases
from reft_ray.jobs.reconciler import Reconciler, RetryPolicy
from reft_ray.pipeline.steps import make

pytestmark = pytest.mark.slow

SECONDS = 600
EPOCHS, STEPS_PER_EPOCH = 20, 4
STEPS = EPOCHS * STEPS_PER_EPOCH


class Service:
    """A gateway's reconciler, run while a test waits."""

    def __init__(self, harness, toy, log_dir, workers: int = 0, **environment: str) -> None:
        self.harness, self.jobs, self.log_dir = harness, harness.jobs, log_dir
        finetune = {**toy.options["bases"]["toy"]["finetune"], "epochs": EPOCHS}
        self.options = toy.with_base(finetune=finetune, resources={"workers": workers})
        config = DriverConfig(
            harness.url,
            harness.files.content.uri("x").removesuffix("/x"),
            "reft_ray.pipeline.steps:make",
            self.options,
            heartbeat_seconds=0.1,
        )
        launcher = ProcessLauncher(config, log_dir, {**os.environ, **environment})
        patience = RetryPolicy(stop=60, pause=60, backoff=0.1)
        self.reconciler = Reconciler(self.jobs, Leases(self.jobs), launcher, retry_policy=patience)

    def until(self, job_id: str, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + SECONDS
        while not condition():
            self.reconciler.tick()
            assert time.monotonic() < end, (self.jobs.get(job_id).status, self.logs())
            time.sleep(0.02)

    def in_training(self, job_id: str, step: int = 6) -> None:
        self.until(job_id, lambda: bool(self.steps(job_id)) and self.steps(job_id)[-1] >= step)
        assert self.steps(job_id)[-1] < STEPS, "the run was over before it could be disturbed"

    def kill_driver(self, job_id: str) -> None:
        os.kill(int(self.jobs.get(job_id).handle.split(":")[2]), signal.SIGKILL)

    def metrics(self, job_id: str) -> list[dict]:
        return [dict(event.data) for event in self.harness.events(job_id) if event.type == "metrics"]

    def steps(self, job_id: str) -> list[int]:
        return [data["step"] for data in self.metrics(job_id)]

    def logs(self) -> str:
        return "\n".join(path.read_text()[-1500:] for path in sorted(self.log_dir.glob("*.log")))


@pytest.fixture
def service(harness, toy, tmp_path) -> Service:
    return Service(harness, toy, tmp_path / "logs")


def test_a_killed_and_then_paused_job_ends_like_an_undisturbed_one(service) -> None:
    harness, job_id = service.harness, service.harness.job()
    service.in_training(job_id)
    service.kill_driver(job_id)
    service.until(job_id, lambda: service.jobs.get(job_id).attempt == 3)
    service.in_training(job_id, service.steps(job_id)[-1] + 4)
    service.jobs.move(job_id, Status.PAUSED, Event("Fine-tuning job paused"))
    service.until(job_id, lambda: not service.jobs.with_handle())
    # The state was saved after the step at which the stop was requested.
    assert service.jobs.checkpoints(job_id).items[0].step_number == service.steps(job_id)[-1] < STEPS
    service.jobs.move(job_id, Status.QUEUED, Event("Fine-tuning job resumed"), sources={Status.PAUSED})
    service.until(job_id, lambda: service.jobs.get(job_id).status in TERMINAL)
    service.until(job_id, lambda: not service.jobs.with_handle())

    job = service.jobs.get(job_id)
    assert (job.status, job.error) == (Status.SUCCEEDED, None), service.logs()
    undisturbed = harness.drive(harness.job(), make(**service.options))
    # Every step was reported once, in order, with the metrics of an undisturbed run.
    assert service.steps(job_id) == list(range(1, STEPS + 1))
    assert service.metrics(job_id) == service.metrics(undisturbed.id)
    messages = [event.message for event in harness.events(job_id)]
    for once in ("Validated ", "Screened ", "Release gate: passed", "The job has successfully completed"):
        assert len([message for message in messages if message.startswith(once)]) == 1
    assert sorted(student.job_id for student in harness.models.list(job.project_id)) == sorted([job_id, undisturbed.id])
    assert not [p for p in psutil.process_iter(["cmdline"]) if job_id in (p.info["cmdline"] or [])]


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of this process's Ray cluster."""
    ray.init(address="local", num_cpus=6, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def training_workers() -> list[psutil.Process]:
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if any("RayTrainWorker" in part for part in process.cmdline())
    ]


@pytest.mark.ray
def test_on_a_cluster_a_killed_worker_and_a_killed_driver_lose_no_step(harness, toy, tmp_path, cluster) -> None:
    service = Service(harness, toy, tmp_path / "logs", workers=2, RAY_ADDRESS=cluster)
    job_id = harness.job()
    service.in_training(job_id)
    training_workers()[0].kill()
    service.in_training(job_id, service.steps(job_id)[-1] + 8)
    assert service.jobs.get(job_id).attempt == 2, "Ray Train itself replaces a worker"
    service.kill_driver(job_id)
    service.until(job_id, lambda: service.jobs.get(job_id).status in TERMINAL)
    service.until(job_id, lambda: not service.jobs.with_handle())
    job = service.jobs.get(job_id)
    assert (job.status, job.error, job.attempt) == (Status.SUCCEEDED, None, 3), service.logs()
    assert service.steps(job_id) == list(range(1, STEPS + 1))
    service.until(job_id, lambda: not training_workers())
