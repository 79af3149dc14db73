"""One optimiser step: sums over ranks, clipping, and a clear end where a number is not finite."""

import pytest
import torch
from torch import nn

from reft_ray.core.errors import ReftError
from reft_ray.core.optimization import optimizer_step


def parameter_with(gradient: list[float]) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    parameter = nn.Parameter(torch.zeros(len(gradient)))
    parameter.grad = torch.tensor(gradient)
    return parameter, torch.optim.SGD([parameter], lr=1.0)


def test_gradients_and_terms_are_summed_over_ranks_and_clipped() -> None:
    parameter, optimizer = parameter_with([3.0, 4.0])
    double = lambda tensor: tensor * 2  # noqa: E731
    found = optimizer_step(optimizer, [parameter], {"loss": torch.tensor(1.5)}, 1, 5.0, double, double)
    assert found == {"loss": 3.0, "gradient_norm": 10.0}
    torch.testing.assert_close(parameter.detach(), torch.tensor([-3.0, -4.0]))
    assert parameter.grad is None


@pytest.mark.parametrize(
    ("gradient", "loss", "problem"),
    [([float("nan")], 1.0, "gradient_norm is nan"), ([1.0], float("inf"), "loss is inf")],
)
def test_what_is_not_finite_is_named_before_the_update(gradient: list[float], loss: float, problem: str) -> None:
    parameter, optimizer = parameter_with(gradient)
    with pytest.raises(ReftError, match=f"^step 7: {problem}: start a new run with a lower optimizer.learning_rate"):
        optimizer_step(optimizer, [parameter], {"loss": torch.tensor(loss)}, 7, 1.0)
    assert parameter.item() == 0.0
