"""What a teacher's filter reads, chosen on validation prompts: layers, geometry, share of the adapter, thresholds."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reft_ray.core.batch import TokenizedExample
from reft_ray.core.conversation import Example, Label, chat
from reft_ray.core.geometry import ClassMoments, Geometry, Readout, Readouts
from reft_ray.core.quality import auroc, choose_thresholds, filter_quality, fit_calibration, response_offset, separation
from reft_ray.finetuning.config import TeacherConfig
from reft_ray.finetuning.encoding import Fitted
from reft_ray.finetuning.model import TrainableModel
from reft_ray.finetuning.rows import rank_slice
from reft_ray.finetuning.runtime import Runtime
from reft_ray.finetuning.sharding import is_sharded, most_of_ranks
from reft_ray.hf.features import labels_of, moments_by_layer, prompt_features
from reft_ray.hf.lora import is_adapted, scaled_adapters
from reft_ray.hf.ref_teacher import Manifest, RefTeacher, save_teacher
from reft_ray.hf.windows import Windows, max_per_text, p99_length

HISTOGRAM_BINS = 20
MIXES = (1.0, 0.5, 0.0)
"""Shares of the adapter that the filter may read, unless the operator sets one."""
SHRINKAGES = (0.05, 0.2, 0.5)
MAX_LAYERS = 5
"""Scores of up to this many neighbouring layers are averaged."""


def sweep_layers(depth: int, sweep: tuple[float, float]) -> list[int]:
    """The layers between two shares of the depth, at least one."""
    low, high = sweep
    layers = [layer for layer in range(1, depth + 1) if low * depth - 1e-9 <= layer <= high * depth + 1e-9]
    return layers or [max(1, round(depth * (low + high) / 2))]


@dataclass(frozen=True, slots=True)
class FilterChoice:
    """What the filter reads: readouts and their shrinkage, a share of the adapter, and the validation scores [B]."""

    readouts: Readouts
    shrinkage: float | None
    mix: float
    score_B: Tensor
    auroc_by_layer: Mapping[str, float]


class StageProgress:
    """Reports prompts done, stage by stage, with the share of the whole by `stages`, the prompts of each."""

    def __init__(self, stages: Mapping[str, int], report: Callable[[Mapping[str, Any]], None]) -> None:
        self.stages, self.report = stages, report

    def __call__(self, stage: str, done: int, total: int, share: float) -> None:
        """`share` is that of the stage."""
        names = list(self.stages)
        before = sum(self.stages[name] for name in names[: names.index(stage)])
        whole = (before + share * self.stages[stage]) / max(1, sum(self.stages.values()))
        # The report of the finished run is the one that says 1.
        progress = min(whole, 0.99)
        self.report({"step": 0, "progress": progress, "stage": stage, "prompts_done": done, "prompts": total})


class FilterSelection:
    """Chooses what the filter reads with the teacher's present weights, and writes the artefact.

    Every rank runs its share of the prompts and must call the same methods; moments and scores are all-reduced.
    """

    def __init__(
        self,
        config: TeacherConfig,
        trainable_model: TrainableModel,
        runtime: Runtime,
        train: Fitted,
        validation: Fitted,
    ) -> None:
        self.config, self.trainable_model, self.runtime = config, trainable_model, runtime
        self.windows = Windows.of(trainable_model.chat, config.window_tokens or p99_length(train.encoded))
        self.validation = validation
        self.label_B = labels_of(validation.encoded)
        sources = [row.source if config.balanced_sources else "" for row in train.rows]
        self.reference = sample_per_class(train.encoded, config.reference_prompts, config.seed, sources)
        self.layers = sweep_layers(trainable_model.base.layers, config.sweep)
        self.layer = config.layer or self.layers[len(self.layers) // 2]
        self.progress: StageProgress | None = None

    @contextmanager
    def _scoring(self, mix: float) -> Iterator[nn.Module]:
        """The model as a filter runs it that reads a share `mix` of the adapter."""
        model = self.trainable_model.model
        training = model.training
        model.eval()
        try:
            with scaled_adapters(model, mix) if is_adapted(model) else nullcontext():
                yield model
        finally:
            model.train(training)

    def _features(
        self, rows: Sequence[TokenizedExample], layers: Sequence[int], mix: float, stage: str = ""
    ) -> dict[int, Tensor]:
        """f_l of this rank's share of the rows; a named stage is reported."""
        mine = rank_slice(rows, self.runtime.rank, self.runtime.world_size)
        pad_id, device = self.trainable_model.chat.pad_id, self.runtime.device
        report = self.progress if stage else None

        def progress(done: int, share: float) -> None:
            if report:
                report(stage, done, len(mine), share)

        with self._scoring(mix) as model:
            passes = partial(most_of_ranks, runtime=self.runtime) if is_sharded(model) else None
            found = prompt_features(model, mine, layers, pad_id, device, progress=progress, passes=passes)
        # A rank without rows has features of no row.
        return {layer: feature_BD.view(-1, self.trainable_model.base.width) for layer, feature_BD in found.items()}

    def _moments(
        self, rows: Sequence[TokenizedExample], layers: Sequence[int], mix: float, stage: str = ""
    ) -> dict[int, ClassMoments]:
        label_B = labels_of(rank_slice(rows, self.runtime.rank, self.runtime.world_size))
        found = moments_by_layer(self._features(rows, layers, mix, stage), label_B, self.trainable_model.base.width)
        return {layer: moments.reduce(self.runtime.all_reduce) for layer, moments in found.items()}

    def _scores(self, readout: Readout, feature_BD: Tensor, count: int) -> Tensor:
        """Scores of all ranks' rows, [count], from the features of this rank's."""
        score_B = torch.zeros(count, dtype=torch.float64)
        score_B[self.runtime.rank :: self.runtime.world_size] = readout.score(feature_BD).double()
        return self.runtime.all_reduce(score_B)

    def readout(self, layer: int, prompts: int, mix: float = 1.0) -> Readout:
        """The readout of one layer with the present weights, from about `prompts` reference prompts."""
        reference = sample_per_class(self.reference, prompts, self.config.seed)
        moments = self._moments(reference, [layer], mix)[layer]
        return Readout.fit(moments, self.config.geometry, self.config.shrinkage or SHRINKAGES[1])

    def quick_auroc(self, prompts: int, mix: float = 1.0) -> float:
        """AUROC at one layer, of about `prompts` reference and `prompts` validation prompts: for early stopping."""
        rows = sample_per_class(self.validation.encoded, prompts, self.config.seed)
        readout = self.readout(self.layer, prompts, mix)
        score_B = self._scores(readout, self._features(rows, [self.layer], mix)[self.layer], len(rows))
        return auroc(score_B, labels_of(rows))

    def mixes(self) -> tuple[float, ...]:
        """The shares of the adapter that the filter may read, the largest first."""
        if self.config.feature == "base":
            return (0.0,)
        if self.config.feature_mix is not None:
            return (self.config.feature_mix,)
        return MIXES if is_adapted(self.trainable_model.model) else (1.0,)

    def choose(self, mix: float) -> FilterChoice:
        """The layers and the shrinkage that separate the validation prompts best."""
        pieces, owner = self.windows.split_all(self.validation.encoded)
        moments = self._moments(self.reference, self.layers, mix, "reference prompts")
        features = self._features(pieces, self.layers, mix, "validation prompts")
        candidates = []
        for shrinkage in self._shrinkages():
            fit = partial(Readout.fit, geometry=self.config.geometry, shrinkage=shrinkage or 1.0, narrow=True)
            readouts = {n: fit(moments[n]) for n in self.layers}
            scores = {n: self._scores(readouts[n], features[n], len(pieces)) for n in self.layers}
            by_layer = {str(n): auroc(self._per_prompt(scores[n], owner), self.label_B) for n in self.layers}
            for chosen in self._neighbours():
                score_B = self._per_prompt(torch.stack([scores[n] for n in chosen]).mean(0), owner)
                readout = Readouts({n: readouts[n] for n in chosen})
                candidates.append(FilterChoice(readout, shrinkage, mix, score_B, by_layer))
        return max(candidates, key=lambda candidate: separation(candidate.score_B, self.label_B))

    def _per_prompt(self, score_W: Tensor, owner: Tensor) -> Tensor:
        return max_per_text(score_W, owner, len(self.label_B))

    def _shrinkages(self) -> Sequence[float | None]:
        if self.config.geometry is not Geometry.WHITENED:
            return (None,)
        return (self.config.shrinkage,) if self.config.shrinkage else SHRINKAGES

    def _neighbours(self) -> Iterator[list[int]]:
        """Runs of neighbouring layers, of `average_layers` each, or of 1 to 5."""
        counts = [self.config.average_layers] if self.config.average_layers else range(1, MAX_LAYERS + 1)
        for count in counts:
            for first in range(max(1, len(self.layers) - count + 1)):
                yield self.layers[first : first + count]

    def manifest(self, chosen: FilterChoice, steps: int, answers: Sequence[Example]) -> Manifest:
        """Thresholds, calibration and quality of the chosen filter."""
        thresholds = choose_thresholds(chosen.score_B, self.label_B, self.config.thresholds.targets)
        base = self.trainable_model.base
        return Manifest(
            base_name=base.name,
            base_fingerprint=base.fingerprint,
            template_hash=self.trainable_model.chat.hash,
            layer=chosen.readouts.layers[len(chosen.readouts.layers) // 2],
            layers=chosen.readouts.layers,
            geometry=self.config.geometry,
            shrinkage=chosen.shrinkage,
            width=base.width,
            weights=self.config.weights,
            thresholds=thresholds,
            calibration=fit_calibration(chosen.score_B, self.label_B),
            quality=filter_quality(chosen.score_B, self.label_B, thresholds),
            per_source=per_source(self.validation.rows, chosen.score_B, thresholds.block),
            window_tokens=self.windows.size,
            feature=self.config.feature,
            feature_mix=chosen.mix,
            response_offset=self._response_offset(answers, chosen, thresholds.review),
            histogram=torch.histc(chosen.score_B, HISTOGRAM_BINS, -1.0, 1.0).long().tolist(),
            config={**self.config.model_dump(mode="json"), "steps": steps, "sweep_auroc": chosen.auroc_by_layer},
        )

    def save(
        self, out: Path, chosen: FilterChoice, manifest: Manifest, weights: Mapping[str, Tensor] | None = None
    ) -> RefTeacher:
        """Write the artefact, of a sharded model with the gathered `weights`; on one rank."""
        return save_teacher(out, self.trainable_model.model, manifest, chosen.readouts, weights)

    def _response_offset(self, rows: Sequence[Example], chosen: FilterChoice, review: float) -> float:
        """`core.quality.response_offset` of the rows' answers, each scored as a text by itself.

        Refusals count as harmless answers. Without any answered row the offset lets no answer be withheld.
        """
        answers = sample_answers(rows, self.config.answer_sample, self.config.seed)
        if not answers:
            return 2.0
        encode = self.trainable_model.chat.encode
        pieces, owner = self.windows.split_all([encode(Example(chat(text))) for text in answers])
        features = self._features(pieces, chosen.readouts.layers, chosen.mix, "answers")
        scores = [self._scores(readout, features[n], len(pieces)) for n, readout in chosen.readouts.by_layer.items()]
        score_B = max_per_text(torch.stack(scores).mean(0), owner, len(answers))
        return response_offset(score_B, review, self.config.thresholds.answer_fpr)


def sample_per_class(
    rows: Sequence[TokenizedExample], count: int, seed: int, sources: Sequence[str] | None = None
) -> list[TokenizedExample]:
    """About `count` rows, as many of each class, and of a class equally many of each source while they last."""
    groups: dict[tuple[Label | None, str], list[TokenizedExample]] = {}
    for row, source in zip(rows, sources or [""] * len(rows), strict=True):
        groups.setdefault((row.label, source), []).append(row)
    chosen: list[TokenizedExample] = []
    for label in Label:
        of_class = [group for (of, _), group in groups.items() if of == label]
        rng = random.Random(f"{seed}/reference/{label}")  # noqa: S311 - an order, not a secret
        for group in of_class:
            rng.shuffle(group)
        in_turn = (row for turn in zip_longest(*of_class) for row in turn if row is not None)
        chosen += islice(in_turn, max(1, count // 2))
    return chosen


def sample_answers(rows: Sequence[Example], count: int, seed: int) -> list[str]:
    """At most `count` random answers of `rows`: the first rows of a sorted file may all be refusals."""
    answers = [row.response for row in rows if row.answered]
    return random.Random(f"{seed}/answers").sample(answers, min(count, len(answers)))  # noqa: S311


def per_source(rows: Sequence[Example], score_B: Tensor, block: float) -> dict[str, dict[str, Any]]:
    """Rows and share blocked per source and label."""
    groups: dict[str, list[float]] = {}
    for row, score in zip(rows, score_B.tolist(), strict=True):
        groups.setdefault(f"{row.source or 'unnamed'} ({row.label})", []).append(score)
    return {
        name: {"rows": len(scores), "blocked": sum(score > block for score in scores) / len(scores)}
        for name, scores in groups.items()
    }
