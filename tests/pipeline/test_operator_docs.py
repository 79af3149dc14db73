"""The configurations in docs/service.md and serve_configs/ are valid."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from reft_ray.api.settings import BaseModelSettings
from reft_ray.pipeline.steps import StepsConfig
from reft_ray.serving.args import ServiceArgs
from reft_ray.serving.finetuning_service import launcher_of
from reft_ray.serving.ray_launcher import RayLauncher

ROOT = Path(__file__).parents[2]


def examples() -> list[dict[str, Any]]:
    """The YAML examples in docs/service.md."""
    text = (ROOT / "docs/service.md").read_text()
    return [yaml.safe_load(example) for example in re.findall(r"```yaml\n(.*?)```", text, re.S)]


def shipped() -> dict[str, Any]:
    """The arguments in serve_configs/service.yaml."""
    config = yaml.safe_load((ROOT / "serve_configs/service.yaml").read_text())
    arguments: dict[str, Any] = config["applications"][0]["args"]
    return arguments


@pytest.mark.parametrize("document", [examples()[0], shipped()], ids=["docs", "shipped"])
def test_the_service_section_is_valid(document: dict[str, Any]) -> None:
    args = ServiceArgs.model_validate(document["service"])
    steps = StepsConfig.of(args.options)
    assert steps.bases.keys() == args.base_models.keys()
    for name, base in args.base_models.items():
        assert steps.bases[name].finetune["epochs"] == base.n_epochs
        assert steps.bases[name].gate.limits == args.gate


def test_the_shipped_service_runs_on_several_machines() -> None:
    args = ServiceArgs.model_validate(shipped()["service"])
    assert args.require_keys
    assert args.database_url.startswith("env:")
    launcher = launcher_of(args)
    assert isinstance(launcher, RayLauncher)
    for base in launcher.config.make_steps().config.bases.values():  # type: ignore[attr-defined]
        assert base.resources.workers > 0


def test_the_example_of_an_endpoint_is_valid() -> None:
    for base in examples()[1]["base_models"].values():
        assert BaseModelSettings.model_validate(base).endpoint is not None
