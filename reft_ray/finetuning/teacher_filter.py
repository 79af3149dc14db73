"""What a teacher's filter reads: layer, share of the adapter, windows and thresholds, chosen on validation prompts."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reft_ray.core.batch import TokenizedExample
from reft_ray.core.conversation import Example, Label, chat
from reft_ray.core.quality import auroc, choose_thresholds, filter_quality, fit_calibration, response_offset, separation
from reft_ray.core.refusal import refusal_score
from reft_ray.finetuning.config import TeacherConfig
from reft_ray.finetuning.model import TrainableModel
from reft_ray.finetuning.rows import Fitted
from reft_ray.hf.features import labels_of, prompt_features, scores_by_layer
from reft_ray.hf.lora import is_adapted, scaled_adapters
from reft_ray.hf.ref_teacher import Manifest, RefTeacher, save_teacher
from reft_ray.hf.windows import Windows, max_per_text, p99_length

HISTOGRAM_BINS = 20
MIXES = (1.0, 0.5, 0.25, 0.0)
"""Shares of the adapter that the filter may read, unless the operator sets one."""

Sweep = dict[int, tuple[Tensor, Tensor]]
"""Per layer R_l over the reference prompts and the scores of the validation prompts, with the present weights."""


def sweep_layers(depth: int, sweep: tuple[float, float]) -> list[int]:
    """The layers between two shares of the depth, at least one."""
    low, high = sweep
    layers = [layer for layer in range(1, depth + 1) if low * depth - 1e-9 <= layer <= high * depth + 1e-9]
    return layers or [max(1, round(depth * (low + high) / 2))]


class FilterSelection:
    """Ranks what the filter may read with the teacher's present weights, and writes the artefact."""

    def __init__(
        self,
        config: TeacherConfig,
        trainable_model: TrainableModel,
        device: torch.device,
        prompts: Sequence[TokenizedExample],
        validation: Fitted,
    ) -> None:
        self.config, self.trainable_model, self.device = config, trainable_model, device
        self.windows = Windows.of(trainable_model.chat, config.window_tokens or p99_length(prompts))
        self.validation = validation
        self.label_B = labels_of(validation.encoded)
        self.pieces, self.owner = self.windows.split_all(validation.encoded)
        self.reference = _sample_per_class(prompts, config.reference_prompts, config.seed)
        self.layers = sweep_layers(trainable_model.base.layers, config.sweep)
        self.mixes = self._mixes()
        self.base_auroc = self.ranking(self.sweep(0.0)) if len(self.mixes) > 1 else 0.0
        if config.feature == "base":
            self.layers = [self.best_layer(self.sweep(0.0))]

    def _mixes(self) -> tuple[float, ...]:
        """The shares of the adapter that the filter may read, the largest first."""
        if self.config.feature == "base":
            return (0.0,)
        if self.config.feature_mix is not None:
            return (self.config.feature_mix,)
        return MIXES if is_adapted(self.trainable_model.model) else (1.0,)

    @contextmanager
    def _scoring(self, mix: float) -> Iterator[nn.Module]:
        """The model as a filter runs it that reads a share `mix` of the adapter."""
        model = self.trainable_model.model
        training = model.training
        model.eval()
        try:
            with scaled_adapters(model, mix):
                yield model
        finally:
            model.train(training)

    def sweep(self, mix: float) -> Sweep:
        """Every layer, with a share `mix` of the adapter."""
        pad_id = self.trainable_model.chat.pad_id
        with self._scoring(mix) as model:
            reference = prompt_features(model, self.reference, self.layers, pad_id, self.device)
            validation = prompt_features(model, self.pieces, self.layers, pad_id, self.device)
        scored = scores_by_layer(reference, labels_of(self.reference), validation)
        count = len(self.label_B)
        return {
            layer: (refusal_D, max_per_text(score, self.owner, count)) for layer, (refusal_D, score) in scored.items()
        }

    def best_layer(self, swept: Sweep) -> int:
        """The layer that separates the validation prompts best."""
        return max(swept, key=lambda number: separation(swept[number][1], self.label_B))

    def ranking(self, swept: Sweep) -> float:
        """AUROC on the validation prompts at the best layer."""
        return max(auroc(score_B, self.label_B) for _, score_B in swept.values())

    def read(self) -> tuple[float, Sweep]:
        """The largest share of the adapter that ranks no worse than the base alone, and the layers with it."""
        for mix in self.mixes[:-1]:
            swept = self.sweep(mix)
            if self.ranking(swept) >= self.base_auroc - self.config.tolerance:
                return mix, swept
        return self.mixes[-1], self.sweep(self.mixes[-1])

    def export(self, out: Path, steps: int, answers: Sequence[Example]) -> RefTeacher:
        """Choose the layer, freeze R_l, set thresholds and calibration, and write the artefact."""
        mix, swept = self.read()
        layer = self.best_layer(swept)
        refusal_D, score_B = swept[layer]
        thresholds = choose_thresholds(score_B, self.label_B, self.config.thresholds.targets)
        base = self.trainable_model.base
        manifest = Manifest(
            base_name=base.name,
            base_fingerprint=base.fingerprint,
            template_hash=self.trainable_model.chat.hash,
            layer=layer,
            width=base.width,
            weights=self.config.weights,
            thresholds=thresholds,
            calibration=fit_calibration(score_B, self.label_B),
            quality=filter_quality(score_B, self.label_B, thresholds),
            per_source=per_source(self.validation.rows, score_B, thresholds.block),
            window_tokens=self.windows.size,
            feature=self.config.feature,
            feature_mix=mix,
            response_offset=self._response_offset(answers, mix, layer, refusal_D, thresholds.review),
            histogram=torch.histc(score_B, HISTOGRAM_BINS, -1.0, 1.0).long().tolist(),
            config={**self.config.model_dump(mode="json"), "steps": steps, "sweep_auroc": self._auroc_by_layer(swept)},
        )
        return save_teacher(out, self.trainable_model.model, manifest, refusal_D)

    def _auroc_by_layer(self, swept: Sweep) -> Mapping[str, Any]:
        return {str(layer): auroc(score_B, self.label_B) for layer, (_, score_B) in swept.items()}

    def _response_offset(
        self, rows: Sequence[Example], mix: float, layer: int, refusal_D: Tensor, review: float
    ) -> float:
        """`core.quality.response_offset` of the rows' answers, each scored as a text by itself.

        Refusals count as harmless answers. Without any answered row the offset lets no answer be withheld.
        """
        answers = sample_answers(rows, self.config.reference_prompts, self.config.seed)
        if not answers:
            return 2.0
        encode, pad_id = self.trainable_model.chat.encode, self.trainable_model.chat.pad_id
        pieces, owner = self.windows.split_all([encode(Example(chat(text))) for text in answers])
        with self._scoring(mix) as model:
            feature_WD = prompt_features(model, pieces, [layer], pad_id, self.device)[layer]
        score_B = max_per_text(refusal_score(feature_WD, refusal_D), owner, len(answers))
        return response_offset(score_B, review, self.config.thresholds.answer_fpr)


def _sample_per_class(rows: Sequence[TokenizedExample], count: int, seed: int) -> list[TokenizedExample]:
    chosen: list[TokenizedExample] = []
    for label in Label:
        of_class = [row for row in rows if row.label == label]
        random.Random(f"{seed}/reference/{label}").shuffle(of_class)  # noqa: S311
        chosen += of_class[: max(1, count // 2)]
    return chosen


def sample_answers(rows: Sequence[Example], count: int, seed: int) -> list[str]:
    """At most `count` random answers of `rows`: the first rows of a sorted file may all be refusals."""
    answers = [row.response for row in rows if row.answered]
    return random.Random(f"{seed}/answers").sample(answers, min(count, len(answers)))  # noqa: S311


def per_source(rows: Sequence[Example], score_B: Tensor, block: float) -> dict[str, dict[str, float]]:
    """Rows and share blocked per source and label."""
    groups: dict[str, list[float]] = {}
    for row, score in zip(rows, score_B.tolist(), strict=True):
        groups.setdefault(f"{row.source or 'unnamed'} ({row.label})", []).append(score)
    return {
        name: {"rows": len(scores), "blocked": sum(score > block for score in scores) / len(scores)}
        for name, scores in groups.items()
    }
