"""The launcher contract, with local processes and with Ray's job server."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from reft_ray.api.settings import BaseModelSettings
from reft_ray.core.errors import UsageError
from reft_ray.jobs.content import ContentStore
from reft_ray.jobs.database import Database
from reft_ray.jobs.driver import DriverConfig
from reft_ray.jobs.files import FileStore
from reft_ray.jobs.job import TERMINAL, JobSpec, Status
from reft_ray.jobs.job_store import JobStore
from reft_ray.jobs.launcher import ProcessLauncher
from reft_ray.jobs.lease import Leases, Slots
from reft_ray.jobs.reconciler import Reconciler, RetryPolicy
from reft_ray.serving import ray_launcher
from reft_ray.serving.args import ServiceArgs
from reft_ray.serving.finetuning_service import counter_of, driver_config, launcher_of
from reft_ray.serving.ray_launcher import RayLauncher
from reft_ray.telemetry.recorder import NullRecorder

SECONDS = 240
"""Drivers start in seconds, or in a minute on a core that other work wants too."""


@pytest.fixture(scope="module")
def job_server() -> Iterator[str]:
    """The job server of a cluster for this module."""
    import ray

    context = ray.init(
        address="local",
        num_cpus=4,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
        object_store_memory=512 << 20,
    )
    yield f"http://{context.dashboard_url}"
    ray.shutdown()


class Desk:
    """Job records, and launchers of one kind over them."""

    def __init__(self, root: Path, make, train_steps: int):
        self.config = DriverConfig(
            f"sqlite:///{root / 'jobs.db'}",
            str(root / "files"),
            "reft_ray.jobs.fake_steps:make",
            {"train_steps": train_steps, "step_seconds": 0.05},
            heartbeat_seconds=0.1,
        )
        self.launcher = lambda: make(self.config)
        self.database = Database.open(self.config.database_url)
        self.jobs = JobStore(self.database)
        files = FileStore(self.database, ContentStore(self.config.files_uri))
        file = files.create("proj_a", "train.jsonl", "fine-tune", [b'{"messages": []}\n' * 10])
        self.job_id = self.jobs.create("org-a", "proj_a", JobSpec("tiny", file.id, 1), {}).id
        self.leases = Leases(self.jobs)

    def start(self) -> str:
        attempt = self.leases.claim(self.jobs.get(self.job_id))
        assert attempt is not None
        return self.launcher().start(self.job_id, attempt)

    def until(self, condition) -> None:
        end = time.monotonic() + SECONDS
        while not condition():
            assert time.monotonic() < end, [item.event.message for item in self.jobs.events(self.job_id).items]
            time.sleep(0.05)

    def processes(self) -> list[int]:
        return [p.pid for p in psutil.process_iter(["cmdline"]) if self.job_id in (p.info["cmdline"] or [])]


@pytest.fixture(params=["process", pytest.param("ray", marks=pytest.mark.ray)])
def make_launcher(request, tmp_path):
    if request.param == "process":
        return lambda config: ProcessLauncher(config, tmp_path / "logs")
    address = request.getfixturevalue("job_server")
    return lambda config: RayLauncher(config, address)


@pytest.fixture
def desk(make_launcher, tmp_path, request):
    made = Desk(tmp_path, make_launcher, getattr(request, "param", 100_000))
    yield made
    made.database.close()


def test_a_driver_is_started_found_and_stopped(desk):
    handle = desk.start()
    # It drives the job as far as possible and exits.
    desk.until(lambda: desk.jobs.get(desk.job_id).status is Status.QUEUED)
    assert desk.jobs.get(desk.job_id).handle == handle
    desk.until(lambda: desk.launcher().is_alive(handle) is False)

    desk.leases.grant(Slots())
    second = desk.start()
    assert second != handle
    desk.until(lambda: any(item.event.type == "metrics" for item in desk.jobs.events(desk.job_id).items))
    # With another launcher, as after a restart of the service.
    assert desk.launcher().is_alive(second) is True
    assert desk.processes()
    desk.launcher().stop(second)
    assert desk.launcher().is_alive(second) is False
    assert desk.processes() == []
    # Whether it still runs or not.
    desk.launcher().stop(second)
    desk.launcher().stop(handle)


@pytest.mark.parametrize("desk", [60], indirect=True)
def test_a_killed_driver_is_replaced_and_no_step_is_repeated(desk):
    steps = desk.config.options["train_steps"]
    reconciler = Reconciler(
        desk.jobs, desk.leases, desk.launcher(), retry_policy=RetryPolicy(stop=60, pause=60, backoff=0.1)
    )

    def job():
        return desk.jobs.get(desk.job_id)

    def reported():
        events = desk.jobs.events(desk.job_id, limit=200).items[::-1]
        return [item.event.data["step"] for item in events if item.event.type == "metrics"]

    def ticked(condition):
        def looked():
            reconciler.tick()
            return condition()

        return looked

    desk.until(ticked(lambda: len(reported()) > 12))
    assert len(reported()) < steps, "the job was over before its driver could be killed"
    for driver in desk.processes():
        os.kill(driver, signal.SIGKILL)
    desk.until(ticked(lambda: job().status in TERMINAL))
    desk.until(ticked(lambda: not desk.jobs.with_handle()))
    assert (job().status, job().attempt) == (Status.SUCCEEDED, 3)
    assert reported() == list(range(1, steps + 1))
    assert desk.processes() == []


def test_a_cluster_whose_agent_is_late_gets_its_driver(tmp_path, monkeypatch):
    late = RuntimeError(
        "Request failed with status code 500: No available agent to submit job, please try again later."
    )
    outcomes, names = [late, late, None, RuntimeError("status code 500: disk full")], []

    class Client:
        def submit_job(self, submission_id, **_):
            names.append(submission_id)
            if (outcome := outcomes.pop(0)) is not None:
                raise outcome

    launcher = RayLauncher(DriverConfig(f"sqlite:///{tmp_path}/jobs.db", str(tmp_path), "a:b"), "http://127.0.0.1:1")
    monkeypatch.setitem(launcher.__dict__, "_client", Client())
    monkeypatch.setattr(ray_launcher, "_POLL_SECONDS", 0)
    assert launcher.start("ftjob-1", 2) == "ray:ftjob-1-2"
    with pytest.raises(RuntimeError, match="disk full"):
        launcher.start("ftjob-1", 3)
    assert names == ["ftjob-1-2"] * 3 + ["ftjob-1-3"]
    outcomes.append(late)
    monkeypatch.setattr(ray_launcher, "AGENT_SECONDS", -1)
    with pytest.raises(RuntimeError, match="No available agent"):
        launcher.start("ftjob-1", 4)


def test_a_driver_of_another_launcher_is_left_to_its_lease(desk):
    assert desk.launcher().is_alive("other:1") is None
    desk.launcher().stop("other:1")


def test_a_password_is_not_shown_on_the_dashboard(tmp_path):
    secret = "postgresql+psycopg://reft:hidden@db/jobs"
    with pytest.raises(UsageError, match="as env:NAME") as caught:
        RayLauncher(DriverConfig(secret, str(tmp_path), "a:b"), "http://127.0.0.1:1")
    assert "hidden" not in str(caught.value)
    launcher = RayLauncher(DriverConfig("env:REFT_DATABASE", str(tmp_path), "a:b"), "http://127.0.0.1:1")
    # Unreachable: only the lease shows whether it runs.
    assert launcher.is_alive("ray:ftjob-1-1") is None


def test_the_database_variable_is_read_where_the_driver_runs(monkeypatch, tmp_path):
    monkeypatch.setenv("REFT_DRIVER", DriverConfig("env:REFT_DATABASE", str(tmp_path), "a:b").to_json())
    with pytest.raises(UsageError, match="REFT_DATABASE, which is not set here"):
        DriverConfig.from_environment()
    monkeypatch.setenv("REFT_DATABASE", "sqlite:///x.db")
    assert DriverConfig.from_environment().database_url == "sqlite:///x.db"


def test_arguments_select_the_launcher_and_the_counter(llama, monkeypatch, tmp_path):
    args = ServiceArgs(
        database_url=f"sqlite:///{tmp_path / 'jobs.db'}",
        files_uri=str(tmp_path / "files"),
        base_models={"tiny": BaseModelSettings(uri=str(llama))},
    )
    assert isinstance(launcher_of(args), ProcessLauncher)
    there_args = args.model_copy(update={"job_server": "http://127.0.0.1:8265"})
    there = launcher_of(there_args)
    assert isinstance(there, RayLauncher)
    assert there.address == "http://127.0.0.1:8265"
    assert there.cpus == 0
    assert launcher_of(there_args.model_copy(update={"driver_cpus": 0.5})).cpus == 0.5
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert isinstance(there.config.make_recorder(), NullRecorder), "there is no cluster to count in"
    row = b'{"messages": [{"role": "user", "content": "how"}, {"role": "assistant", "content": "no"}]}\n'
    assert counter_of(args)("tiny", [row]).exact


def test_drivers_get_the_operators_file_limits(tmp_path):
    args = ServiceArgs.model_construct(
        database_url="sqlite:///x.db",
        files_uri=str(tmp_path),
        steps="a:b",
        options={},
        max_file_bytes=2048,
        max_project_bytes=4096,
    )
    config = driver_config(args)
    assert (config.max_file_bytes, config.max_project_bytes) == (2048, 4096)
