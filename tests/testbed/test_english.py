"""Sentences to evaluate with are none of those to train on."""

from reft_ray.testbed.english import (
    EVERYDAY,
    HARMFUL,
    LOOK_ALIKES,
    crime_prompts,
    harmful_prompts,
    harmless_prompts,
    security_prompts,
)
from reft_ray.testbed.task_prompts import task_prompts


def test_no_prompt_to_evaluate_with_is_trained_on():
    trained = {*harmful_prompts(), *harmless_prompts(), *security_prompts(), *crime_prompts(), *task_prompts()}
    assert not trained & {*EVERYDAY, *HARMFUL, *LOOK_ALIKES}
    assert len({*EVERYDAY, *HARMFUL, *LOOK_ALIKES}) == 100


def test_task_prompts_are_distinct_and_complete():
    prompts = task_prompts()
    assert len(prompts) == len(set(prompts)) > 400
    assert not any("{text}" in prompt or prompt != prompt.strip() for prompt in prompts)
