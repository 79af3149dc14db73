"""The step of a run: the method of this project, preference pairs, or another defence."""

from __future__ import annotations

from torch import nn

from reft_ray.baselines.booster import Booster
from reft_ray.baselines.ldifs import Ldifs
from reft_ray.baselines.lisa import Lisa
from reft_ray.baselines.step import GuidedStep, Step
from reft_ray.baselines.vaccine import Vaccine
from reft_ray.core.forward import AllReduce
from reft_ray.core.guided import Distillation
from reft_ray.finetuning.checkpoint import trainable
from reft_ray.finetuning.config import FinetuneConfig
from reft_ray.finetuning.preference import AtStart, PreferenceStep
from reft_ray.hf.forward import ModelForward, attention_blocks, decoder_layers


def step_of(
    config: FinetuneConfig,
    model: nn.Module,
    distillation: Distillation,
    all_reduce: AllReduce,
    steps: int,
    at_start: AtStart | None = None,
) -> Step:
    """The step that a configuration names, for a run of `steps` steps from the model's present weights.

    `at_start`, for preference pairs, puts the weights at the start into the model.
    """
    student = ModelForward(model)
    if at_start is not None:
        return PreferenceStep(config, student, distillation, all_reduce, at_start)
    settings = config.baselines
    guided = GuidedStep(student, distillation, all_reduce)
    match config.step:
        case "guided":
            return guided
        case "lisa":
            alternation = (settings.lisa_alignment_steps, settings.lisa_user_steps)
            return Lisa(guided, trainable(model), *alternation, settings.lisa_rho, steps // 10, all_reduce)
        case "vaccine":
            return Vaccine(student, attention_blocks(model), settings.vaccine_rho, all_reduce)
        case "booster":
            parameters = list(trainable(model).values())
            return Booster(student, parameters, settings.booster_weight, settings.booster_alpha, all_reduce)
        case "ldifs":
            return Ldifs(student, list(decoder_layers(model)), trainable(model), settings.ldifs_weight, all_reduce)
