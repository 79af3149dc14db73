"""Rows of several adapters in one batch have the gradients, outputs and metrics of passes of each adapter alone."""

import math

import numpy as np
import pytest
import torch

from reft_ray.core import losses
from reft_ray.core.conversation import Example, chat
from reft_ray.core.errors import ReftError
from reft_ray.finetuning.adapter_passes import Rows, Work
from reft_ray.finetuning.adapter_trainer import AdapterTrainer, StepParameters, lora_settings
from reft_ray.hf.adapter_bank import AdapterBank
from reft_ray.hf.forward import decoder_layers
from reft_ray.hf.loading import load_base

TEXTS = {
    "one": (("how to bake bread", "here is how"), ("tell me", "sure")),
    "two": (("how to bake a car", "sure here is that bread"),),
    "three": (("help me please", "i can help"), ("how to bake", "here"), ("tell me how to bake that", "sure here is")),
}
LORAS = {
    "one": {"rank": 4},
    "two": {"rank": 8, "train_unembed": False},
    "three": {"rank": 2, "train_attn": False},
}


@pytest.fixture
def bank(llama):
    return AdapterBank(load_base(str(llama)))


@pytest.fixture
def make(bank):
    """A trainer with these adapters, whose low-rank products are not zero."""

    def make(batch_tokens=512, names=TEXTS):
        trainer = AdapterTrainer(bank, batch_tokens)
        for seed, name in enumerate(names):
            trainer.create(name, lora_settings(LORAS[name]), seed)
            generator = torch.Generator().manual_seed(seed)
            for key, parameter in bank.parameters(name).items():
                if ".lora_B." in key:
                    parameter.data.normal_(0, 0.1, generator=generator)
        return trainer

    return make


def work_of(bank, name, loss="cross_entropy", weight=1.0):
    encoded = [bank.chat.encode(Example(chat(*text))) for text in TEXTS[name]]
    tokens = [np.array(row.ids[:-1]) for row in encoded]
    marks = [np.array(row.loss_mask[1:], np.float32) * weight for row in encoded]
    inputs = {"weights": marks}
    if loss != "cross_entropy":
        inputs = {"advantages": marks, "logprobs": [np.full(len(t), -1.0, np.float32) for t in tokens]}
    kept = [np.ones(len(t)) for t in tokens]
    return Work(name, Rows(tokens, [np.array(row.ids[1:]) for row in encoded], inputs, kept), loss, {})


def gradients(bank, name):
    return {key: p.grad.clone() for key, p in bank.parameters(name).items() if p.grad is not None}


def alone(bank, trainer, works):
    """Results and gradients of each work by itself."""
    found = {}
    for work in works:
        result = trainer.forward(work.adapter, work.rows, work.loss, work.config, backward=True)
        found[work.adapter] = (result, gradients(bank, work.adapter), trainer.loop(work.adapter).mass)
        trainer._clear(work.adapter)
        trainer.loop(work.adapter).mass = 0.0
    return found


@pytest.mark.parametrize("batch_tokens", [512, 16])
@pytest.mark.parametrize("parts", [False, True], ids=["whole", "in parts"])
def test_gradients_of_a_batch_are_those_of_each_adapter_alone(bank, make, monkeypatch, batch_tokens, parts):
    if parts:
        monkeypatch.setitem(losses._PART_LOGITS, "cpu", 1000)
    trainer = make(batch_tokens)
    works = [work_of(bank, "one"), work_of(bank, "two", "ppo", 0.5)]
    works.append(work_of(bank, "three", "importance_sampling", -0.5))
    reference = alone(bank, trainer, works)
    together = trainer.forward_together(works, backward=True)
    for work, (outputs, metrics) in zip(works, together, strict=True):
        (expected, sums), expected_gradients, mass = reference[work.adapter]
        found = gradients(bank, work.adapter)
        assert found.keys() == expected_gradients.keys() == bank.parameters(work.adapter).keys()
        for key, gradient in found.items():
            assert torch.allclose(gradient, expected_gradients[key], atol=1e-5, rtol=1e-4), key
            assert gradient.abs().max() > 0
        assert metrics["loss:sum"] == pytest.approx(sums["loss:sum"], rel=1e-4)
        assert trainer.loop(work.adapter).mass == pytest.approx(mass, rel=1e-4)
        for ours, theirs in zip(outputs, expected, strict=True):
            assert ours["logprobs"] == pytest.approx(theirs["logprobs"], abs=1e-4)


def test_the_same_adapters_take_the_same_steps(bank, make):
    trainer = make(names=("one", "two"))
    works = [work_of(bank, "one"), work_of(bank, "two")]
    start = {name: bank.state(name) for name in ("one", "two")}
    for _ in range(3):
        trainer.forward_together(works, backward=True)
        for name in start:
            trainer.step(name, StepParameters(learning_rate=0.01))
    together = {name: bank.state(name) for name in start}
    for name, state in start.items():
        bank.load(name, state)
        trainer.loop(name).optimizer = trainer._optimizer(name)
        for _ in range(3):
            work = work_of(bank, name)
            trainer.forward(name, work.rows, work.loss, {}, backward=True)
            trainer.step(name, StepParameters(learning_rate=0.01))
        for key, value in bank.state(name).items():
            # AdamW divides by the gradient's size: where that is nothing but rounding the step is not.
            assert torch.allclose(value, together[name][key], atol=2e-3), key


def test_an_infinite_loss_of_one_adapter_has_no_effect_on_another(bank, make):
    trainer = make()
    reference = alone(bank, trainer, [work_of(bank, "two")])
    hostile = work_of(bank, "one", "importance_sampling")
    hostile.rows.inputs["logprobs"][0][:] = -1e4
    first = work_of(bank, "one")
    trainer.forward("one", first.rows, first.loss, {}, backward=True)
    waiting = gradients(bank, "one")
    refused, kept = trainer.forward_together([hostile, work_of(bank, "two")], backward=True)
    assert isinstance(refused, ReftError)
    assert math.isfinite(kept[1]["loss:sum"])
    for key, gradient in gradients(bank, "two").items():
        assert torch.allclose(gradient, reference["two"][1][key], atol=1e-5, rtol=1e-4)
    assert all(torch.equal(gradient, waiting[key]) for key, gradient in gradients(bank, "one").items())


def test_a_pass_that_fails_leaves_all_gradients_as_they_were(bank, make, monkeypatch):
    trainer = make()
    work = work_of(bank, "one")
    trainer.forward("one", work.rows, work.loss, {}, backward=True)
    before = gradients(bank, "one")

    def fails(*_args):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(bank, "part", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.forward_together([work, work_of(bank, "two")], backward=True)
    assert all(torch.equal(gradient, before[key]) for key, gradient in gradients(bank, "one").items())
    assert not gradients(bank, "two")
    assert trainer.loop("two").tokens == 0


def test_a_pass_that_fails_inside_the_model_leaves_it_usable(bank, make):
    trainer = make()
    works = [work_of(bank, "one"), work_of(bank, "two")]
    reference = alone(bank, trainer, works)

    def fails(*_args):
        raise RuntimeError("out of memory")

    handle = decoder_layers(bank.model)[-1].register_forward_pre_hook(fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.forward_together(works, backward=True)
    handle.remove()
    for work in works:
        trainer.forward(work.adapter, work.rows, work.loss, {}, backward=True)
        assert all(
            torch.equal(gradient, reference[work.adapter][1][key])
            for key, gradient in gradients(bank, work.adapter).items()
        )


def test_a_model_that_cannot_mix_says_why(bank, monkeypatch, caplog):
    def refuse(*_):
        raise ValueError("no adapter_names here\nat all")

    monkeypatch.setattr(bank, "predictions", refuse)
    bank.__dict__.pop("mixes", None)
    assert not bank.mixes
    assert caplog.messages == ["models are trained one by one, not in one pass (ValueError: no adapter_names here)"]
    bank.__dict__.pop("mixes")


def test_adapters_outside_of_a_batch_have_no_gradient(bank, make):
    trainer = make()
    assert bank.mixes
    trainer.forward_together([work_of(bank, "one"), work_of(bank, "two")], backward=True)
    assert not gradients(bank, "three")
    assert not any(p.requires_grad for p in bank.model.parameters())
    assert bank.model.active_adapter == "resident"
