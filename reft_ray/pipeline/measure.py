"""Measure one model for the release gate; with Ray workers this runs in a separate process."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch

from reft_ray.core.batch import answered, micro_batches
from reft_ray.core.conversation import Example
from reft_ray.core.losses import HeldOut, held_out
from reft_ray.evaluation.judge_settings import MATCHER_ONLY, JudgeSettings, judges_from
from reft_ray.evaluation.suite import Evaluation, Suite, evaluate
from reft_ray.finetuning.encoding import encode_rows
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.forward import ModelForward
from reft_ray.hf.generate import Responder, load_student
from reft_ray.jobs.artefacts import local_folder


@dataclass(frozen=True, slots=True)
class MeasureRequest:
    """The prompts, and answered `loss_rows` for the cross entropy. Judges are built where the model is measured."""

    suite: Suite
    loss_rows: Sequence[Example] = ()
    max_new_tokens: int = 256
    batch_tokens: int = 8192
    judges: Sequence[JudgeSettings] = MATCHER_ONLY


@dataclass(frozen=True, slots=True)
class Measurement:
    """The results of one model; `held_out` is None without loss rows."""

    evaluation: Evaluation
    held_out: HeldOut | None

    def as_dict(self) -> dict[str, Any]:
        """As JSON, for reports."""
        found = self.held_out
        return {
            **self.evaluation.as_dict(),
            "valid_loss": found.loss if found else None,
            "valid_mean_token_accuracy": found.accuracy if found else None,
        }


def measure(base: str, student: str | None, request: MeasureRequest, device: str) -> Measurement:
    """Measure the base model, or the student: an adapter on it, or full weights.

    `student` is a URI, because a path on the caller's machine may not exist on this one.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # Before the model is loaded: a judge that cannot be loaded is an error at once.
    suite = replace(request.suite, judges=judges_from(request.judges, device, request.batch_tokens))
    with nullcontext() if student is None else local_folder(student) as folder:
        loaded = load_student(base, folder, device)
    chat = ChatFormat(loaded.tokenizer)
    evaluation = evaluate(Responder(loaded.model, chat, request.max_new_tokens, request.batch_tokens), suite)
    encoded = answered(encode_rows(chat, request.loss_rows, loaded.context).encoded)
    batches = micro_batches(encoded, request.batch_tokens, chat.pad_id, device)
    return Measurement(evaluation, held_out(ModelForward(loaded.model), batches))
