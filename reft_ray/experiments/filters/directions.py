"""Filters from a language model: the direction between class means of its features, a probe, and its answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from reft_ray.core.batch import TokenizedExample
from reft_ray.core.conversation import Example, chat
from reft_ray.core.geometry import Geometry, Readouts
from reft_ray.core.quality import separation
from reft_ray.core.scoring import Scorer
from reft_ray.core.verdict import Calibration, Thresholds
from reft_ray.evaluation.judges import Grade, RefusalMatcher
from reft_ray.experiments.filters.linear import fit_logistic
from reft_ray.experiments.filters.rows import labels_of, texts_of
from reft_ray.experiments.filters.scores import Score
from reft_ray.finetuning.teacher_filter import sweep_layers
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.compute import resolve_dtype
from reft_ray.hf.features import fit_readouts, prompt_features
from reft_ray.hf.generate import Responder
from reft_ray.hf.loading import Base, load_base
from reft_ray.hf.ref_teacher import RefTeacher
from reft_ray.hf.scorer import TeacherScorer

SWEEP = (0.3, 0.7)
ANSWER_TOKENS = 16


class Features:
    """f_l of texts under one model; a text longer than the context is truncated."""

    def __init__(self, base: Base) -> None:
        self.model = base.model.eval()
        self.device = base.model.device
        self.chat = ChatFormat(base.tokenizer)
        self.limit = base.context

    def of(self, texts: Sequence[str], layers: Sequence[int]) -> dict[int, Tensor]:
        """{layer: [B, D]}."""
        return prompt_features(
            self.model, [self._encode(text) for text in texts], layers, self.chat.pad_id, self.device
        )

    def _encode(self, text: str) -> TokenizedExample:
        ids = self.chat.prompt(chat(text))
        while len(ids) > self.limit:
            text = text[: len(text) * self.limit // len(ids)]
            ids = self.chat.prompt(chat(text))
        return TokenizedExample(ids, [False] * len(ids), len(ids) - 1)


DIRECTION_ABOUT = "cosine to the base model's own class-mean difference: no training, layer by validation"


def fit_direction(
    base_name: str,
    device: str,
    window_tokens: int,
    train: Sequence[Example],
    validation: Sequence[Example],
    geometry: Geometry = Geometry.PLAIN,
) -> Score:
    """R_l of the untrained base, at the layer that separates the validation prompts best."""
    base = load_base(base_name, resolve_dtype("auto", device), device)
    features, layers = Features(base), sweep_layers(base.layers, SWEEP)
    known, held = features.of(texts_of(train), layers), features.of(texts_of(validation), layers)
    readouts = fit_readouts(known, labels_of(train), geometry)
    label_B = labels_of(validation)
    layer = max(layers, key=lambda number: separation(readouts[number].score(held[number]), label_B))
    unused = Thresholds(1.0, 1.0), Calibration(1.0, 0.0)
    return scores_of(
        TeacherScorer(
            base.model, features.chat, Readouts({layer: readouts[layer]}), "base", *unused, 0.0, window_tokens
        )
    )


PROBE_ABOUT = "logistic regression on the untrained base model's features at half depth"


def fit_probe(base_name: str, device: str, train: Sequence[Example], validation: Sequence[Example]) -> Score:
    """A linear probe at half depth."""
    base = load_base(base_name, resolve_dtype("auto", device), device)
    features = Features(base)
    layer = max(1, round(base.layers / 2))
    return fit_logistic(lambda texts: features.of(texts, [layer])[layer].numpy(), train, validation)


ANSWERS_ABOUT = "the teacher answers (greedy) and a matcher looks for a refusal: one generation per text"


def fit_answers(teacher: Path, base_name: str, device: str) -> Score:
    """1 if the teacher's answer is a refusal, else -1; -1 too for a prompt that leaves no space for an answer."""
    loaded = RefTeacher.load(teacher)
    base = loaded.base(base_name, device=device)
    fmt = ChatFormat(base.tokenizer)
    respond = Responder(loaded.standalone(base), fmt, ANSWER_TOKENS)
    longest_prompt = base.context - ANSWER_TOKENS

    def score(texts: Sequence[str]) -> Tensor:
        asked = [index for index, text in enumerate(texts) if len(fmt.prompt(chat(text))) <= longest_prompt]
        prompts = [chat(texts[index]) for index in asked]
        grades = RefusalMatcher().judge(prompts, respond(prompts)) if asked else []
        found = torch.full((len(texts),), -1.0, dtype=torch.float64)
        for index, grade in zip(asked, grades, strict=True):
            found[index] = 1.0 if grade is Grade.REFUSED else -1.0
        return found

    return score


def fit_teacher(teacher: Path, base_name: str) -> Score:
    """The Ref-Teacher itself: layers 1..l, windows over long texts."""
    return scores_of(RefTeacher.load(teacher).scorer(base_name))


def scores_of(scorer: Scorer) -> Score:
    """A scorer's refusal scores as they are."""
    return lambda texts: torch.tensor([found.score for found in scorer.score(texts)], dtype=torch.float64)
