"""Stage 2: the loss against naive loops, and gradients that do not depend on how a step is split."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch

from reft_ray.core.batch import TokenizedExample, collate, dummy_batch, numbered
from reft_ray.core.conversation import Example, Label, chat
from reft_ray.core.geometry import Readout
from reft_ray.core.guided import Distillation, cached_teacher, guided_step, live_teacher
from reft_ray.core.losses import held_out, kl_sum
from reft_ray.core.optimization import reduce_gradients
from reft_ray.core.refusal import refusal_score
from reft_ray.core.targets import SoftTargets
from reft_ray.core.teacher import Regulariser, class_sums, teacher_step
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.forward import ModelForward, decoder_layers
from reft_ray.hf.loading import load_base
from reft_ray.hf.lora import LoraSettings, attach

USER = ["here is how", "sure", "no no no", "bake bread", "help", "car"]
ALIGNMENT = ["sorry i cannot help with that", "no", "sorry"]


class Setup:
    """A student and a different teacher over rows of unequal length."""

    def __init__(self, folder: Path) -> None:
        base = load_base(str(folder))
        self.fmt = ChatFormat(base.tokenizer)
        self.model = attach(base.model, "student", LoraSettings(rank=4), seed=1)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, p in self.model.named_parameters():
                if "lora_B" in name:
                    p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
        self.student = ModelForward(self.model)
        self.teacher = ModelForward(load_base(str(folder)).model)
        self.user = self.rows(USER, Label.HARMLESS)
        self.alignment = self.rows(ALIGNMENT, Label.HARMFUL)

    def rows(self, answers: Sequence[str], label: Label) -> list[TokenizedExample]:
        return numbered(
            self.fmt.encode(Example(chat(f"tell me {'how ' * i}", a), label)) for i, a in enumerate(answers)
        )

    def batches(self, rows: Sequence[TokenizedExample], size: int) -> list:
        return [collate(rows[i : i + size], self.fmt.pad_id) for i in range(0, len(rows), size)]

    def gradient(self) -> torch.Tensor:
        found = torch.cat([p.grad.reshape(-1) for p in self.model.parameters() if p.grad is not None])
        self.model.zero_grad(set_to_none=True)
        return found


@pytest.fixture
def setup(llama: Path) -> Setup:
    return Setup(llama)


def test_the_loss_is_the_equation_of_the_method(setup: Setup) -> None:
    terms = guided_step(
        setup.student, setup.batches(setup.user, 6), setup.batches(setup.alignment, 3),
        Distillation(live_teacher(setup.teacher), 0.5, 2.0),
    )  # fmt: skip
    losses, tokens, correct = 0.0, 0, 0
    for row in setup.user:
        with torch.no_grad():
            logits = setup.model(input_ids=torch.tensor([row.ids])).logits[0]
        for t in range(1, len(row)):
            if row.loss_mask[t]:
                losses -= float(torch.log_softmax(logits[t - 1], -1)[row.ids[t]])
                tokens += 1
                correct += int(logits[t - 1].argmax()) == row.ids[t]
    found = floats(terms.shares)
    assert found["task"] == pytest.approx(losses / tokens, rel=1e-5)
    assert (terms.user_tokens, found["correct"]) == (tokens, correct)
    measured = held_out(setup.student, setup.batches(setup.user, 2))
    assert (measured.loss, measured.accuracy) == (pytest.approx(losses / tokens, rel=1e-5), correct / tokens)
    assert held_out(setup.student, []) is None
    divergence, aligned = 0.0, 0
    for row in setup.alignment:
        batch = collate([row], setup.fmt.pad_id)
        with torch.no_grad():
            divergence += float(kl_sum(setup.teacher.logits(batch), setup.student.logits(batch), 2.0))
        aligned += row.trained_tokens
    assert found["distill"] == pytest.approx(4.0 * divergence / aligned, rel=1e-4)
    assert found["loss"] == pytest.approx(found["task"] + 0.5 * found["distill"])


def test_the_gradient_does_not_depend_on_micro_batches(setup: Setup) -> None:
    gradients = []
    for size in (6, 2, 1):
        guided_step(
            setup.student, setup.batches(setup.user, size), setup.batches(setup.alignment, size),
            Distillation(live_teacher(setup.teacher)),
        )  # fmt: skip
        gradients.append(setup.gradient())
    assert float(gradients[0].norm()) > 1e-3
    for other in gradients[1:]:
        assert torch.allclose(gradients[0], other, atol=1e-6)


def test_the_gradient_does_not_depend_on_ranks_even_when_one_has_no_rows(setup: Setup) -> None:
    def step(
        user: Sequence[TokenizedExample], alignment: Sequence[TokenizedExample], counts: torch.Tensor
    ) -> torch.Tensor:
        guided_step(
            setup.student, setup.batches(user, 4), setup.batches(alignment, 4),
            Distillation(live_teacher(setup.teacher)), all_reduce=lambda _: counts,
        )  # fmt: skip
        reduce_gradients(setup.model.parameters(), lambda t: t * 1.0)
        return setup.gradient()

    counts = torch.tensor(
        [sum(r.trained_tokens for r in setup.user), sum(r.trained_tokens for r in setup.alignment)], dtype=torch.float64
    )
    whole = step(setup.user, setup.alignment, counts)
    ranks = [
        step(setup.user[:5], setup.alignment[:0], counts),
        step(setup.user[5:], setup.alignment[:1], counts),
        step([], setup.alignment[1:], counts),
    ]
    assert torch.allclose(whole, torch.stack(ranks).sum(0), atol=1e-6)


def test_the_teachers_gradient_does_not_depend_on_micro_batches_and_matches_the_equation(setup: Setup) -> None:
    rows = setup.user[:3] + setup.alignment + [r.prompt_only() for r in setup.rows(["x"] * 4, Label.HARMLESS)]
    gradients, terms = [], []
    for size in (10, 3, 1):
        batches = setup.batches(rows, size)
        refusal_D = class_sums(setup.student, batches, 2).refusal()
        terms.append(floats(teacher_step(setup.student, batches, 2, Regulariser(Readout(refusal_D)))[0].shares))
        gradients.append(setup.gradient())
    for other in gradients[1:]:
        assert torch.allclose(gradients[0], other, atol=1e-6)
    whole = collate(rows, setup.fmt.pad_id)
    with torch.no_grad():
        score = refusal_score(setup.student.features(whole, 2), class_sums(setup.student, [whole], 2).refusal())
    expected = float((1 - score[whole.harmful_B]).mean() + (1 + score[whole.harmless_B]).mean())
    assert terms[0]["separation"] == pytest.approx(expected, rel=1e-4)
    assert terms[0]["total"] == pytest.approx(terms[0]["refusal"] + terms[0]["helpful"] + 0.5 * terms[0]["separation"])
    assert terms[0]["refusal"] > 0
    assert terms[0]["helpful"] > 0


def test_a_dummy_batch_reads_no_soft_labels(setup: Setup) -> None:
    class NoRows:
        def rows(self, indices: Sequence[int]) -> SoftTargets:
            raise AssertionError("row 0 has soft labels, but this is not row 0")

    idle = dummy_batch(setup.fmt.pad_id)
    distillation = Distillation(cached_teacher(NoRows()))
    terms = guided_step(setup.student, setup.batches(setup.user, 4), [idle], distillation, all_reduce=one)
    alone = setup.gradient()
    guided_step(setup.student, setup.batches(setup.user, 4))
    assert terms.distill == 0
    assert torch.equal(alone, setup.gradient())


def test_a_rank_without_rows_adds_nothing_to_the_teachers_step(setup: Setup) -> None:
    rows = setup.user + setup.alignment
    refusal_D = class_sums(setup.student, setup.batches(rows, 4), 2).refusal()
    _, alone = teacher_step(setup.student, setup.batches(rows, 4), 2, Regulariser(Readout(refusal_D)))
    whole = setup.gradient()
    idle = dummy_batch(setup.fmt.pad_id)
    _, padded = teacher_step(setup.student, [*setup.batches(rows, 4), idle], 2, Regulariser(Readout(refusal_D)))
    assert torch.allclose(whole, setup.gradient(), atol=1e-7)
    assert torch.equal(alone.refusal(), padded.refusal())
    terms, none = teacher_step(setup.student, [idle], 2, Regulariser(Readout(refusal_D)))
    assert terms.total == 0
    assert not setup.gradient().any()
    assert torch.equal(alone.refusal(), (padded + none).refusal())


def test_a_rank_without_answers_runs_all_layers_along_and_adds_nothing(setup: Setup) -> None:
    rows = [row.prompt_only() for row in setup.user + setup.alignment]
    prompts, idle = setup.batches(rows, 4), dummy_batch(setup.fmt.pad_id)
    regulariser = Regulariser(Readout(class_sums(setup.student, prompts, 1).refusal()))
    expected, _ = teacher_step(setup.student, prompts, 1, regulariser)
    whole = setup.gradient()
    ran: list[int] = []
    hooks = [
        layer.register_forward_hook(lambda *_args, index=index: ran.append(index))
        for index, layer in enumerate(decoder_layers(setup.model), start=1)
    ]
    terms, _ = teacher_step(setup.student, [*prompts, idle], 1, regulariser, prompts=len(prompts))
    learned = [parameter.grad is not None for parameter in setup.model.parameters() if parameter.requires_grad]
    for hook in hooks:
        hook.remove()
    assert ran == [1] * len(prompts) + [1, 2]
    assert all(learned), "the other ranks wait for the gradient of every layer"
    assert floats(terms.shares) == floats(expected.shares)
    lower, upper = setup.gradient().split(len(whole))
    assert torch.allclose(whole, lower, atol=1e-7)
    assert not upper.any()


def floats(shares: Mapping[str, torch.Tensor]) -> dict[str, float]:
    return {name: float(share) for name, share in shares.items()}


def one(counts: torch.Tensor) -> torch.Tensor:
    """As if another rank had an alignment token."""
    return counts + torch.tensor([0.0, 1.0]) if len(counts) == 2 else counts
