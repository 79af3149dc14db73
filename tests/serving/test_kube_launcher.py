"""A RayJob per attempt, against an HTTP server that keeps objects as the Kubernetes API does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml

from reft_ray.core.errors import UsageError
from reft_ray.jobs.driver import CONFIG_VARIABLE, DriverConfig
from reft_ray.serving.kube_launcher import KubeLauncher

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = yaml.safe_load((ROOT / "cluster/components/jobs/rayjob.yaml").read_text())
CONFIG = DriverConfig("env:REFT_DATABASE", "s3://b/files", "reft_ray.jobs.fake_steps:make", {})


class Api:
    """RayJobs by name; `failing` answers 500."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.failing = False
        api = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                size = int(self.headers.get("content-length", 0))
                body = json.loads(self.rfile.read(size)) if size else {}
                name = self.path.removeprefix("/apis/ray.io/v1/namespaces/reft-ray/rayjobs").strip("/")
                if self.headers["authorization"] != "Bearer secret":
                    return self.send(401, {})
                if api.failing:
                    return self.send(500, {})
                if self.command == "POST":
                    name = body["metadata"]["name"]
                    if name in api.jobs:
                        return self.send(409, {})
                    api.jobs[name] = body
                    return self.send(201, body)
                found = api.jobs.get(name)
                if found is not None and self.command == "DELETE":
                    assert body == {"propagationPolicy": "Foreground"}
                    del api.jobs[name]
                return self.send(404 if found is None else 200, found or {})

            do_GET = do_POST = do_DELETE = answer

            def send(self, code: int, document: dict[str, Any]) -> None:
                body = json.dumps(document).encode()
                self.send_response(code)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def api() -> Iterator[Api]:
    made = Api()
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def launcher(api: Api, tmp_path: Path) -> KubeLauncher:
    (tmp_path / "token").write_text("secret\n")
    return KubeLauncher(CONFIG, TEMPLATE, "reft-ray", api.url, tmp_path)


def test_an_attempt_is_one_rayjob(launcher, api):
    handle = launcher.start("ftjob-ABC", 2)
    assert launcher.start("ftjob-ABC", 2) == handle, "a repeated start finds the first one"
    (job,) = api.jobs.values()
    assert handle == f"rayjob:{job['metadata']['name']}"
    assert len(job["metadata"]["name"]) <= 47
    assert job["spec"]["entrypoint"] == "python -m reft_ray.jobs.driver ftjob-ABC 2"
    config = json.loads(yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"][CONFIG_VARIABLE])
    assert config["handle"] == handle
    assert job["spec"]["rayClusterSpec"] == TEMPLATE["spec"]["rayClusterSpec"]
    assert launcher.start("ftjob-ABC", 3) != handle
    assert len(api.jobs) == 2


@pytest.mark.parametrize(
    ("status", "alive", "waiting"),
    [
        ({}, True, True),
        ({"jobDeploymentStatus": "Initializing"}, True, True),
        ({"jobStatus": "PENDING", "jobDeploymentStatus": "Running"}, True, True),
        ({"jobStatus": "RUNNING", "jobDeploymentStatus": "Running"}, True, False),
        ({"jobStatus": "SUCCEEDED", "jobDeploymentStatus": "Complete"}, False, False),
        ({"jobStatus": "", "jobDeploymentStatus": "Failed"}, False, False),
    ],
)
def test_states(launcher, api, status, alive, waiting):
    handle = launcher.start("ftjob-1", 1)
    (job,) = api.jobs.values()
    job["status"] = status
    assert (launcher.is_alive(handle), launcher.is_waiting(handle)) == (alive, waiting)


def test_a_stopped_job_is_gone(launcher, api):
    handle = launcher.start("ftjob-1", 1)
    launcher.stop(handle)
    assert api.jobs == {}
    assert launcher.is_alive(handle) is False
    launcher.stop(handle)


def test_only_the_lease_knows_where_the_api_is_silent(launcher, api):
    handle = launcher.start("ftjob-1", 1)
    api.failing = True
    assert launcher.is_alive(handle) is None
    assert not launcher.is_waiting(handle)
    with pytest.raises(ConnectionError, match="HTTP 500"):
        launcher.start("ftjob-2", 1)
    assert launcher.is_alive("ray:other") is None
    launcher.stop("ray:other")


def test_a_url_with_a_password_and_another_kind_are_refused(tmp_path):
    with pytest.raises(UsageError, match="env:NAME"):
        KubeLauncher(DriverConfig("postgresql://u:p@h/d", "s3://b", "m:f", {}), TEMPLATE, "n")
    with pytest.raises(UsageError, match="expected a RayJob"):
        KubeLauncher(CONFIG, {"kind": "Job"}, "n")
    with pytest.raises(UsageError, match="job_template"):
        KubeLauncher.in_pod(CONFIG, str(tmp_path / "none.yaml"))


def test_the_template_has_its_own_secrets_and_spot_workers():
    groups = {group["groupName"]: group for group in TEMPLATE["spec"]["rayClusterSpec"]["workerGroupSpecs"]}
    assert groups["spot-gpu"]["maxReplicas"] >= 8
    for spec in (TEMPLATE["spec"]["rayClusterSpec"]["headGroupSpec"], *groups.values()):
        (container,) = spec["template"]["spec"]["containers"]
        secrets = {source["secretRef"]["name"] for source in container["envFrom"]}
        assert "reft-ray-jobs" in secrets
        assert "reft-ray-service" not in secrets
