"""A hundred job bodies of the documented kinds: accepted as they are, or every difference has its name."""

import itertools

import pytest

from reft_ray.api.job_schema import parse
from reft_ray.api.settings import BaseModelSettings, ServiceSettings
from reft_ray.migrate.bodies import body_of, plan

MODELS = ("gpt-4o-mini-2024-07-18", "gpt-4.1-nano-2025-04-14", "ft:gpt-4o-mini-2024-07-18:acme:support:AbCdEf12")
HYPERPARAMETERS = (
    {}, {"n_epochs": "auto"}, {"n_epochs": 1}, {"n_epochs": 50}, {"batch_size": 256}, {"batch_size": "auto"},
    {"learning_rate_multiplier": 0.1}, {"learning_rate_multiplier": 2}, {"learning_rate_multiplier": "auto"},
    {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 1.8},
)  # fmt: skip
EXTRAS = (
    {}, {"suffix": "support"}, {"suffix": "a.b-c_d"}, {"seed": 0}, {"seed": 2147483647}, {"validation_file": "file-v"},
    {"metadata": {"team": "a", "run": "7"}}, {"metadata": {str(i): "v" * 512 for i in range(16)}},
)  # fmt: skip
WANDB = {"type": "wandb", "wandb": {"project": "p", "name": "n", "entity": "e", "tags": ["a"]}}
GRADER = {"type": "string_check", "name": "g", "input": "{{sample.output_text}}", "operation": "eq", "reference": "x"}

ACCEPTED = [
    *({"hyperparameters": values} for values in HYPERPARAMETERS),
    *({"method": {"type": "supervised", "supervised": {"hyperparameters": values}}} for values in HYPERPARAMETERS),
    *({"hyperparameters": values, **extra} for values, extra in itertools.product(HYPERPARAMETERS[:5], EXTRAS)),
    {"method": {"type": "supervised"}},
    {"integrations": []},
    {"integrations": None, "method": None, "seed": None, "suffix": None, "metadata": None},
]
DEVIATING = [
    ({"integrations": [WANDB]}, ["integrations"]),
    ({"integrations": [WANDB], "seed": 1, "suffix": "s"}, ["integrations"]),
    ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": "auto"}}}}, ["method.type"]),
    ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1, "n_epochs": 2}}}}, ["method.type"]),
    ({"method": {"type": "reinforcement", "reinforcement": {"grader": GRADER}}}, ["method.type"]),
    ({"hyperparameters": {"n_epochs": 100}}, ["hyperparameters.n_epochs"]),
    ({"hyperparameters": {"batch_size": 1024}}, ["hyperparameters.batch_size"]),
    ({"hyperparameters": {"beta": 0.1}}, ["hyperparameters.beta"]),
    ({"hyperparameters": {"prompt_loss_weight": 0.1}}, ["hyperparameters.prompt_loss_weight"]),
    ({"suffix": "no spaces here"}, ["suffix"]),
    ({"suffix": ""}, ["suffix"]),
    ({"seed": -1}, ["seed"]),
    ({"metadata": {"k" * 65: "v"}}, ["metadata"]),
    ({"metadata": {str(i): "v" for i in range(17)}}, ["metadata"]),
    ({"user": "u"}, ["user"]),
    ({"integrations": [WANDB], "hyperparameters": {"n_epochs": 99, "beta": 1}},
     ["hyperparameters.n_epochs", "hyperparameters.beta", "integrations"]),
    ({"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 0}}}},
     ["method.supervised.hyperparameters.n_epochs"]),
]  # fmt: skip


def body(number, extra):
    return {"model": MODELS[number % len(MODELS)], "training_file": "file-1", **extra}


BODIES = [body(number, extra) for number, extra in enumerate([*ACCEPTED, *(extra for extra, _ in DEVIATING)])]


def test_there_are_a_hundred_different_ones():
    bodies = [*BODIES, *(body(number + 1, extra) for number, extra in enumerate(ACCEPTED))]
    assert len({repr(one) for one in bodies}) >= 100


@pytest.mark.parametrize("models", [{"*": "ours"}, {name: name for name in MODELS}])
def test_documented_bodies_are_accepted_as_they_are(models):
    for number, extra in itertools.product(range(len(MODELS)), ACCEPTED):
        asked = body(number, extra)
        found = plan(asked, models)
        ours = models.get(asked["model"], "ours")
        assert found.body == asked | {"model": ours}
        assert [one.field for one in found.deviations] == (["model"] if ours != asked["model"] else [])


@pytest.mark.parametrize(("extra", "fields"), DEVIATING)
def test_every_difference_is_named_and_the_rest_is_accepted(extra, fields):
    asked = body(0, extra)
    found = plan(asked, {asked["model"]: asked["model"]})
    assert sorted(one.field.split(".k")[0] for one in found.deviations) == sorted(fields)
    assert all(one.message for one in found.deviations)
    if "method.type" in fields:
        assert found.body is None
        return
    parse(found.body, ServiceSettings(base_models={asked["model"]: BaseModelSettings(uri="-")}))
    assert asked == body(0, extra)


def test_the_body_of_a_job_is_read_from_the_job():
    assert body_of({"model": "m", "training_file": "f", "fine_tuned_model": "ft:m:org::Abc"}) == {
        "model": "m", "training_file": "f",
    }  # fmt: skip
    assert plan({"model": "m", "training_file": "f"}, {"n": "ours"}).body is None
