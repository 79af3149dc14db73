"""What the losses of a client's own loop read, and their refusal of anything else. Without torch: the API checks it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from reft_ray.core.errors import ReftError

LossName = Literal["cross_entropy", "importance_sampling", "ppo"]
LOSSES: tuple[LossName, ...] = get_args(LossName)
INPUTS: Mapping[LossName, tuple[str, ...]] = {
    "cross_entropy": ("weights",),
    "importance_sampling": ("logprobs", "advantages"),
    "ppo": ("logprobs", "advantages"),
}
"""What a loss reads per position, besides the target."""
LEARNED: Mapping[LossName, str] = {
    "cross_entropy": "weights",
    "importance_sampling": "advantages",
    "ppo": "advantages",
}
"""The input that is zero where a token is not learned."""
CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
"""PPO's configuration and its defaults."""


def check_inputs(name: str, given: Mapping[str, object], config: Mapping[str, object]) -> LossName:
    """The loss of this name. Raises ReftError for another loss, input or configuration, which it names."""
    known = next((loss for loss in LOSSES if loss == name), None)
    if known is None:
        raise ReftError(f"loss_fn {name[:64]!r} is not supported: use {', '.join(LOSSES)}")
    wanted = {"target_tokens", *INPUTS[known]}
    optional = {"weights"} if known == "cross_entropy" else set()
    if missing := sorted(wanted - optional - set(given)):
        raise ReftError(f"{known} needs loss_fn_inputs[{missing[0]!r}]")
    if unknown := sorted(set(given) - wanted):
        raise ReftError(f"{known} does not take loss_fn_inputs[{unknown[0][:64]!r}]")
    allowed = CLIP if known == "ppo" else {}
    if odd := sorted(set(config) - set(allowed)):
        raise ReftError(f"{known} does not take loss_fn_config[{odd[0][:64]!r}]")
    if any(isinstance(value, bool) or not isinstance(value, int | float) for value in config.values()):
        raise ReftError(f"loss_fn_config of {known} takes numbers")
    return known
