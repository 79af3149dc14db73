"""The share of its adapter that a teacher answers with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel

from reft_ray.core.conversation import Conversation, Example, Label, chat
from reft_ray.finetuning import teacher_answers
from reft_ray.finetuning.teacher_answers import best_share
from reft_ray.hf.loading import load_base
from reft_ray.hf.lora import LoraSettings, attach, scale_adapter

ROWS = [
    *(Example(chat(f"steal {n}"), Label.HARMFUL) for n in range(3)),
    *(Example(chat(f"bake {n}"), Label.HARMLESS) for n in range(3)),
]


class Shy:
    """Refuses everything at a scale above 1.9, what is harmful above 1.7, and nothing below."""

    def __init__(self, model: PeftModel, _chat: object, _tokens: int) -> None:
        self.model = model

    def __call__(self, prompts: Sequence[Conversation]) -> list[str]:
        scale = next(m.scaling["teacher"] for m in self.model.modules() if hasattr(m, "lora_B"))
        limit = {True: 1.7, False: 1.9}
        texts = [prompt[-1].content for prompt in prompts]
        return ["I can't help with that." if scale > limit["steal" in text] else "Sure: flour." for text in texts]


@pytest.fixture
def model(llama: Path) -> PeftModel:
    return attach(load_base(str(llama)).model, "teacher", LoraSettings(rank=2, scale=2.0))


def test_the_share_with_the_fewest_wrong_answers_is_chosen(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_answers, "Responder", Shy)
    trainable: Any = SimpleNamespace(model=model, chat=None)
    assert best_share(trainable, ROWS, (1.0, 0.9, 0.5)) == 0.9
    # Of shares that are equally wrong the largest.
    assert best_share(trainable, ROWS, (0.5, 0.6)) == 0.6


def test_scaling_multiplies_what_the_adapter_adds(model: PeftModel) -> None:
    layer = next(module for module in model.modules() if hasattr(module, "lora_B"))
    torch.nn.init.ones_(layer.lora_B["teacher"].weight)
    before = {name: part.clone() for name, part in model.named_parameters()}
    scale_adapter(model, 0.5)
    for name, part in model.named_parameters():
        assert torch.equal(part, before[name] * (0.5 if ".lora_B.teacher." in name else 1))
