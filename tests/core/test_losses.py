import math

import pytest
import torch

from reft_ray.core import losses
from reft_ray.core.losses import cross_entropy_sum, kl_sum, topk_kl_sum
from reft_ray.core.targets import soften

torch.manual_seed(0)
N, V, D = 7, 13, 5


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(N, V, generator=torch.Generator().manual_seed(1)) * 3


@pytest.fixture
def teacher() -> torch.Tensor:
    return torch.randn(N, V, generator=torch.Generator().manual_seed(2)) * 3


def probabilities(row: torch.Tensor, temperature: float) -> list[float]:
    weights = [math.exp(float(x) / temperature) for x in row]
    return [w / sum(weights) for w in weights]


def test_cross_entropy_is_the_naive_sum(logits: torch.Tensor) -> None:
    targets = torch.arange(N)
    naive = -sum(math.log(probabilities(row, 1.0)[int(t)]) for row, t in zip(logits, targets, strict=True))
    assert float(cross_entropy_sum(logits, targets)) == pytest.approx(naive, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_is_the_naive_sum(logits: torch.Tensor, teacher: torch.Tensor, temperature: float) -> None:
    naive = 0.0
    for p_row, q_row in zip(teacher, logits, strict=True):
        p, q = probabilities(p_row, temperature), probabilities(q_row, temperature)
        naive += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert float(kl_sum(teacher, logits, temperature)) == pytest.approx(naive, rel=1e-5)


def test_topk_with_the_whole_vocabulary_is_the_full_divergence(logits: torch.Tensor, teacher: torch.Tensor) -> None:
    full = float(kl_sum(teacher, logits, 2.0))
    assert float(topk_kl_sum(soften(teacher, V, 2.0), logits, 2.0)) == pytest.approx(full, rel=1e-5)


def test_topk_merges_the_tail_into_one_outcome(logits: torch.Tensor, teacher: torch.Tensor) -> None:
    k = 4
    naive = 0.0
    for p_row, q_row in zip(teacher, logits, strict=True):
        p, q = probabilities(p_row, 1.0), probabilities(q_row, 1.0)
        top = sorted(range(V), key=lambda i: -p[i])[:k]
        naive += sum(p[i] * math.log(p[i] / q[i]) for i in top)
        p_tail, q_tail = 1 - sum(p[i] for i in top), 1 - sum(q[i] for i in top)
        naive += p_tail * math.log(p_tail / q_tail)
    merged = float(topk_kl_sum(soften(teacher, k), logits))
    assert merged == pytest.approx(naive, rel=1e-4)
    assert merged <= float(kl_sum(teacher, logits)) + 1e-5


def test_topk_of_the_teacher_itself_is_zero_with_a_zero_gradient(teacher: torch.Tensor) -> None:
    student = teacher.clone().requires_grad_()
    loss = topk_kl_sum(soften(teacher, 4), student)
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-5)
    assert student.grad is not None
    assert float(student.grad.abs().max()) < 1e-5


def test_topk_stays_finite_where_the_student_leaves_no_tail(teacher: torch.Tensor) -> None:
    peaked = torch.full((N, V), -1e4)
    peaked[torch.arange(N), teacher.argmax(-1)] = 1e4
    student = peaked.requires_grad_()
    loss = topk_kl_sum(soften(teacher, 4), student)
    loss.backward()
    assert bool(torch.isfinite(loss))
    assert student.grad is not None
    assert bool(torch.isfinite(student.grad).all())


@pytest.mark.parametrize("part", [3 * V, 1])
def test_a_loss_in_parts_is_the_plain_loss(
    logits: torch.Tensor, teacher: torch.Tensor, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    """One position at a time at least; value and gradient, also of a scaled loss."""
    soft, labels = soften(teacher, 4, 2.0), torch.arange(N)
    losses_of = {
        "cross entropy": lambda student: cross_entropy_sum(student, labels),
        "live teacher": lambda student: kl_sum(teacher, student, 2.0),
        "stored labels": lambda student: topk_kl_sum(soft, student, 2.0),
    }

    def value_and_gradient(name: str) -> tuple[torch.Tensor, torch.Tensor]:
        student = (logits + 0.5).requires_grad_()
        value = losses_of[name](student)
        (value / 7).backward()
        return value.detach(), student.grad

    plain = {name: value_and_gradient(name) for name in losses_of}
    monkeypatch.setattr(losses, "_PART_LOGITS", {"cpu": part})
    for name, (value, gradient) in plain.items():
        found, in_parts = value_and_gradient(name)
        torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(in_parts, gradient, rtol=0, atol=1e-6)
        with torch.no_grad():
            assert float(losses_of[name](logits + 0.5)) == pytest.approx(float(value), rel=1e-5)


def test_only_one_gradient_is_as_large_as_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "_PART_LOGITS", {"cpu": V})
    student = torch.randn(N, V, requires_grad=True)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.numel()) or tensor, lambda t: t):
        loss = cross_entropy_sum(student, torch.arange(N))
    assert max(kept) <= V
    loss.backward()
    assert student.grad is not None
