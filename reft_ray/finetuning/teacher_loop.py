"""Stage 1 on one rank: `core.teacher` over labelled prompts, early stopping on other sources, and the artefact."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from reft_ray.core.batch import TokenizedExample, answered, dummy_batch, micro_batches
from reft_ray.core.conversation import Example, Label, chat
from reft_ray.core.errors import ReftError
from reft_ray.core.optimization import adamw, clip_gradients, learning_rate_at, reduce_gradients, set_learning_rate
from reft_ray.core.quality import auroc, choose_thresholds, filter_quality, fit_calibration, response_offset, separation
from reft_ray.core.refusal import RunningRefusal, refusal_score
from reft_ray.core.teacher import TeacherTerms, teacher_step
from reft_ray.finetuning.checkpoint import (
    gather_state,
    restore,
    restore_weights,
    trainable,
    whole,
    write_state,
)
from reft_ray.finetuning.config import TeacherConfig
from reft_ray.finetuning.encoding import encode_rows
from reft_ray.finetuning.export import EXPORT
from reft_ray.finetuning.model import TrainableModel, load_trainable
from reft_ray.finetuning.prompts import check_labels
from reft_ray.finetuning.rows import CyclingSampler, digest_of, share
from reft_ray.finetuning.runtime import Runtime
from reft_ray.hf.features import labels_of, prompt_features, scores_by_layer
from reft_ray.hf.lora import is_adapted, mixed
from reft_ray.hf.ref_teacher import Manifest, RefTeacher, save_teacher
from reft_ray.hf.windows import Windows, highest, p99_length

TEACHER = "teacher"
HISTOGRAM_BINS = 20
MIXES = (1.0, 0.5, 0.25, 0.0)
"""How much of the adapter the filter may read, where the operator does not say."""


@dataclass(frozen=True, slots=True)
class TeacherData:
    """Labelled prompts to learn from (with answers where there are any), and validation prompts of other sources.

    `answers` are further answered rows: the cross entropy learns from them, and where features are trained so does REG;
    the R_l that is kept does not see their prompts.
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    answers: Sequence[Example] = ()

    def __post_init__(self) -> None:
        check_labels(self.train, "training")
        check_labels(self.validation, "validation")


def train_teacher(runtime: Runtime, config: TeacherConfig, data: TeacherData) -> None:
    """Prepare a Ref-Teacher; the last checkpoint that is reported carries its artefact under `export/`."""
    torch.manual_seed(config.seed + runtime.rank)
    _Run(runtime, config, load_trainable(config, runtime, TEACHER), data).train()


def sweep_layers(depth: int, sweep: tuple[float, float]) -> list[int]:
    """The layers between two shares of the depth, at least one."""
    low, high = sweep
    layers = [layer for layer in range(1, depth + 1) if low * depth - 1e-9 <= layer <= high * depth + 1e-9]
    return layers or [max(1, round(depth * (low + high) / 2))]


class _Run:
    def __init__(
        self, runtime: Runtime, config: TeacherConfig, trainable_model: TrainableModel, data: TeacherData
    ) -> None:
        self.runtime, self.config, self.trainable_model = runtime, config, trainable_model
        depth = trainable_model.base.layers
        self.layers = sweep_layers(depth, config.sweep)
        self.layer = config.layer or max(1, round(depth / 2))
        train = encode_rows(trainable_model.chat, data.train, trainable_model.max_tokens)
        validation = encode_rows(trainable_model.chat, data.validation, trainable_model.max_tokens, train.skipped)
        further = encode_rows(trainable_model.chat, data.answers, trainable_model.max_tokens, train.skipped)
        self.inputs = {
            "set of training prompts": digest_of(data.train),
            "set of validation prompts": digest_of(data.validation),
            "set of answers": digest_of(data.answers),
        }
        # Whether both labels are there is asked again: rows may have been left out.
        self.data = TeacherData(train.rows, validation.rows, further.rows)
        self.skipped = train.skipped
        self.rows = train.encoded
        self.answered = answered(train.encoded + further.encoded)
        self.windows = Windows.of(trainable_model.chat, config.window_tokens or p99_length(self.rows))
        self.validation = validation.encoded
        self.pieces, self.owner = self.windows.split_all(self.validation)
        self.reference = _sample_per_class(self.rows, config.reference_prompts, config.seed)
        self.mixes = self._mixes()
        self.base_auroc = self._ranking(self._sweep(0.0)) if len(self.mixes) > 1 else 0.0
        if config.feature == "base":
            self.layer = self._best_layer(self._sweep(0.0))
            self.layers = [self.layer]
        self.cycles = self._cycles()
        learned = self.rows if config.feature == "trained" else self.answered
        if not learned:
            raise ReftError("feature=base learns from answers alone, and no row has one: add refusals and answers")
        self.total_steps = max(1, round(config.epochs * len(learned) / config.batch_rows))
        self.evaluate_every = config.evaluate_every or max(1, self.total_steps // 10)
        self.optimizer = adamw(
            trainable_model.model.parameters(), config.optimizer.learning_rate, config.optimizer.weight_decay
        )
        self.running = RunningRefusal(config.feature_decay)
        self.step = 0
        self.rows_seen = 0
        self.best_auroc = 0.0
        self.best_step = 0
        self.best: dict[str, Tensor] = {}
        self.stale = 0

    def _mixes(self) -> tuple[float, ...]:
        """What the filter may read of the adapter, the most first."""
        if self.config.feature == "base":
            return (0.0,)
        if self.config.feature_mix is not None:
            return (self.config.feature_mix,)
        return MIXES if is_adapted(self.trainable_model.model) else (1.0,)

    def _cycles(self) -> dict[str, CyclingSampler]:
        """Prompts per class for REG (all of them), and answered rows per class for the cross entropy."""
        cycles = {}
        for label in Label:
            if self.config.feature == "trained":
                prompts = [row.prompt_only() for row in self.rows if row.label == label]
                cycles[f"prompt-{label}"] = CyclingSampler(prompts, f"{self.config.seed}/p/{label}")
            if with_answer := [row for row in self.answered if row.label == label]:
                cycles[f"answer-{label}"] = CyclingSampler(with_answer, f"{self.config.seed}/a/{label}")
        return cycles

    def train(self) -> None:
        """Train until the steps are done or the validation prompts stop improving; ends with the best weights."""
        self._resume()
        while self.step < self.total_steps and self.stale < self.config.patience:
            started = time.perf_counter()
            terms = self._train_once()
            seconds = time.perf_counter() - started
            if self.step % self.evaluate_every == 0 or self.step == self.total_steps:
                self._evaluate()
            if self.step < self.total_steps and self.stale < self.config.patience:
                self._report(terms, seconds)
        self._report(None, 0.0, last=True)

    def _next_rows(self) -> list[TokenizedExample]:
        config = self.config
        count = config.batch_rows // 2
        answers_each = round(count * config.answered_rows)
        if config.feature == "base":
            answers_each, prompts = count, []
        elif config.balanced:
            prompts = [row for label in Label for row in self.cycles[f"prompt-{label}"].take_rows(max(1, count))]
        else:
            harmful = sum(row.label == Label.HARMFUL for row in self.rows) / len(self.rows)
            split = {Label.HARMFUL: harmful, Label.HARMLESS: 1 - harmful}
            prompts = [
                row
                for label in Label
                for row in self.cycles[f"prompt-{label}"].take_rows(max(1, round(2 * count * split[label])))
            ]
        answers = [
            row
            for label in Label
            if answers_each and f"answer-{label}" in self.cycles
            for row in self.cycles[f"answer-{label}"].take_rows(answers_each)
        ]
        return prompts + answers

    def _train_once(self) -> TeacherTerms:
        runtime, config = self.runtime, self.config
        rows = self._next_rows()
        mine = share(rows, runtime.rank, runtime.world_size)
        # Prompts and answered rows apart: the former stop at the feature's layer.
        batches = [
            batch
            for group in ([r for r in mine if not r.trained_tokens], [r for r in mine if r.trained_tokens])
            for batch in micro_batches(
                group, config.micro_batch_tokens, self.trainable_model.chat.pad_id, runtime.device
            )
        ]
        progress = (self.step + 0.5) / self.total_steps
        set_learning_rate(
            self.optimizer, learning_rate_at(progress, config.optimizer.learning_rate, config.optimizer.warmup)
        )
        terms = teacher_step(
            self.trainable_model.forward,
            batches or [dummy_batch(self.trainable_model.chat.pad_id, runtime.device)],
            self.running,
            self.layer,
            config.separation_weight if config.feature == "trained" else 0.0,
            runtime.all_reduce,
            refresh=self.step % config.refresh_every == 0,
        )
        parameters = list(trainable(self.trainable_model.model).values())
        if runtime.world_size > 1:
            reduce_gradients(parameters, runtime.all_reduce)
        clip_gradients(parameters, config.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.rows_seen += len(rows)
        return terms

    @contextmanager
    def _scoring(self, mix: float) -> Iterator[nn.Module]:
        """The model as a filter would run it that reads so much of the adapter."""
        model = self.trainable_model.model
        training = model.training
        model.eval()
        try:
            with mixed(model, mix):
                yield model
        finally:
            model.train(training)

    def _sweep(self, mix: float) -> dict[int, tuple[Tensor, Tensor]]:
        """Per layer R_l over the reference prompts and the scores of the validation prompts, with present weights."""
        pad_id, device = self.trainable_model.chat.pad_id, self.runtime.device
        with self._scoring(mix) as model:
            reference = prompt_features(model, self.reference, self.layers, pad_id, device)
            validation = prompt_features(model, self.pieces, self.layers, pad_id, device)
        scored = scores_by_layer(reference, labels_of(self.reference), validation)
        count = len(self.validation)
        return {layer: (refusal_D, highest(score, self.owner, count)) for layer, (refusal_D, score) in scored.items()}

    def _best_layer(self, swept: dict[int, tuple[Tensor, Tensor]]) -> int:
        label_B = labels_of(self.validation)
        return max(swept, key=lambda number: separation(swept[number][1], label_B))

    def _ranking(self, swept: dict[int, tuple[Tensor, Tensor]]) -> float:
        """AUROC on the validation prompts at the best layer."""
        return max(auroc(score_B, labels_of(self.validation)) for _, score_B in swept.values())

    def _read(self) -> tuple[float, dict[int, tuple[Tensor, Tensor]]]:
        """The most of the adapter that ranks no worse than the base alone, and the layers with it."""
        for mix in self.mixes[:-1]:
            swept = self._sweep(mix)
            if self._ranking(swept) >= self.base_auroc - self.config.tolerance:
                return mix, swept
        return self.mixes[-1], self._sweep(self.mixes[-1])

    def _evaluate(self) -> None:
        if self.config.feature == "base":
            # Nothing that is trained changes a score.
            return
        found = self._ranking(self._read()[1])
        self.best_auroc = max(self.best_auroc, found)
        # A ranking saturates long before the teacher refuses well: of checkpoints that rank alike the latest counts.
        if found >= self.best_auroc - self.config.tolerance:
            self.best_step, self.stale = self.step, 0
            self.best = {name: whole(p).clone() for name, p in trainable(self.trainable_model.model).items()}
        else:
            self.stale += 1

    def _export(self, out: Path) -> RefTeacher:
        """Choose the layer on validation prompts, freeze R_l, set thresholds and calibration, write the artefact."""
        if self.best:
            restore_weights(self.trainable_model.model, self.best)
        label_B = labels_of(self.validation)
        mix, swept = self._read()
        layer = self._best_layer(swept)
        refusal_D, score_B = swept[layer]
        thresholds = choose_thresholds(score_B, label_B, self.config.thresholds.targets)
        base = self.trainable_model.base
        manifest = Manifest(
            base_name=base.name,
            base_fingerprint=base.fingerprint,
            template_hash=self.trainable_model.chat.hash,
            layer=layer,
            width=base.width,
            weights=self.config.weights,
            thresholds=thresholds,
            calibration=fit_calibration(score_B, label_B),
            quality=filter_quality(score_B, label_B, thresholds),
            per_source=per_source(self.data.validation, score_B, thresholds.block),
            window_tokens=self.windows.size,
            feature=self.config.feature,
            feature_mix=mix,
            response_offset=self._response_offset(mix, layer, refusal_D, thresholds.review),
            histogram=torch.histc(score_B, HISTOGRAM_BINS, -1.0, 1.0).long().tolist(),
            config={
                **self.config.model_dump(mode="json"),
                "steps": self.best_step or self.step,
                "sweep_auroc": {str(k): auroc(scores, label_B) for k, (_, scores) in swept.items()},
            },
        )
        return save_teacher(out, self.trainable_model.model, manifest, refusal_D)

    def _response_offset(self, mix: float, layer: int, refusal_D: Tensor, review: float) -> float:
        """`core.quality.response_offset` of the training rows' answers, scored as texts of their own.

        Refusals count as harmless answers. Without any answered row the offset lets no answer be withheld.
        """
        answers = sample_answers(
            (*self.data.train, *self.data.answers), self.config.reference_prompts, self.config.seed
        )
        if not answers:
            return 2.0
        encode, pad_id = self.trainable_model.chat.encode, self.trainable_model.chat.pad_id
        pieces, owner = self.windows.split_all([encode(Example(chat(text))) for text in answers])
        with self._scoring(mix) as model:
            feature_WD = prompt_features(model, pieces, [layer], pad_id, self.runtime.device)[layer]
        score_B = highest(refusal_score(feature_WD, refusal_D), owner, len(answers))
        return response_offset(score_B, review, self.config.thresholds.answer_fpr)

    def _report(self, terms: TeacherTerms | None, seconds: float, last: bool = False) -> None:
        due = last or self.step % self.config.checkpoint_every == 0
        if not (due or self.step % self.config.log_every == 0 or self.step in (1, self.total_steps)):
            return
        metrics: dict[str, object] = {
            "step": self.step,
            "progress": 1.0 if last else self.step / self.total_steps,
            "step_seconds": seconds,
            "alignment_rows": self.rows_seen,
            "validation_auroc": self.best_auroc if self.best else None,
            **(asdict(terms) | {"cross_entropy": terms.refusal + terms.helpful} if terms else {}),
        }
        if last:
            metrics["note"] = self.skipped.note
        if not due:
            self.runtime.report(metrics)
            return
        tensors = gather_state(self.trainable_model.model, self.optimizer)
        tensors["running"] = self.running.state_dict()
        if self.best:
            tensors["best"] = self.best
        state = {
            "step": self.step,
            "rows_seen": self.rows_seen,
            "best_auroc": self.best_auroc,
            "best_step": self.best_step,
            "stale": self.stale,
            "positions": {name: cycle.position for name, cycle in self.cycles.items()},
            "config": self.config.model_dump(mode="json"),
            "inputs": self.inputs,
        }

        def write(folder: Path) -> None:
            write_state(folder, self.runtime.rank, tensors, state)
            if last and self.runtime.rank == 0:
                self._export(folder / EXPORT)

        self.runtime.report(metrics, write)

    def _resume(self) -> None:
        folder = self.runtime.latest_checkpoint()
        if folder is None:
            return
        groups, state = restore(
            folder, self.runtime.rank, self.config, self.inputs, self.trainable_model.model, self.optimizer
        )
        self.running.load_state_dict({k: v.to(self.runtime.device) for k, v in groups["running"].items()})
        self.best = groups.get("best", {})
        self.step, self.stale, self.rows_seen = state["step"], state["stale"], state["rows_seen"]
        self.best_auroc, self.best_step = state["best_auroc"], state["best_step"]
        for name, position in state["positions"].items():
            self.cycles[name].position = position


def _sample_per_class(rows: Sequence[TokenizedExample], count: int, seed: int) -> list[TokenizedExample]:
    chosen: list[TokenizedExample] = []
    for label in Label:
        of_class = [row for row in rows if row.label == label]
        random.Random(f"{seed}/reference/{label}").shuffle(of_class)  # noqa: S311
        chosen += of_class[: max(1, count // 2)]
    return chosen


def sample_answers(rows: Sequence[Example], count: int, seed: int) -> list[str]:
    """At most `count` answers of `rows`, drawn: the first rows of a file that is sorted hold refusals alone."""
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
