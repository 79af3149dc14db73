"""bfloat16 gives the same verdicts as float32: the packaged teacher on two thousand prompts in batches of any kind."""

import random

import pytest

from reft_ray.hf.ref_teacher import RefTeacher
from reft_ray.teachers import BUILTIN, teacher_folder
from reft_ray.testbed.synthetic import Sizes, SyntheticRows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
PROMPTS = 2_000


def prompts() -> list[str]:
    """Distinct prompts of a different seed from the teacher's training rows."""
    synthetic = SyntheticRows.make(1, Sizes(teacher_train=9000, teacher_validation=2000, alignment=1))
    rows = (
        *synthetic.teacher_train,
        *synthetic.teacher_validation,
        *synthetic.hs_prompts,
        *synthetic.over_refusal_prompts,
    )
    return list(dict.fromkeys(row.prompt[-1].content for row in rows))[:PROMPTS]


def test_bfloat16_decides_as_float32_does_in_any_batch() -> None:
    texts = prompts()
    assert len(texts) == PROMPTS
    teacher = RefTeacher.load(teacher_folder(BUILTIN))
    exact = teacher.scorer(precision="float32")
    decisions = [exact.thresholds.decide(item.score) for item in exact.score(texts)]
    assert 0.2 < sum(decision == "block" for decision in decisions) / PROMPTS < 0.8

    rounded = teacher.scorer(precision="bfloat16")
    order = list(range(PROMPTS))
    for shuffle in (False, True):
        if shuffle:
            random.Random(0).shuffle(order)
        same = 0
        # First all in one call, then in random groups of 37.
        for start in range(0, PROMPTS, 37 if shuffle else PROMPTS):
            chosen = order[start : start + (37 if shuffle else PROMPTS)]
            scores = rounded.score([texts[index] for index in chosen])
            same += sum(
                rounded.thresholds.decide(item.score) == decisions[index]
                for index, item in zip(chosen, scores, strict=True)
            )
        print(f"{same} of {PROMPTS} verdicts agree")
        assert same > 0.999 * PROMPTS
