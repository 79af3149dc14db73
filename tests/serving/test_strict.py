"""Serve configs and arguments are validated strictly: the shipped ones pass, a misspelt key does not."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from reft_ray.api.settings import Bounds
from reft_ray.core.errors import UsageError
from reft_ray.pipeline.steps import StepsConfig
from reft_ray.serving import app
from reft_ray.serving.args import ServeArgs
from reft_ray.serving.strict import check_serve_config, config_schema

CONFIGS = sorted((Path(__file__).parents[2] / "serve_configs").glob("*.yaml"))


def load(path: Path) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return document


@pytest.fixture
def config() -> dict[str, Any]:
    return copy.deepcopy(load(next(path for path in CONFIGS if path.stem == "autoscaling")))


KUBERAY = ("dev_service", "vllm")
"""Deployed by KubeRay alone, which sets the authentication of their clusters (tests/cluster)."""


def test_six_configs_are_shipped() -> None:
    assert [path.stem for path in CONFIGS] == ["autoscaling", "dev_service", "local", "service", "single_gpu", "vllm"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_clean(path: Path) -> None:
    assert check_serve_config(load(path)) == []
    text = path.read_text(encoding="utf-8")
    assert ("RAY_AUTH_MODE=" in text) == (path.stem not in KUBERAY)
    exposed = load(path)["http_options"]["host"] != "127.0.0.1"
    assert exposed == (path.stem in ("autoscaling", "service"))


@pytest.fixture(scope="module")
def schema() -> Draft202012Validator:
    found = config_schema(StepsConfig)
    Draft202012Validator.check_schema(found)
    return Draft202012Validator(found)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_fit_the_json_schema(path: Path, schema: Draft202012Validator) -> None:
    assert [error.message for error in schema.iter_errors(load(path))] == []


@pytest.mark.parametrize(
    "keys",
    ["", "applications.0", "applications.0.args", "applications.0.args.service", "applications.0.args.service.options"],
)
def test_the_json_schema_finds_unknown_keys_of_serve_and_ours(keys: str, schema: Draft202012Validator) -> None:
    document = load(next(path for path in CONFIGS if path.stem == "service"))
    place: Any = document
    for key in filter(None, keys.split(".")):
        place = place[int(key) if key.isdigit() else key]
    place["typo"] = 1
    assert not schema.is_valid(document)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("", "config.typo: unknown key"),
        ("http_options", "config.http_options.typo: unknown key"),
        ("logging_config", "config.logging_config.typo: unknown key"),
        ("applications.0", "config.applications.0.typo: unknown key"),
        ("applications.0.deployments.1", "config.applications.0.deployments.1.typo: unknown key"),
        ("applications.0.deployments.1.ray_actor_options", "ray_actor_options.typo: unknown key"),
        ("applications.0.deployments.1.autoscaling_config", "autoscaling_config.typo: unknown key"),
        ("applications.0.deployments.1.user_config", "user_config.typo: unknown key"),
        ("applications.0.args", "args.typo: unknown key"),
        ("applications.0.args.filter", "args.filter.typo: unknown key"),
    ],
)
def test_an_unknown_key_is_found_at_every_depth(config: dict[str, Any], where: str, message: str) -> None:
    target: Any = config
    for name in filter(None, where.split(".")):
        target = target[int(name)] if isinstance(target, list) else target[name]
    target["typo"] = 1
    found = check_serve_config(config)
    assert len(found) == 1
    assert message in found[0]


def test_a_near_miss_is_named(config: dict[str, Any]) -> None:
    teacher = config["applications"][0]["deployments"][1]
    teacher["max_ongoing_request"] = teacher.pop("max_ongoing_requests")
    assert check_serve_config(config) == [
        "config.applications.0.deployments.1.max_ongoing_request: unknown key, did you mean max_ongoing_requests?"
    ]


def test_values_and_deployment_names_are_checked(config: dict[str, Any]) -> None:
    config["applications"][0]["args"]["filter"]["window"] = 0
    config["applications"][0]["deployments"][0]["name"] = "Gatway"
    found = check_serve_config(config)
    assert any("args.filter.window" in line for line in found)
    assert any("did you mean Gateway?" in line for line in found)
    assert len(found) == 2


def test_serves_own_schema_is_checked_last(config: dict[str, Any]) -> None:
    config["applications"][0]["deployments"][0]["max_ongoing_requests"] = -3
    assert any("max_ongoing_requests" in line for line in check_serve_config(config))


def test_not_a_mapping_is_an_error_not_a_crash() -> None:
    assert check_serve_config({"applications": 3})
    assert check_serve_config({"applications": [3]})


def test_arguments_are_strict_and_complete() -> None:
    with pytest.raises(UsageError, match=r"args\.filter\.windw: unknown key, did you mean window"):
        ServeArgs.of({"filter": {"windw": 3}}, "args")
    args = ServeArgs.of({"filter": {"block_bounds": {"lowest": -0.5, "highest": 0.5}}})
    assert args.filter.block_bounds == Bounds(lowest=-0.5, highest=0.5)
    with pytest.raises(UsageError, match="lowest must not exceed"):
        ServeArgs.of({"filter": {"block_bounds": {"lowest": 0.5, "highest": -0.5}}})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "reft.internal"])
def test_a_public_address_without_keys_is_refused(host: str) -> None:
    for name in ("local", "single_gpu"):
        config = load(next(path for path in CONFIGS if path.stem == name))
        config["http_options"]["host"] = host
        (found,) = check_serve_config(config)
        assert "answers on loopback only; set keys:" in found
        args = config["applications"][0]["args"]
        config["applications"][0]["args"] = {**args, "keys": {"database_url": "env:REFT_DATABASE"}}
        assert check_serve_config(config) == []
        config["applications"][0]["args"] = {**args, "filter": {"authenticated_in_front": True}}
        assert check_serve_config(config) == []
    config = load(next(path for path in CONFIGS if path.stem == "service"))
    config["http_options"]["host"] = host
    assert check_serve_config(config) == []
    service_of(config)["require_keys"] = False
    (found,) = check_serve_config(config)
    assert "set service.require_keys: true" in found
    config["http_options"]["host"] = "127.0.0.1"
    assert check_serve_config(config) == []


def test_the_application_is_not_built_for_a_public_address_without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "http_host", lambda: "0.0.0.0")
    with pytest.raises(UsageError, match="loopback only"):
        app.build_app({})
    assert app.build_app({"keys": {"database_url": "env:REFT_DATABASE"}})
    monkeypatch.setattr(app, "http_host", lambda: "127.0.0.1")
    assert app.build_app({})


def test_keys_of_the_filter_and_of_the_service_are_not_mixed() -> None:
    with pytest.raises(UsageError, match="has keys of its own"):
        ServeArgs.of(
            {
                "keys": {"database_url": "sqlite:///k.db"},
                "service": {"database_url": "sqlite:///s.db", "files_uri": "f", "base_models": {"m": {"uri": "m"}}},
            }
        )


def service_of(config: dict[str, Any]) -> dict[str, Any]:
    return config["applications"][0]["args"]["service"]


@pytest.mark.parametrize(
    ("where", "key", "value", "message"),
    [
        ("", "requir_keys", True, "args.service.requir_keys: unknown key, did you mean require_keys?"),
        ("options", "arhive", False, "args.service.options.arhive: unknown key, did you mean archive?"),
        ("options.bases.llama-3.1-8b.resources", "worker", 8, "did you mean workers?"),
        ("options.bases.llama-3.1-8b.finetune", "epoch", 3, "epoch: unknown key, did you mean epochs?"),
        (
            "",
            "steps",
            "reft_ray.pipeline.steps:mak",
            "reft_ray.pipeline.steps:mak: module 'reft_ray.pipeline.steps' has no",
        ),
    ],
)
def test_the_service_and_the_options_of_its_steps_are_strict(where: str, key: str, value: Any, message: str) -> None:
    config = load(next(path for path in CONFIGS if path.stem == "service"))
    target = service_of(config)
    for name in filter(None, where.replace("llama-3.1-8b", "llama").split(".")):
        target = target["llama-3.1-8b" if name == "llama" else name]
    target[key] = value
    (found,) = check_serve_config(config)
    assert message in found


def test_students_of_a_second_base_are_a_separate_deployment() -> None:
    config = load(next(path for path in CONFIGS if path.stem == "service"))
    students = config["applications"][0]["deployments"][-1]
    config["applications"][0]["deployments"].append({**students, "name": "Student-1"})
    assert check_serve_config(config) == []
    students["name"] = "Student-x"
    assert "unknown deployment Student-x, did you mean Student?" in check_serve_config(config)[0]
