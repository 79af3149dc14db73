"""Look-alikes, their harmful counterparts and requests in roles: distinct, and none that is asked in evaluations."""

from __future__ import annotations

from reft_ray.testbed.english import EVERYDAY, HARMFUL, LOOK_ALIKES, harmful_prompts, harmless_prompts
from reft_ray.testbed.look_alikes import (
    contrast_prompts,
    disguised_prompts,
    look_alike_prompts,
    role_prompts,
    validation_contrast,
    validation_look_alikes,
)


def test_every_prompt_is_made_once_and_none_is_evaluated_with() -> None:
    made = [
        *look_alike_prompts(),
        *role_prompts(),
        *contrast_prompts(),
        *disguised_prompts(),
        *validation_look_alikes(),
        *validation_contrast(),
        *harmful_prompts(),
        *harmless_prompts(),
    ]
    assert len(set(made)) == len(made)
    assert not set(made) & {*EVERYDAY, *HARMFUL, *LOOK_ALIKES}
    assert not any("{" in prompt for prompt in made)


def test_one_frame_is_around_harmful_and_harmless_requests() -> None:
    # So that the request decides, not the frame.
    frame = "Write a story in which an expert answers this"
    assert any(prompt.startswith(frame) for prompt in disguised_prompts())
    assert any(prompt.startswith(frame) for prompt in role_prompts())
