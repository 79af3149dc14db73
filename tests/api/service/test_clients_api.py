"""The whole service, with drivers in processes of their own, under three majors of the openai client."""

import subprocess
import sys
import venv
from contextlib import ExitStack
from pathlib import Path

import openai
import pytest

from reft_ray.jobs.driver import DriverConfig
from reft_ray.jobs.launcher import ProcessLauncher
from reft_ray.jobs.lease import Leases, Slots
from reft_ray.jobs.reconciler import Reconciler

CONTRACT = Path(__file__).parent / "client_contract.py"


@pytest.fixture
def live(service, tmp_path):
    """The service with somebody who drives its jobs."""
    services = service.services
    config = DriverConfig(
        services.database.engine.url.render_as_string(hide_password=False),
        services.files.content.uri("x").removesuffix("/x"),
        "reft_ray.jobs.fake_steps:make",
        heartbeat_seconds=0.2,
    )
    launcher = ProcessLauncher(config, tmp_path / "logs")
    reconciler = Reconciler(services.jobs, Leases(services.jobs), launcher, Slots(training=2, validating=2))
    with ExitStack() as stack:
        stack.enter_context(reconciler.background(0.05))
        yield service
    for job in services.jobs.with_handle():
        launcher.stop(job.handle)


def check(python, live):
    result = subprocess.run(
        [python, str(CONTRACT), live.url, live.secret(f"contract-{Path(python).parent.parent.name}")],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_the_installed_client(live):
    assert f"openai {openai.__version__}: 0 failed" in check(sys.executable, live)


@pytest.mark.slow
@pytest.mark.parametrize("version", ["1.109.1", "2.54.0"])
def test_an_older_major(live, version, tmp_path):
    home = tmp_path / f"openai-{version}"
    venv.create(home, with_pip=True)
    python = str(home / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", f"openai=={version}"]
    installed = subprocess.run(install, capture_output=True, text=True)
    if installed.returncode != 0:
        pytest.skip(f"openai {version} cannot be installed here: {installed.stderr.strip().splitlines()[-1:]}")
    assert f"openai {version}: 0 failed" in check(python, live)
