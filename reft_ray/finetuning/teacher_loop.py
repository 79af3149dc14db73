"""Stage 1 on one rank: `core.teacher` over labelled prompts, early stopping on other sources, and the artefact."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from reft_ray.core.batch import Batch, TokenizedExample, answered, dummy_batch, micro_batches
from reft_ray.core.conversation import Example, Label
from reft_ray.core.errors import ReftError
from reft_ray.core.forward import single_rank
from reft_ray.core.geometry import Geometry, Readout
from reft_ray.core.optimization import learning_rate_at, optimizer_step, set_learning_rate
from reft_ray.core.refusal import RunningRefusal
from reft_ray.core.teacher import Regulariser, class_sums, teacher_step
from reft_ray.finetuning.checkpoint import (
    TrainState,
    gather_state,
    gather_weights,
    restore,
    restore_weights,
    trainable,
    write_state,
)
from reft_ray.finetuning.config import TeacherConfig
from reft_ray.finetuning.encoding import encode_rows
from reft_ray.finetuning.export import EXPORT
from reft_ray.finetuning.model import TrainableModel, load_trainable, shard_trainable, start_from
from reft_ray.finetuning.prompts import check_labels, sources_of
from reft_ray.finetuning.rows import CyclingSampler, SamplerState, digest_of, rank_slice
from reft_ray.finetuning.runtime import Runtime
from reft_ray.finetuning.sharding import as_many_as_others, is_sharded, reshard, save_shards
from reft_ray.finetuning.teacher_answers import best_share
from reft_ray.finetuning.teacher_filter import FilterChoice, FilterSelection, StageProgress, sample_answers
from reft_ray.hf.lora import scale_adapter
from reft_ray.hf.ref_teacher import Manifest
from reft_ray.hf.training import optimizer_of

TEACHER = "teacher"
EVALUATIONS = 5
EVALUATION_SHARE = 0.1
"""Evaluations during training take about this share of its time."""
MIN_PROMPTS = 64
START_PROMPTS = 800
"""Reference prompts from which REG's readout is fitted before training; the filter's own is fitted to all of them."""


@dataclass(frozen=True, slots=True)
class TeacherData:
    """Labelled prompts to learn from (with answers where there are any), and validation prompts of other sources.

    `answers` are further answered rows: the cross entropy learns from them, and so does REG if features are trained;
    their prompts take no part in the R_l that is kept. `sources` are those of the model card, by default counted from
    the rows.
    """

    train: Sequence[Example]
    validation: Sequence[Example]
    answers: Sequence[Example] = ()
    sources: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        check_labels(self.train, "training")
        check_labels(self.validation, "validation")

    @property
    def card_sources(self) -> list[dict[str, Any]]:
        """The sources as the manifest has them."""
        if self.sources:
            return [dict(source) for source in self.sources]
        uses = {"training": self.train, "validation": self.validation, "answers": self.answers}
        return [source for use, rows in uses.items() for source in sources_of(rows, use)]


def train_teacher(runtime: Runtime, config: TeacherConfig, data: TeacherData, sharded: bool = False) -> None:
    """Prepare a Ref-Teacher; the last checkpoint that is reported contains its artefact under `export/`.

    A `sharded` run spreads its weights over the ranks.

    Raises ReftError if the rows do not suffice, or a loss or gradient is not finite.
    """
    torch.manual_seed(config.seed + runtime.rank)
    model = load_trainable(config, runtime, TEACHER, sharded)
    if config.adapter:
        start_from(model, Path(config.adapter), TEACHER)
    if sharded:
        model = shard_trainable(model, config, runtime)
    if config.weights == "none" or config.adapter:
        build_teacher(runtime, config, model, data)
    else:
        TeacherRun(runtime, config, model, data).train()


def build_teacher(runtime: Runtime, config: TeacherConfig, model: TrainableModel, data: TeacherData) -> None:
    """A Ref-Teacher from an aligned model or a trained adapter, without training: refusal feature and thresholds."""
    train = encode_rows(model.chat, data.train, model.max_tokens)
    validation = encode_rows(model.chat, data.validation, model.max_tokens, train.skipped)
    selection = FilterSelection(config, model, runtime, train, validation)
    answers = (*train.rows, *data.answers)
    if runtime.world_size == 1:
        stages = {
            "reference prompts": len(selection.reference),
            "validation prompts": len(validation.encoded),
            "answers": len(sample_answers(answers, config.answer_sample, config.seed)),
        }
        selection.progress = StageProgress(stages, runtime.report)
    chosen = selection.choose(selection.mixes()[0])
    manifest = replace(selection.manifest(chosen, 0, answers), sources=data.card_sources)
    weights = gather_weights(model.model, runtime.rank) if is_sharded(model.model) else None

    def write(folder: Path) -> None:
        if runtime.rank == 0:
            selection.save(folder / EXPORT, chosen, manifest, weights)

    runtime.report({"step": 0, "progress": 1.0, "note": train.skipped.note}, write)


def equal_shares(rows: Sequence[TokenizedExample], sources: Sequence[str]) -> list[TokenizedExample]:
    """Rows of every source and label as often as those of the largest source with that label, by repeating them.

    A direction learned mostly from one large source separates that source, not harm.
    """
    groups: dict[tuple[str, Label | None], list[TokenizedExample]] = {}
    for row, source in zip(rows, sources, strict=True):
        groups.setdefault((source, row.label), []).append(row)
    largest = {label: max(len(g) for (_, other), g in groups.items() if other == label) for _, label in groups}
    return [row for (_, label), group in groups.items() for row in islice(cycle(group), largest[label])]


@dataclass
class TeacherState(TrainState):
    """Rows so far, the samplers' positions, and the best checkpoint; `stale` evaluations have not improved on it."""

    rows_seen: int = 0
    best_auroc: float = 0.0
    best_step: int = 0
    stale: int = 0
    samplers: dict[str, SamplerState] = field(default_factory=dict)

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Self:
        """The state of a checkpoint."""
        samplers = {name: SamplerState(**state) for name, state in saved["samplers"].items()}
        return cls(**{**saved, "samplers": samplers})


class TeacherRun:
    """A run on one rank: its rows, its optimiser, its TrainState, and the best weights so far."""

    def __init__(
        self, runtime: Runtime, config: TeacherConfig, trainable_model: TrainableModel, data: TeacherData
    ) -> None:
        self.runtime, self.config, self.trainable_model = runtime, config, trainable_model
        self.sharded = is_sharded(trainable_model.model)
        train = encode_rows(trainable_model.chat, data.train, trainable_model.max_tokens)
        validation = encode_rows(trainable_model.chat, data.validation, trainable_model.max_tokens, train.skipped)
        further = encode_rows(trainable_model.chat, data.answers, trainable_model.max_tokens, train.skipped)
        self.inputs = {
            "set of training prompts": digest_of(data.train),
            "set of validation prompts": digest_of(data.validation),
            "set of answers": digest_of(data.answers),
        }
        # This checks again that both labels are there: rows may have been skipped.
        self.data = TeacherData(train.rows, validation.rows, further.rows, data.card_sources)
        self.skipped = train.skipped
        self.rows = train.encoded
        self.answered = answered(train.encoded + further.encoded)
        self.selection = FilterSelection(config, trainable_model, runtime, train, validation)
        self.layer = self.selection.layer
        learned = self.rows if config.feature == "trained" else self.answered
        if not learned:
            raise ReftError("feature=base learns from answers alone, and no row has one: add refusals and answers")
        self.total_steps = max(1, round(config.epochs * len(learned) / config.batch_rows))
        self.evaluate_every = config.evaluate_every or max(1, self.total_steps // EVALUATIONS)
        # An evaluation runs forward only, in the lower half of the layers, and takes two samples of prompts.
        rows = self.total_steps * config.batch_rows
        self.evaluation_prompts = max(MIN_PROMPTS, round(EVALUATION_SHARE * 3 * rows / EVALUATIONS))
        settings = config.optimizer
        self.optimizer = optimizer_of(
            trainable(trainable_model.model).values(), settings.learning_rate, settings.weight_decay, settings.states
        )
        self.running = RunningRefusal(config.feature_decay)
        # What REG acts on in other geometries than plain; fixed at the start.
        self.readout: Readout | None = None
        self.state = TeacherState()
        # Of a sharded model rank 0 has them alone.
        self.best: dict[str, Tensor] = {}

    def _samplers(self) -> dict[str, CyclingSampler]:
        """Prompts per class for REG (all of them), and answered rows per class for the cross entropy."""
        groups = {"answer": self.answered}
        if self.config.feature == "trained":
            prompts = [row.prompt_only() for row in self.rows]
            sources = [row.source for row in self.data.train]
            groups["prompt"] = equal_shares(prompts, sources) if self.config.balanced_sources else prompts
        samplers = {}
        for name, rows in groups.items():
            for label in Label:
                if of_label := [row for row in rows if row.label == label]:
                    state = self.state.samplers.setdefault(f"{name}-{label}", SamplerState())
                    samplers[f"{name}-{label}"] = CyclingSampler(
                        of_label, f"{self.config.seed}/{name[0]}/{label}", state
                    )
        return samplers

    def train(self) -> None:
        """Train until the steps are done or the validation prompts stop improving; ends with the best weights."""
        self._resume()
        state, config = self.state, self.config
        if config.feature == "trained" and config.geometry is not Geometry.PLAIN and self.readout is None:
            self.readout = self.selection.readout(self.layer, START_PROMPTS).to(self.runtime.device)
        self.samplers = self._samplers()
        while state.step < self.total_steps and state.stale < config.patience:
            started = time.perf_counter()
            terms = self._train_once()
            seconds = time.perf_counter() - started
            if state.step % self.evaluate_every == 0 or state.step == self.total_steps:
                self._evaluate()
            if state.step < self.total_steps and state.stale < config.patience:
                self._report(terms, seconds)
        self._report({}, 0.0, last=True)

    def _next_rows(self) -> list[TokenizedExample]:
        config = self.config
        count = config.batch_rows // 2
        answers_each = round(count * config.answered_rows)
        prompts_each = dict.fromkeys(Label, max(1, count))
        if config.feature == "base" or config.answered_rows == 1:
            answers_each, prompts_each = count, {}
        elif not config.balanced:
            harmful = sum(row.label == Label.HARMFUL for row in self.rows) / len(self.rows)
            shares = {Label.HARMFUL: harmful, Label.HARMLESS: 1 - harmful}
            prompts_each = {label: max(1, round(2 * count * shares[label])) for label in Label}
        prompts = [row for label, n in prompts_each.items() for row in self.samplers[f"prompt-{label}"].take_rows(n)]
        answers = [
            row
            for label in Label
            if answers_each and f"answer-{label}" in self.samplers
            for row in self.samplers[f"answer-{label}"].take_rows(answers_each)
        ]
        return prompts + answers

    def _train_once(self) -> dict[str, float]:
        """One optimiser step; returns its terms over all ranks."""
        runtime, config, state = self.runtime, self.config, self.state
        model = self.trainable_model
        rows = self._next_rows()
        mine = rank_slice(rows, runtime.rank, runtime.world_size)
        # Prompts and answered rows in separate batches: the former stop at the feature's layer.
        prompts = self._micro_batches([row for row in mine if not row.trained_tokens])
        answers = self._micro_batches(answered(mine))
        if not prompts and not answers:
            prompts = [dummy_batch(model.chat.pad_id, runtime.device)]
        batches = prompts + answers
        progress = (state.step + 0.5) / self.total_steps
        set_learning_rate(
            self.optimizer, learning_rate_at(progress, config.optimizer.learning_rate, config.optimizer.warmup)
        )
        plain = config.feature == "trained" and config.geometry is Geometry.PLAIN
        if plain and self.running.refusal_D is None:
            self.running.update(class_sums(model.forward, batches, self.layer).reduced(runtime.all_reduce))
        terms, sums = teacher_step(
            model.forward, batches, self.layer, self._regulariser(), runtime.all_reduce, len(prompts)
        )
        if plain and state.step % config.refresh_every == 0:
            self.running.update(sums.reduced(runtime.all_reduce))
        reduces_gradients = runtime.world_size > 1 and not self.sharded
        found = optimizer_step(
            self.optimizer,
            list(trainable(model.model).values()),
            terms.shares,
            state.step + 1,
            config.optimizer.max_grad_norm,
            runtime.all_reduce,
            runtime.all_reduce if reduces_gradients else single_rank,
        )
        state.step += 1
        state.rows_seen += len(rows)
        return {name: found[name] for name in terms.shares}

    def _micro_batches(self, rows: Sequence[TokenizedExample]) -> list[Batch]:
        """Rows of one kind as micro-batches, under sharding as many on every rank."""
        model, device = self.trainable_model, self.runtime.device
        batches = micro_batches(rows, model.micro_batch_tokens, model.chat.pad_id, device, model.packed)
        return as_many_as_others(batches, model.chat.pad_id, self.runtime) if self.sharded else batches

    def _regulariser(self) -> Regulariser:
        config = self.config
        if config.geometry is not Geometry.PLAIN:
            return Regulariser(self.readout, config.separation_weight, config.margin)
        refusal_D = self.running.refusal_D
        return Regulariser(None if refusal_D is None else Readout(refusal_D), config.separation_weight)

    def _evaluate(self) -> None:
        if self.config.feature == "base":
            # Training changes no score.
            return
        state = self.state
        found = self.selection.quick_auroc(self.evaluation_prompts)
        state.best_auroc = max(state.best_auroc, found)
        # A ranking saturates long before the teacher refuses well: of checkpoints that rank alike the latest counts.
        if found >= state.best_auroc - self.config.tolerance:
            state.stale = 0
            self._keep_best()
        else:
            state.stale += 1

    def _keep_best(self) -> None:
        self.state.best_step = self.state.step
        self.best = gather_weights(self.trainable_model.model, self.runtime.rank)

    def _choose(self) -> tuple[FilterChoice, Manifest]:
        """What the filter reads of the best weights: the largest share of the adapter that ranks no worse than none."""
        model = self.trainable_model.model
        if self.state.best_step:
            restore_weights(model, self.best)
        if len(self.config.answer_shares) > 1:
            share = best_share(self.trainable_model, self.data.validation, self.config.answer_shares)
            reshard(model)
            # Rank 0's choice: answers may differ in rounding.
            mine = torch.tensor([share if self.runtime.rank == 0 else 0.0], dtype=torch.float64)
            scale_adapter(model, self.runtime.all_reduce(mine).item())
        mix, *smaller = self.selection.mixes()
        if smaller:
            base = self.selection.quick_auroc(self.evaluation_prompts, 0.0)
            while smaller and self.selection.quick_auroc(self.evaluation_prompts, mix) < base - self.config.tolerance:
                mix = smaller.pop(0)
        chosen = self.selection.choose(mix)
        steps = self.state.best_step or self.state.step
        manifest = self.selection.manifest(chosen, steps, (*self.data.train, *self.data.answers))
        return chosen, replace(manifest, sources=self.data.card_sources)

    def _report(self, terms: Mapping[str, float], seconds: float, last: bool = False) -> None:
        state = self.state
        due = last or state.step % self.config.checkpoint_every == 0
        if not (due or state.step % self.config.log_every == 0 or state.step in (1, self.total_steps)):
            return
        metrics: dict[str, object] = {
            "step": state.step,
            "progress": 1.0 if last else state.step / self.total_steps,
            "step_seconds": seconds,
            "alignment_rows": state.rows_seen,
            "validation_auroc": state.best_auroc or None,
            **terms,
        }
        if terms:
            metrics["cross_entropy"] = terms["refusal"] + terms["helpful"]
        if last:
            metrics["note"] = self.skipped.note
        if not due:
            self.runtime.report(metrics)
            return
        model = self.trainable_model.model
        if last and self.sharded and not state.best_step:
            # The shards are written after the choice, which scales them.
            self._keep_best()
        # Ranks write their shards.
        tensors = {} if self.sharded else gather_state(model, self.optimizer)
        tensors |= {"running": self.running.state_dict(), "best": self.best}
        tensors["readout"] = self.readout.tensors() if self.readout else {}
        saved = asdict(state)
        # All ranks take part in the choice, one writes.
        final = self._choose() if last else None
        weights = gather_weights(model, self.runtime.rank) if last and self.sharded else None

        def write(folder: Path) -> None:
            if self.sharded:
                save_shards(folder, trainable(model), self.optimizer)
            write_state(folder, self.runtime.rank, tensors, saved, self.config, self.inputs)
            if final and self.runtime.rank == 0:
                self.selection.save(folder / EXPORT, *final, weights)

        self.runtime.report(metrics, write)

    def _resume(self) -> None:
        folder = self.runtime.latest_checkpoint()
        if folder is None:
            return
        model = self.trainable_model.model
        tensors, saved = restore(folder, self.runtime.rank, self.config, self.inputs, model, self.optimizer)
        running = tensors.get("running", {})
        self.running.load_state_dict({label: mean.to(self.runtime.device) for label, mean in running.items()})
        self.best = {} if self.sharded and self.runtime.rank else tensors.get("best", {})
        if readout := tensors.get("readout"):
            self.readout = Readout.from_tensors(readout).to(self.runtime.device)
        self.state = TeacherState.of(saved)
