"""Which method a configuration's `step` names: the one place that knows them all."""

from __future__ import annotations

from torch import nn

from reft_ray.baselines.booster import Booster
from reft_ray.baselines.ldifs import Ldifs
from reft_ray.baselines.lisa import Lisa
from reft_ray.baselines.step import GuidedStep, Step
from reft_ray.baselines.vaccine import Vaccine
from reft_ray.core.guided import AlignmentLoss
from reft_ray.core.refusal import AllReduce
from reft_ray.finetuning.checkpoint import trainable
from reft_ray.finetuning.config import FinetuneConfig
from reft_ray.hf.forward import ModelForward, attention_blocks, decoder_layers


def step_of(
    config: FinetuneConfig, model: nn.Module, alignment_loss: AlignmentLoss, all_reduce: AllReduce, steps: int
) -> Step:
    """The step of a run of `steps` steps on a model whose trainable weights are already where the run starts."""
    student = ModelForward(model)
    settings = config.baselines
    guided = GuidedStep(student, alignment_loss, config.distill_weight, all_reduce)
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
