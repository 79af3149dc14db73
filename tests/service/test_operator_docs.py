"""The operator's files in docs/service.md are ones that the service takes."""

import re
from pathlib import Path

import yaml

from reft_ray.service.config import StepsConfig
from reft_ray.serving.args import BaseModelArgs, ServiceArgs
from reft_ray.serving.jobs import settings_of


def test_the_example_of_the_operators_file_is_valid() -> None:
    text = (Path(__file__).parents[2] / "docs/service.md").read_text()
    example, endpoint = re.findall(r"```yaml\n(.*?)```", text, re.S)
    args = ServiceArgs.model_validate(yaml.safe_load(example)["service"])
    steps = StepsConfig.of(args.options)
    assert steps.bases.keys() == settings_of(args).base_models.keys()
    for name, base in args.base_models.items():
        assert steps.bases[name].finetune["epochs"] == base.n_epochs
        assert steps.bases[name].gate.limits == args.gate
    for base in yaml.safe_load(endpoint)["base_models"].values():
        assert BaseModelArgs.model_validate(base).endpoint is not None
