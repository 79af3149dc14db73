"""Each defence's step against its equation written out on a toy model."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from reft_ray.baselines.booster import Booster
from reft_ray.baselines.ldifs import Ldifs
from reft_ray.baselines.lisa import Lisa
from reft_ray.baselines.step import GuidedStep, Step
from reft_ray.baselines.vaccine import Vaccine, perturbation
from reft_ray.core.batch import Batch, TokenizedExample, collate
from reft_ray.core.forward import Predictions
from reft_ray.core.guided import guided_step

VOCABULARY, WIDTH = 11, 5


class Toy(nn.Module):
    """Embedding, two residual blocks, head; a `core.forward.Forward` without features."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)

    def logits(self, batch: Batch) -> Tensor:
        return self.head(self.body(self.embed(batch.ids_BT)))[batch.loss_mask_BT]

    def predictions(self, batch: Batch) -> Predictions:
        return Predictions.of(self.logits(batch))

    def body(self, hidden: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = torch.tanh(hidden) + block(hidden)
        return hidden

    def cross_entropy(self, batch: Batch) -> Tensor:
        """The mean over trained tokens, written out."""
        logits_NV = self.logits(batch)
        return -torch.log_softmax(logits_NV, -1)[torch.arange(len(batch.labels_N)), batch.labels_N].mean()

    def gradients(self) -> list[Tensor]:
        found = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters()]
        self.zero_grad(set_to_none=True)
        return found


class Checkpointed(Toy):
    """Its blocks run again for their gradient."""

    def body(self, hidden: Tensor) -> Tensor:
        return checkpoint(super().body, hidden, use_reentrant=False)


def rows(seed: int, lengths: tuple[int, ...] = (4, 6, 3)) -> list[TokenizedExample]:
    generator = torch.Generator().manual_seed(seed)
    return [
        TokenizedExample(
            torch.randint(1, VOCABULARY, (n,), generator=generator).tolist(), [False] + [True] * (n - 1), 0
        )
        for n in lengths
    ]


def one_batch(seed: int) -> Batch:
    return collate(rows(seed), 0)


def split(seed: int) -> list[Batch]:
    return [collate([row], 0) for row in rows(seed)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def autograd(loss: Tensor, model: Toy) -> list[Tensor]:
    return [g.detach() for g in torch.autograd.grad(loss, list(model.parameters()))]


def lisa(model: Toy, rho: float = 0.7, pull_after: int = 0) -> Lisa:
    return Lisa(GuidedStep(model), dict(model.named_parameters()), 2, 3, rho, pull_after)


def test_lisa_alternates_and_draws_each_state_to_the_end_of_the_other() -> None:
    model, naive = Toy(), Toy()
    step = lisa(model, pull_after=1)
    ends = {True: [p.detach().clone() for p in naive.parameters()]}
    ends[False] = ends[True]
    states = []
    for number in range(12):
        aligning = number % 5 < 2
        states.append("A" if aligning else "U")
        assert step.streams.user is not aligning
        assert step.streams.alignment is aligning
        terms = step([one_batch(number)], [one_batch(100 + number)])
        loss = naive.cross_entropy(one_batch(100 + number if aligning else number))
        if number > 1:
            anchor = ends[not aligning]
            loss = loss + 0.7 / 2 * sum((p - a).square().sum() for p, a in zip(naive.parameters(), anchor, strict=True))
        assert float(terms.total) == pytest.approx(float(loss.detach()), rel=1e-5)
        expected = autograd(loss, naive)
        assert_same(model.gradients(), expected)
        with torch.no_grad():
            for mine, theirs, gradient in zip(model.parameters(), naive.parameters(), expected, strict=True):
                mine -= 0.1 * gradient
                theirs -= 0.1 * gradient
        ends[aligning] = [p.detach().clone() for p in naive.parameters()]
    assert "".join(states) == "AAUUUAAUUUAA"


def test_lisa_resumes_from_its_state() -> None:
    model, again = Toy(), Toy(seed=9)
    step = lisa(model)
    for number in range(4):
        step([one_batch(number)], [one_batch(number)])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
        model.zero_grad(set_to_none=True)
    resumed = lisa(again)
    again.load_state_dict(model.state_dict())
    resumed.restore({name: tensor.clone() for name, tensor in step.state().items()})
    for number in range(4, 8):
        assert step([one_batch(number)], [one_batch(number)]) == resumed([one_batch(number)], [one_batch(number)])
        assert_same(model.gradients(), again.gradients())


def test_lisas_pull_does_not_grow_with_the_number_of_ranks() -> None:
    model = Toy()
    step = lisa(model)
    step([], [one_batch(0)])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1.0
    model.zero_grad()
    step.all_reduce = lambda tensor: tensor * 4
    step([], [])
    assert all(float(g.mean()) == pytest.approx(0.7 / 4) for g in model.gradients())


@pytest.mark.parametrize("model_type", [Toy, Checkpointed])
@pytest.mark.parametrize("frozen", [0, 3], ids=["all trained", "from the second block on"])
def test_vaccine_is_the_gradient_at_the_perturbed_embeddings(model_type: type[Toy], frozen: int) -> None:
    """Those of blocks below all trained weights are perturbed too."""
    model, batch = model_type(), one_batch(1)
    trained = list(model.parameters())[frozen:]

    def perturbed(shifts: list[Tensor]) -> Tensor:
        hidden = model.embed(batch.ids_BT)
        for block, shift in zip(model.blocks, shifts, strict=True):
            hidden = torch.tanh(hidden) + (block(hidden) + shift)
        logits_NV = model.head(hidden)[batch.loss_mask_BT]
        return -torch.log_softmax(logits_NV, -1)[torch.arange(len(batch.labels_N)), batch.labels_N].mean()

    shape = (*batch.ids_BT.shape, WIDTH)
    zeros = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for _ in model.blocks]
    slopes = torch.autograd.grad(perturbed(zeros), zeros)
    norm = sum(slope.square().sum() for slope in slopes).sqrt()
    worst = perturbed([2.0 * slope / norm for slope in slopes])
    expected = list(torch.autograd.grad(worst, trained))
    for parameter in list(model.parameters())[:frozen]:
        parameter.requires_grad_(False)
    terms = Vaccine(model, list(model.blocks), 2.0)([batch], [])
    assert float(terms.task) == pytest.approx(float(worst.detach()), rel=1e-5)
    assert float(terms.task) > float(model.cross_entropy(batch).detach())
    assert_same(model.gradients()[frozen:], expected)


def test_vaccine_is_the_same_where_blocks_run_again_for_their_gradient() -> None:
    gradients = []
    for model in (Toy(), Checkpointed()):
        Vaccine(model, list(model.blocks), 2.0)(split(1), [])
        gradients.append(model.gradients())
    assert_same(*gradients)


def test_vaccine_without_perturbation_is_finetuning() -> None:
    model = Toy()
    Vaccine(model, list(model.blocks), 0.0)(split(1), [])
    found = model.gradients()
    guided_step(model, split(1))
    assert_same(found, model.gradients())


def test_a_perturbation_has_the_requested_norm() -> None:
    moved = perturbation([torch.randn(3, 4), torch.randn(2)], 2.0)
    assert float(sum(part.square().sum() for part in moved)) == pytest.approx(4.0, rel=1e-4)


def test_booster_is_its_equation_and_leaves_the_weights_alone() -> None:
    model = Toy()
    before = [p.detach().clone() for p in model.parameters()]
    user, harmful = one_batch(1), one_batch(2)
    f, h = model.cross_entropy(user), model.cross_entropy(harmful)
    slope = autograd(h, model)
    norm = sum(part.square().sum() for part in slope).sqrt()
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for parameter, part in zip(moved.parameters(), slope, strict=True):
            parameter -= 0.1 * part / norm
    h_after = moved.cross_entropy(harmful)
    slope_after = autograd(h_after, moved)
    expected = [a + 5.0 * (b - c) for a, b, c in zip(autograd(f, model), slope, slope_after, strict=True)]
    terms = Booster(model, list(model.parameters()), 5.0, 0.1)([user], [harmful])
    assert float(terms.total) == pytest.approx(float((f + 5.0 * (h - h_after)).detach()), rel=1e-4)
    assert float(h_after.detach()) < float(h.detach())
    assert_same(model.gradients(), expected)
    for now, then in zip(model.parameters(), before, strict=True):
        assert torch.equal(now, then)


def test_ldifs_keeps_features_near_those_of_the_start() -> None:
    model = Toy()
    start = copy.deepcopy(model)
    step = Ldifs(model, list(model.blocks), dict(model.named_parameters()), 0.3)
    batch = one_batch(1)
    step([batch], [])
    at_start = model.gradients()
    guided_step(model, [batch])
    assert_same(at_start, model.gradients())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.ones_like(parameter)

    def features(of: Toy) -> list[Tensor]:
        hidden, found = of.embed(batch.ids_BT), []
        for block in of.blocks:
            found.append(block(hidden)[batch.loss_mask_BT])
            hidden = torch.tanh(hidden) + block(hidden)
        return found

    gap = sum(
        (now - then.detach()).square().sum() for now, then in zip(features(model), features(start), strict=True)
    ) / len(batch.labels_N)
    loss = model.cross_entropy(batch) + 0.3 * gap
    terms = step([batch], [])
    assert float(terms.total) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert_same(model.gradients(), autograd(loss, model))
    resumed = Ldifs(model, list(model.blocks), dict(model.named_parameters()), 0.3)
    assert resumed([batch], []).distill == 0.0
    resumed.restore(step.state())
    assert float(resumed([batch], []).distill) == pytest.approx(float(gap.detach()), rel=1e-5)


def test_ldifs_measures_no_distance_from_dropout() -> None:
    model = Toy()
    for at, block in enumerate(model.blocks):
        model.blocks[at] = nn.Sequential(nn.Dropout(0.5), block)
    step = Ldifs(model, list(model.blocks), dict(model.named_parameters()), 0.3)
    batch = one_batch(1)
    torch.manual_seed(7)
    assert step([batch], []).distill == 0.0
    found = model.gradients()
    # The masks of the trained pass are those of a run without the second one.
    torch.manual_seed(7)
    guided_step(model, [batch])
    assert_same(found, model.gradients())


@pytest.mark.parametrize(
    "make",
    [
        lambda model: lisa(model),
        lambda model: Booster(model, list(model.parameters()), 5.0, 0.1),
        lambda model: Ldifs(model, list(model.blocks), dict(Toy(3).named_parameters()), 0.3),
    ],
    ids=["lisa", "booster", "ldifs"],
)
def test_gradients_do_not_depend_on_how_a_step_is_split(make: Callable[[Toy], Step]) -> None:
    found = []
    batches: Callable[[int], list[Batch]]
    for batches in (lambda seed: [one_batch(seed)], split):
        model = Toy()
        make(model)(batches(1), batches(2))
        found.append(model.gradients())
    assert_same(*found)
