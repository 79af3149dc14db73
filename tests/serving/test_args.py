"""The section `service:` is strict and optional, and decides how drivers, students and metrics run."""

from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from reft_ray.core.errors import UsageError
from reft_ray.jobs.estimate import Speed
from reft_ray.jobs.launcher import ProcessLauncher
from reft_ray.serving.app import _students, build_app
from reft_ray.serving.args import ServeArgs, ServiceArgs
from reft_ray.serving.finetuning_service import launcher_of
from reft_ray.serving.gateway import Gateway
from reft_ray.serving.ray_launcher import RayLauncher

SERVICE = {
    "database_url": "sqlite:////tmp/reft.db",
    "files_uri": "/tmp/files",
    "base_models": {
        "small": {"uri": "/models/small"},
        "alias": {"uri": "/models/small"},
        "big": {"uri": "/models/big"},
    },
}


def test_the_section_is_optional() -> None:
    assert ServeArgs().service is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"databse_url": "x"}, "args.service.databse_url: unknown key, did you mean database_url?"),
        ({"slots": {"trainin": 2}}, "args.service.slots.trainin: unknown key, did you mean training?"),
        ({"job_server": "head:8265"}, "args.service.job_server: "),
        ({"base_models": {}}, "args.service.base_models: "),
        ({"steps": "not a factory"}, "args.service.steps: "),
    ],
)
def test_mistakes_are_reported_with_their_path(change, message) -> None:
    with pytest.raises(UsageError) as caught:
        ServeArgs.of({"service": {**SERVICE, **change}}, "args")
    assert message in str(caught.value)


def test_models_with_the_same_uri_share_a_deployment() -> None:
    build_app({"service": SERVICE})
    args = ServeArgs.of({"service": SERVICE})
    assert args.service is not None
    assert set(args.service.base_models) == {"small", "alias", "big"}
    assert list(_students(args)) == ["/models/small", "/models/big"]


def test_a_base_model_has_what_estimates_need() -> None:
    speed = {"training_tokens": 1000, "screening_rows": 50}
    models = {"small": {"uri": "/models/small", "preset": "h200", "min_steps": 350, "speed": speed}}
    args = ServeArgs.of({"service": {**SERVICE, "base_models": models}})
    assert args.service is not None
    base = args.service.base_models["small"]
    assert (base.preset, base.n_epochs, base.batch_size, base.min_steps) == ("h200", 3, 16, 350)
    assert base.speed == Speed(training_tokens=1000, screening_rows=50)
    with pytest.raises(UsageError, match=r"base_models\.small\.speed\.screening_rows: "):
        ServeArgs.of(
            {"service": {**SERVICE, "base_models": {"small": {"uri": "/m", "speed": speed | {"screening_rows": 0}}}}}
        )


def test_job_server_selects_the_launcher(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("RAY_RAYLET_PID", "1")
    here = launcher_of(ServiceArgs.model_validate(SERVICE))
    assert isinstance(here, ProcessLauncher)
    assert "RAY_RAYLET_PID" not in (here._environment or {}), "a driver is not a Ray worker"
    there = launcher_of(ServiceArgs.model_validate({**SERVICE, "job_server": "http://h:1"}))
    assert isinstance(there, RayLauncher)
    assert (there.address, there.config.steps) == ("http://h:1", "reft_ray.pipeline.steps:make")


def test_a_base_with_an_endpoint_has_no_deployment() -> None:
    endpoint = {"url": "http://127.0.0.1:8100/v1", "model": "small"}
    models = {"small": {"uri": "/models/small", "endpoint": endpoint}, "big": {"uri": "/models/big"}}
    args = ServeArgs.of({"service": {**SERVICE, "base_models": models}})
    assert list(_students(args)) == ["/models/big"]
    with pytest.raises(UsageError, match="adapters_root belongs to"):
        ServeArgs.of(
            {"service": {**SERVICE, "base_models": {"s": {"uri": "/s", "endpoint": {**endpoint, "adapters": "path"}}}}}
        )


def test_metrics_require_the_token_of_the_environment(tmp_path: Path, monkeypatch) -> None:
    configured: list[bool] = []
    monkeypatch.setattr("reft_ray.telemetry.logs.configure", lambda: configured.append(True))
    monkeypatch.setenv("SCRAPERS_TOKEN", "s3cret")
    endpoint = {"url": "http://127.0.0.1:1/v1", "model": "small"}
    models = {"small": {"uri": "/models/small", "endpoint": endpoint}}
    service = {
        **SERVICE,
        "base_models": models,
        "database_url": f"sqlite:///{tmp_path / 's.db'}",
        "files_uri": str(tmp_path / "files"),
    }
    for section in ({}, {"service": service}):
        args = ServeArgs.of({"metrics_token_variable": "SCRAPERS_TOKEN", **section})
        client = TestClient(Gateway(None, args.model_dump()).__serve_build_asgi_app__())
        assert client.get("/metrics").status_code == 401
        found = client.get("/metrics", headers={"authorization": "Bearer s3cret"})
        assert "reft_build_info" in found.text
    assert configured == [True, True]
    monkeypatch.delenv("SCRAPERS_TOKEN")
    with pytest.raises(UsageError, match="the environment variable SCRAPERS_TOKEN is empty"):
        Gateway(None, args.model_dump()).__serve_build_asgi_app__()
