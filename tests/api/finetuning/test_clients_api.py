"""The whole service, with drivers as processes, under three major versions of the openai client."""

from contextlib import ExitStack

import openai
import pytest

from reft_ray.jobs.driver import DriverConfig
from reft_ray.jobs.launcher import ProcessLauncher
from reft_ray.jobs.lease import Leases, Slots
from reft_ray.jobs.reconciler import Reconciler


@pytest.fixture
def live(service, tmp_path):
    """The service with a reconciler that runs its jobs."""
    stores = service.stores
    config = DriverConfig(
        stores.database.engine.url.render_as_string(hide_password=False),
        stores.files.content.uri("x").removesuffix("/x"),
        "reft_ray.jobs.fake_steps:make",
        heartbeat_seconds=0.2,
    )
    launcher = ProcessLauncher(config, tmp_path / "logs")
    reconciler = Reconciler(stores.jobs, Leases(stores.jobs), launcher, Slots(training=2, validating=2))
    with ExitStack() as stack:
        stack.enter_context(reconciler.background(0.05))
        yield service
    for job in stores.jobs.with_handle():
        launcher.stop(job.handle)


# Twenty driver processes: the other tests of this folder ask the same routes of SQLite in the fast lane.
@pytest.mark.parametrize(
    "service",
    [pytest.param("sqlite", marks=pytest.mark.slow), pytest.param("postgresql", marks=pytest.mark.servers)],
    indirect=True,
)
@pytest.mark.timeout(600)
def test_the_installed_client(live, check_client):
    """Each of its jobs is a driver process: on a busy machine a job takes a minute."""
    said = check_client(live.url, live.secret("contract"), limit=550, seconds=180)
    assert f"openai {openai.__version__}: 0 failed" in said


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1.109.1", "2.54.0"])
def test_an_older_major(live, version, check_client):
    key = live.secret(f"contract-{version}")
    assert f"openai {version}: 0 failed" in check_client(live.url, key, version)
