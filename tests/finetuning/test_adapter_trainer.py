"""Loops on one base: gradients against the reference, guidance, state, samples."""

import math

import numpy as np
import pytest
import torch

from reft_ray.core.batch import collate
from reft_ray.core.completion import Sampling
from reft_ray.core.conversation import Example, chat
from reft_ray.core.errors import ReftError
from reft_ray.core.guided import Distillation, guided_step, hard_labels
from reft_ray.finetuning.adapter_passes import Rows
from reft_ray.finetuning.adapter_trainer import AdapterTrainer, Guidance, StepParameters, Stops, lora_settings
from reft_ray.finetuning.encoding import alignment_rows
from reft_ray.hf.adapter_bank import AdapterBank
from reft_ray.hf.loading import load_base

LORA = lora_settings({"rank": 4})


@pytest.fixture
def bank(llama):
    return AdapterBank(load_base(str(llama)))


@pytest.fixture
def trainer(bank):
    return AdapterTrainer(bank, 512)


def rows_of(bank, *texts, weight=1.0):
    encoded = [bank.chat.encode(Example(chat(*text))) for text in texts]
    tokens = [np.array(row.ids[:-1]) for row in encoded]
    targets = [np.array(row.ids[1:]) for row in encoded]
    weights = [np.array(row.loss_mask[1:], np.float32) * weight for row in encoded]
    return Rows(tokens, targets, {"weights": weights}, [np.ones(len(t)) for t in tokens]), encoded


ROWS = (("how to bake bread", "here is how"), ("tell me", "sure"))


def gradients(bank, name):
    return {key: p.grad.clone() for key, p in bank.parameters(name).items() if p.grad is not None}


def test_the_gradient_of_weight_one_is_that_of_the_guided_step(bank, trainer):
    trainer.create("one", LORA, 3)
    rows, encoded = rows_of(bank, *ROWS)
    outputs, metrics = trainer.forward("one", rows, "cross_entropy", {}, backward=True)
    ours = gradients(bank, "one")
    learned = sum(row.trained_tokens for row in encoded)
    assert trainer.loop("one").mass == pytest.approx(learned)
    trainer._clear("one")
    with bank.training("one"):
        terms = guided_step(bank.forward, [collate(encoded, bank.chat.pad_id)])
    reference = gradients(bank, "one")
    assert metrics["loss:sum"] == pytest.approx(float(terms.task) * learned, rel=1e-5)
    assert ours.keys() == reference.keys()
    for key, gradient in ours.items():
        assert torch.allclose(gradient, reference[key] * learned, atol=1e-5)
    assert [len(output["logprobs"]) for output in outputs] == [len(tokens) for tokens in rows.tokens]


def test_guided_and_plain_differ_by_the_alignment_term_alone(bank):
    aligned, _ = alignment_rows(bank.chat, [Example(chat("steal a car", "sorry i cannot"))], 200)
    trainer = AdapterTrainer(bank, 512, Guidance(aligned, Distillation(hard_labels, alpha=2.0)))
    trainer.create("one", LORA, 3)
    rows, encoded = rows_of(bank, *ROWS, weight=3.0)
    trainer.forward("one", rows, "cross_entropy", {}, backward=True)
    trainer._guide("one", trainer.loop("one"))
    ours = gradients(bank, "one")
    trainer._clear("one")
    with bank.training("one"):
        guided_step(bank.forward, [collate(encoded, 0)], [collate(aligned, 0)], Distillation(hard_labels, alpha=2.0))
    reference = gradients(bank, "one")
    # Three times the weight is three times the step, guidance included.
    learned = 3.0 * sum(row.trained_tokens for row in encoded)
    for key, gradient in ours.items():
        assert torch.allclose(gradient, reference[key] * learned, atol=1e-4, rtol=1e-4)


def test_guidance_costs_its_share_of_tokens(bank):
    aligned, _ = alignment_rows(bank.chat, [Example(chat("steal a car", "sorry i cannot"))], 200)
    trainer = AdapterTrainer(bank, 512, Guidance(aligned, Distillation(hard_labels), ratio=0.25))
    trainer.create("one", LORA, 3)
    rows, _ = rows_of(bank, *ROWS * 8)
    spent = 0.0
    for _ in range(6):
        trainer.forward("one", rows, "cross_entropy", {}, backward=True)
        spent += trainer.step("one", StepParameters())["guidance_tokens"]
    assert spent <= 0.25 * 6 * sum(map(len, rows.tokens)) + len(aligned[0])


def test_adapters_do_not_touch_each_other(bank, trainer):
    trainer.create("one", LORA, 3)
    trainer.create("two", LORA, 3)
    rows, _ = rows_of(bank, *ROWS)
    before = bank.state("two")
    trainer.forward("one", rows, "cross_entropy", {}, backward=True)
    trainer.step("one", StepParameters(learning_rate=0.01))
    trainer.forward("two", rows, "cross_entropy", {}, backward=False)
    assert all(torch.equal(value, before[key]) for key, value in bank.state("two").items())
    assert not all(torch.equal(value, before[key]) for key, value in bank.state("one").items())
    assert not gradients(bank, "two")


def test_a_saved_loop_continues_exactly(bank, trainer, tmp_path):
    rows, _ = rows_of(bank, *ROWS)

    def one(name):
        trainer.forward(name, rows, "cross_entropy", {}, backward=True)
        trainer.step(name, StepParameters(learning_rate=0.01, weight_decay=0.1, grad_clip_norm=1.0))

    trainer.create("one", LORA, 3)
    one("one")
    trainer.save("one", tmp_path, "base")
    trainer.restore("two", LORA, tmp_path)
    for name in ("one", "one", "two", "two"):
        one(name)
    assert trainer.loop("two").steps == 3
    assert all(torch.equal(value, bank.state("two")[key]) for key, value in bank.state("one").items())


def test_steps_are_torchs_adamw(bank, trainer):
    trainer.create("one", LORA, 3)
    rows, _ = rows_of(bank, *ROWS)
    mine = {key: p.detach().clone().requires_grad_() for key, p in bank.parameters("one").items()}
    reference = torch.optim.AdamW(mine.values(), lr=0.02, betas=(0.8, 0.9), eps=1e-8, weight_decay=0.1)
    for _ in range(2):
        trainer.forward("one", rows, "cross_entropy", {}, backward=True)
        for key, gradient in gradients(bank, "one").items():
            mine[key].grad = gradient
        reference.step()
        trainer.step("one", StepParameters(0.02, 0.8, 0.9, 1e-8, 0.1))
    assert all(torch.allclose(p, mine[key]) for key, p in bank.parameters("one").items())


def test_a_withheld_row_has_no_gradient(bank, trainer):
    trainer.create("one", LORA, 3)
    both, _ = rows_of(bank, *ROWS)
    withheld = Rows(both.tokens, both.targets, both.inputs, [both.kept[0], np.zeros(len(both.tokens[1]))])
    trainer.forward("one", withheld, "cross_entropy", {}, backward=True)
    ours = gradients(bank, "one")
    trainer._clear("one")
    alone, _ = rows_of(bank, ROWS[0])
    trainer.forward("one", alone, "cross_entropy", {}, backward=True)
    for key, gradient in gradients(bank, "one").items():
        assert torch.allclose(gradient, ours[key], atol=1e-6)


def test_a_loss_that_is_not_finite_leaves_what_was_there(bank, trainer):
    trainer.create("one", LORA, 3)
    rows, _ = rows_of(bank, *ROWS)
    trainer.forward("one", rows, "cross_entropy", {}, backward=True)
    before = gradients(bank, "one")
    inputs = {
        "logprobs": [np.full(len(t), -1e4, np.float32) for t in rows.tokens],
        "advantages": [np.ones(len(t), np.float32) for t in rows.tokens],
    }
    with pytest.raises(ReftError, match="nothing of this request"):
        trainer.forward("one", Rows(rows.tokens, rows.targets, inputs, rows.kept), "importance_sampling", {}, True)
    assert all(torch.equal(gradient, before[key]) for key, gradient in gradients(bank, "one").items())


def test_samples_have_the_log_probabilities_of_a_forward_pass(bank, trainer):
    trainer.create("one", LORA, 3)
    prompt = bank.chat.prompt(chat("tell me"))
    sampling = Sampling(8, temperature=1.0, seed=5)
    first, second = trainer.sample("one", prompt, 2, sampling, Stops())
    assert trainer.sample("one", prompt, 2, sampling, Stops())[0].tokens == first.tokens
    assert first.tokens != second.tokens
    whole = [*prompt, *first.tokens]
    scored = trainer.prompt_logprobs("one", whole)
    assert math.isnan(scored[0])
    assert scored[len(prompt) :] == pytest.approx(first.logprobs, abs=1e-4)


def test_stops_end_a_completion_and_are_part_of_it(bank, trainer):
    prompt = bank.chat.prompt(chat("tell me"))
    plain = trainer.sample(None, prompt, 1, Sampling(6, temperature=0.0), Stops())[0]
    assert not plain.stopped
    assert len(plain.tokens) == 6
    ended = trainer.sample(None, prompt, 1, Sampling(6, temperature=0.0), Stops(frozenset({plain.tokens[0]})))[0]
    assert ended.stopped
    assert ended.tokens == plain.tokens[:1]


@pytest.mark.parametrize(
    ("lora", "some", "others"),
    [
        ({"train_attn": False, "train_unembed": False}, "mlp", ("self_attn", "lm_head")),
        ({"train_mlp": False, "train_unembed": False}, "self_attn", ("mlp", "lm_head")),
        ({"train_mlp": False, "train_attn": False}, "lm_head", ("mlp", "self_attn")),
        ({}, "lm_head", ()),
    ],
)
def test_the_layers_that_were_asked_for_are_trained(bank, trainer, lora, some, others):
    trainer.create("one", lora_settings({"rank": 2, **lora}), 0)
    trainer.create("two", lora_settings({"rank": 2, **lora}), 0)
    names = list(bank.parameters("two"))
    assert any(some in name for name in names)
    assert not any(other in name for name in names for other in others)
    rows, _ = rows_of(bank, *ROWS)
    trainer.forward("two", rows, "cross_entropy", {}, backward=True)
    assert gradients(bank, "two")


@pytest.mark.parametrize("wrong", [{"learning_rate": -1.0}, {"beta1": 1.0}, {"eps": math.nan}])
def test_a_step_with_impossible_parameters_is_refused(wrong):
    with pytest.raises(ReftError, match="adam_params"):
        StepParameters(**wrong)
