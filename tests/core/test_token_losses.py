"""The losses of a client's own loop against their formulas."""

import math

import pytest
import torch

from reft_ray.core.errors import ReftError
from reft_ray.core.forward import Predictions
from reft_ray.core.loss_inputs import check_inputs
from reft_ray.core.losses import cross_entropy_sum
from reft_ray.core.token_losses import per_token, token_loss

N, V = 7, 11


@pytest.fixture
def logits():
    return torch.randn(N, V, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.fixture
def targets():
    return torch.arange(N) % V


def logprobs(logits, targets):
    return logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]


def found(logits, targets, name, inputs, config=None, kept=None):
    kept = torch.ones(N) if kept is None else kept
    return token_loss(logits, targets, per_token(name, inputs, config or {}), kept)


def test_cross_entropy_of_weight_one_is_the_sum(logits, targets):
    loss = found(logits, targets, "cross_entropy", {"weights": torch.ones(N)})
    assert torch.allclose(loss.total, cross_entropy_sum(logits, targets))
    assert torch.allclose(loss.logprob_N, logprobs(logits, targets).detach())
    assert loss.mass == pytest.approx(N)


def test_importance_sampling_and_its_gradient(logits, targets):
    old, advantage = torch.full((N,), -2.0), torch.linspace(-1, 1, N)
    loss = found(logits, targets, "importance_sampling", {"logprobs": old, "advantages": advantage})
    expected = -((logprobs(logits, targets) - old).exp() * advantage).sum()
    assert torch.allclose(loss.total, expected)
    (ours,) = torch.autograd.grad(loss.total, logits, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected, logits)
    assert torch.allclose(ours, theirs)


@pytest.mark.parametrize("config", [{}, {"clip_low_threshold": 0.5, "clip_high_threshold": 3.0}])
def test_ppo_clips(logits, targets, config):
    old, advantage = torch.linspace(-4, 0, N), torch.linspace(1, -1, N)
    loss = found(logits, targets, "ppo", {"logprobs": old, "advantages": advantage}, config)
    ratio = (logprobs(logits, targets) - old).exp()
    low, high = config.get("clip_low_threshold", 0.8), config.get("clip_high_threshold", 1.2)
    expected = -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
    assert torch.allclose(loss.loss_N, expected.detach())
    # A clipped token pulls nothing, and the mass says so.
    assert loss.mass < (ratio * advantage).abs().sum()


def test_a_withheld_token_adds_nothing_even_where_its_loss_is_infinite(logits, targets):
    weights = torch.ones(N)
    weights[3] = math.inf
    kept = torch.ones(N)
    kept[3] = 0
    loss = found(logits, targets, "cross_entropy", {"weights": weights}, kept=kept)
    (gradient,) = torch.autograd.grad(loss.total, logits)
    assert torch.isfinite(loss.total)
    assert gradient[3].abs().sum() == 0
    assert gradient[2].abs().sum() > 0


def test_parts_give_the_same_sums_and_gradient(logits, targets, monkeypatch):
    inputs = {"weights": torch.linspace(0, 2, N)}
    head = torch.nn.Linear(V, V)
    hidden = logits.detach().clone().requires_grad_()

    def run():
        loss = token_loss(Predictions(hidden, head, V), targets, per_token("cross_entropy", inputs, {}), torch.ones(N))
        (gradient,) = torch.autograd.grad(loss.total, hidden)
        return loss, gradient

    whole, gradient = run()
    monkeypatch.setattr("reft_ray.core.losses._PART_LOGITS", {"cpu": 2 * V})
    parted, again = run()
    assert torch.allclose(whole.total, parted.total)
    assert torch.allclose(whole.logprob_N, parted.logprob_N)
    assert torch.allclose(whole.mass, parted.mass)
    assert torch.allclose(gradient, again)


def test_without_gradients_there_is_no_mass(logits, targets):
    with torch.no_grad():
        assert found(logits, targets, "cross_entropy", {"weights": torch.ones(N)}).mass == 0


@pytest.mark.parametrize(
    ("name", "given", "config", "message"),
    [
        ("cispo", {}, {}, "'cispo' is not supported"),
        ("custom", {}, {}, "'custom' is not supported"),
        ("ppo", {"target_tokens": 0, "advantages": 0}, {}, "needs loss_fn_inputs.'logprobs'"),
        ("cross_entropy", {"target_tokens": 0, "mask": 0}, {}, "does not take loss_fn_inputs.'mask'"),
        ("cross_entropy", {"target_tokens": 0}, {"beta": 1.0}, "does not take loss_fn_config.'beta'"),
        ("ppo", {"target_tokens": 0, "logprobs": 0, "advantages": 0}, {"clip_low_threshold": "a"}, "takes numbers"),
    ],
)
def test_what_a_loss_does_not_know_is_refused_by_name(name, given, config, message):
    with pytest.raises(ReftError, match=message):
        check_inputs(name, given, config)
