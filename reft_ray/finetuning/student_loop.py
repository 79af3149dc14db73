"""Stage 2 on one rank: `core.guided` over a stream of rows, with checkpoints that resume at the exact row."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn

from reft_ray.core.batch import Batch, TokenizedExample, answered, collate, micro_batches
from reft_ray.core.conversation import Example
from reft_ray.core.errors import ReftError
from reft_ray.core.forward import single_rank
from reft_ray.core.guided import Distillation
from reft_ray.core.losses import cross_entropy_sum, held_out
from reft_ray.core.optimization import learning_rate_at, optimizer_step, set_learning_rate
from reft_ray.finetuning.best import BestState, BestWeights
from reft_ray.finetuning.checkpoint import TrainState, gather_state, gather_weights, restore, trainable, write_state
from reft_ray.finetuning.config import FinetuneConfig
from reft_ray.finetuning.encoding import (
    Row,
    SkippedRows,
    alignment_rows,
    answers_of,
    encode,
    encode_rows,
    pairs_of,
)
from reft_ray.finetuning.export import ADAPTER, EXPORT, export_student
from reft_ray.finetuning.model import (
    STUDENT,
    TrainableModel,
    load_trainable,
    shard_trainable,
    start_from,
    start_from_teacher,
)
from reft_ray.finetuning.preference import AtStart, weights_at_start
from reft_ray.finetuning.rows import (
    CyclingSampler,
    RowSource,
    SamplerState,
    global_batches,
    rank_slice,
    shuffled,
)
from reft_ray.finetuning.runtime import Runtime
from reft_ray.finetuning.sharding import as_many_as_others, save_shards
from reft_ray.finetuning.steps import step_of
from reft_ray.finetuning.targets import distillation_of
from reft_ray.hf.compute import keep_faster_threads
from reft_ray.hf.forward import ModelForward
from reft_ray.hf.lora import is_adapted
from reft_ray.hf.ref_teacher import RefTeacher
from reft_ray.hf.soft_targets import rows_key
from reft_ray.hf.training import optimizer_of

_KEPT_REPORTS = 500
"""At most this many of the last reports are kept in a checkpoint. A listener may have died before it received them, so
the first report after a restart repeats them as `earlier`."""
_TRIAL_TOKENS = 256
"""Threads gain less on shorter passes than on those of a run; a longer one takes seconds on a slow CPU."""


def train_student(
    runtime: Runtime,
    config: FinetuneConfig,
    rows: RowSource,
    alignment: Sequence[Example] = (),
    teacher: RefTeacher | None = None,
    targets_folder: Path | None = None,
    sharded: bool = False,
    validation: Sequence[Example] = (),
    identity: str = "",
) -> TrainableModel:
    """Finetune a student on rows that were screened already; returns it trained.

    `alignment` and `teacher` are needed by methods that distil, `targets_folder` by cached soft labels (see
    `finetuning.targets`). `validation` rows are not learned; their figures are in the reports of checkpoints.
    `identity` identifies the rows: a checkpoint of other rows is not resumed.
    Raises ReftError if one is missing, no row can be trained on, or a loss or gradient is not finite.
    """
    runtime.phase("loading")
    torch.manual_seed(config.seed + runtime.rank)
    if not validation and (config.select == "best" or config.patience):
        raise ReftError("select=best and patience compare checkpoints on validation rows: there are none")
    if sharded and (config.step != "guided" or config.loss == "dpo"):
        kept = "loss=dpo" if config.loss == "dpo" else f"step={config.step}"
        raise ReftError(f"{kept} keeps whole weights: use strategy=data_parallel")
    trainable_model = load_trainable(config, runtime, STUDENT, sharded)
    if config.init == "aligned":
        start_from_teacher(trainable_model, teacher)
    if config.init_adapter:
        start_from(trainable_model, Path(config.init_adapter))
    aligned: list[TokenizedExample] = []
    distillation, skipped = Distillation(), SkippedRows()
    inputs = {"dataset": identity, "Ref-Teacher": teacher.id if teacher else "", "alignment set": ""}
    if config.method.distills:
        aligned, skipped = alignment_rows(trainable_model.chat, alignment, trainable_model.max_tokens)
        if not aligned:
            raise ReftError("distillation needs alignment rows with answers that fit the model's context")
        inputs["alignment set"] = rows_key(aligned)
        distillation = distillation_of(config, trainable_model, aligned, teacher, targets_folder)
    at_start = None
    if config.loss == "dpo":
        start = teacher.folder / "adapter" if teacher and config.init == "aligned" else config.init_adapter
        at_start = weights_at_start(trainable_model.model, Path(start) if start else None)
    if sharded:
        trainable_model = shard_trainable(trainable_model, config, runtime)
    run = StudentRun(runtime, config, trainable_model, rows, aligned, distillation, sharded, at_start)
    run.inputs = inputs
    run.alignment_note = skipped.note
    run.validation = answered(encode_rows(trainable_model.chat, validation, trainable_model.max_tokens).encoded)
    run.train()
    return trainable_model


@dataclass
class StudentState(TrainState):
    """Rows and tokens so far, the position among the alignment rows, and the last reports."""

    rows_done: int = 0
    tokens_done: int = 0
    row_tokens: int = 0
    user_tokens: int = 0
    alignment_rows: int = 0
    alignment_tokens: int = 0
    skipped: SkippedRows = field(default_factory=SkippedRows)
    sampler: SamplerState = field(default_factory=SamplerState)
    reports: list[dict[str, Any]] = field(default_factory=list)
    best: BestState = field(default_factory=BestState)
    micro_batch_tokens: int = 0
    threads: int = 0

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Self:
        """The state of a checkpoint."""
        nested: dict[str, Any] = {
            "skipped": SkippedRows(**saved["skipped"]),
            "sampler": SamplerState(**saved["sampler"]),
            "best": BestState(**saved["best"]),
        }
        return cls(**{**saved, **nested})


class StudentRun:
    """A run on one rank: its data, its optimiser and its TrainState."""

    def __init__(
        self,
        runtime: Runtime,
        config: FinetuneConfig,
        trainable_model: TrainableModel,
        rows: RowSource,
        aligned: Sequence[TokenizedExample],
        distillation: Distillation,
        sharded: bool,
        at_start: AtStart | None = None,
    ) -> None:
        self.runtime, self.config, self.trainable_model = runtime, config, trainable_model
        self.rows, self.aligned, self.sharded = rows, aligned, sharded
        self.model: nn.Module = trainable_model.model
        settings = config.optimizer
        self.optimizer = optimizer_of(
            trainable(self.model).values(), settings.learning_rate, settings.weight_decay, settings.states
        )
        self.state = StudentState()
        self.best = BestWeights(config, self.state.best)
        self.inputs: dict[str, str] = {}
        self.alignment_note = ""
        self.validation: list[TokenizedExample] = []
        self.earlier: list[dict[str, Any]] = []
        self.total_rows = round(config.epochs * len(rows))
        if self.total_rows < 1:
            raise ReftError("no rows to train on: screening kept none, or the dataset is empty")
        make = pairs_of if config.loss == "dpo" else answers_of
        self.sequences = make(trainable_model.chat, trainable_model.max_tokens)
        self.alignment_steps = config.alignment_steps(len(rows))
        self.steps = config.total_steps(len(rows))
        self.train_step = step_of(config, self.model, distillation, runtime.all_reduce, self.steps, at_start)

    def train(self) -> None:
        """Train to the end or until asked to stop, from the latest checkpoint if there is one."""
        self._resume()
        state = self.state
        self._fit_machine()
        self.runtime.phase("training", self._progress(state.rows_done))
        self.sampler = (
            CyclingSampler(self.aligned, f"{self.config.seed}/alignment", state.sampler) if self.aligned else None
        )
        terms: dict[str, Any] = {}
        while state.step < self.alignment_steps:
            started = time.perf_counter()
            terms = self._train_on(())
            if self._report_and_check_stop(terms, started):
                return
        trained = state.step
        while state.rows_done < self.total_rows and not self.best.exhausted:
            epoch, position = divmod(state.rows_done, len(self.rows))
            order = shuffled(self.rows, self.config.shuffle_rows, f"{self.config.seed}/{epoch}")
            for batch in global_batches(order, self.config.batch_rows, skip=position):
                started = time.perf_counter()
                self._refuse_unscreened(state.rows_done + len(batch) - (epoch + 1) * len(self.rows))
                terms = self._train_on(batch[: self.total_rows - state.rows_done])
                if state.rows_done >= self.total_rows:
                    break
                if self._report_and_check_stop(terms, started):
                    return
                if self.best.exhausted:
                    break
            if state.step == trained:
                self._report_mismatch(missing_rows=len(self.rows) - position)
                raise ReftError(f"the dataset ended at row {position} of {len(self.rows)}: it is not what was screened")
            trained = state.step
        if not state.user_tokens:
            raise ReftError(state.skipped.note or "no row has an answer to learn")
        self.runtime.phase("export")
        self._report(terms, 0.0, last=True)

    def _fit_machine(self) -> None:
        """Choose micro-batch and threads, or keep those of the checkpoint: the sums of a step depend on them."""
        state = self.state
        state.micro_batch_tokens = state.micro_batch_tokens or self.trainable_model.micro_batch_tokens
        if self.sharded:
            return
        if self.runtime.device.type == "cpu":
            state.threads = keep_faster_threads(self._usual_pass, state.threads)

    def _usual_pass(self) -> None:
        """Forward and backward of a row as long as a micro-batch or less: what `keep_faster_threads` measures."""
        length = min(self.state.micro_batch_tokens, self.trainable_model.max_tokens, _TRIAL_TOKENS)
        with torch.random.fork_rng():
            row = TokenizedExample([self.trainable_model.chat.pad_id] * length, [True] * length, 0)
            batch = collate([row], self.trainable_model.chat.pad_id)
            loss = cross_entropy_sum(ModelForward(self.model).predictions(batch), batch.labels_N)
            torch.autograd.grad(loss, list(trainable(self.model).values()))

    def _report_and_check_stop(self, terms: Mapping[str, Any], started: float) -> bool:
        """Report a step; returns whether the run is asked to stop, after saving its state if so."""
        step, share = self.state.step, self._progress(self.state.rows_done)
        self.runtime.phase("training", share, f"step {step} of {self.steps}, loss {terms['loss']:.3f}")
        stop = self.runtime.stop_asked()
        self._report(terms, time.perf_counter() - started, save=stop)
        return stop

    def _progress(self, rows: float) -> float:
        """The share of the run that is done after `rows` user rows; a step without any counts as a whole batch."""
        alone = self.alignment_steps * self.config.batch_rows
        return (min(self.state.step * self.config.batch_rows, alone) + rows) / (alone + self.total_rows)

    def _refuse_unscreened(self, surplus: int) -> None:
        """Stop before the first row that the screening did not count."""
        if surplus > 0:
            self._report_mismatch(unscreened_rows=surplus)
            raise ReftError(f"the dataset has more than the {len(self.rows)} rows that were screened")

    def _report_mismatch(self, **counts: int) -> None:
        self.runtime.report({"step": self.state.step, "progress": self._progress(self.state.rows_done), **counts})

    def _train_on(self, batch: Sequence[Row]) -> dict[str, Any]:
        """One optimiser step on a global batch of user rows; returns its terms over all ranks, for the report."""
        config, state = self.config, self.state
        # Rows are counted in the first epoch only: the others repeat them.
        counted = state.skipped if state.rows_done < len(self.rows) else SkippedRows()
        encoded = encode(self.sequences, batch, counted)
        tokens = sum(map(len, encoded))
        streams = self.train_step.streams
        aligned: list[TokenizedExample] = []
        if self.sampler and streams.alignment:
            if batch:
                aligned = self.sampler.take_tokens(tokens * config.alignment_ratio)
            else:
                aligned = self.sampler.take_rows(max(1, round(config.batch_rows * config.alignment_ratio)))
        if not streams.user:
            encoded, tokens = [], 0
        progress = self._progress(state.rows_done + len(batch) / 2)
        set_learning_rate(
            self.optimizer, learning_rate_at(progress, config.optimizer.learning_rate, config.optimizer.warmup)
        )
        terms = self.train_step(self._micro_batches(answered(encoded)), self._micro_batches(answered(aligned)))
        reduces_gradients = self.runtime.world_size > 1 and not self.sharded
        found = optimizer_step(
            self.optimizer,
            list(trainable(self.model).values()),
            terms.shares,
            state.step + 1,
            config.optimizer.max_grad_norm,
            self.runtime.all_reduce,
            self.runtime.all_reduce if reduces_gradients else single_rank,
        )
        state.step += 1
        state.rows_done += len(batch)
        state.tokens_done += tokens + sum(map(len, aligned))
        state.row_tokens += tokens
        state.user_tokens += terms.user_tokens
        state.alignment_rows += len(aligned)
        state.alignment_tokens += terms.alignment_tokens
        metrics = {"loss": found["loss"], "distill": found["distill"]}
        if terms.user_tokens:
            metrics["task"] = found["task"]
            if "correct" in found:
                metrics["accuracy"] = found["correct"] / terms.user_tokens
        return metrics | {"soft_labels": config.labels == "soft" and terms.alignment_tokens > 0}

    def _micro_batches(self, rows: Sequence[TokenizedExample]) -> list[Batch]:
        """This rank's rows of a global batch as micro-batches.

        Under sharding every rank gets the same number, because all ranks gather a layer at once.
        """
        runtime, pad_id = self.runtime, self.trainable_model.chat.pad_id
        mine = rank_slice(rows, runtime.rank, runtime.world_size)
        tokens, packed = self.state.micro_batch_tokens, self.trainable_model.packed
        batches = micro_batches(mine, tokens, pad_id, runtime.device, packed)
        return as_many_as_others(batches, pad_id, runtime) if self.sharded else batches

    def _report(self, terms: Mapping[str, Any], seconds: float, last: bool = False, save: bool = False) -> None:
        config, state = self.config, self.state
        due = last or save or state.step % config.checkpoint_every == 0
        if not (due or state.step % config.log_every == 0 or state.step == 1):
            return
        metrics: dict[str, Any] = {
            "step": state.step,
            "progress": self._progress(state.rows_done),
            "rows": state.rows_done,
            "tokens": state.tokens_done,
            "user_rows": state.rows_done,
            "user_tokens": state.user_tokens,
            "alignment_rows": state.alignment_rows,
            "alignment_tokens": state.alignment_tokens,
            "row_tokens": state.row_tokens,
            "saved": due,
            "step_seconds": seconds,
            **terms,
        }
        if last:
            metrics["note"] = "; ".join(filter(None, [self.alignment_note, state.skipped.note]))
        # Not at a stop in between: the figures are those of a run that was not stopped.
        if self.validation and (last or state.step % config.checkpoint_every == 0):
            metrics |= self._held_out()
        state.reports = [*state.reports, metrics][-_KEPT_REPORTS:]
        if self.earlier:
            metrics, self.earlier = {**metrics, "earlier": self.earlier}, []
        if not due:
            self.runtime.report(metrics)
            return
        if self.sharded:
            # Ranks write their shards; whole weights are for the export and for the best so far.
            needed = last or is_adapted(self.model) or "valid_loss" in metrics
            tensors = {"weights": gather_weights(self.model, self.runtime.rank) if needed else {}}
        else:
            tensors = gather_state(self.model, self.optimizer)
        tensors["method"] = self.train_step.state()
        if "valid_loss" in metrics:
            self.best.update(metrics["valid_loss"], state.step, tensors["weights"])
        tensors["best"] = self.best.weights
        exported = self.best.chosen(tensors["weights"]) if last else tensors["weights"]
        saved = asdict(state)

        def write(folder: Path) -> None:
            if self.sharded:
                save_shards(folder, trainable(self.model), self.optimizer)
            kept = {name: group for name, group in tensors.items() if name != "weights" or not self.sharded}
            write_state(folder, self.runtime.rank, kept, saved, config, self.inputs)
            if self.runtime.rank == 0 and (last or is_adapted(self.model)):
                export_student(self.trainable_model, exported, folder / (EXPORT if last else ADAPTER))

        self.runtime.report(metrics, write)

    def _held_out(self) -> dict[str, float]:
        """The student's figures on the validation rows, without dropout and without drawing random numbers."""
        batches = self._micro_batches(self.validation)
        self.model.eval()
        found = held_out(ModelForward(self.model), batches, self.runtime.all_reduce)
        self.model.train()
        return {"valid_loss": found.loss, "valid_accuracy": found.accuracy} if found else {}

    def _resume(self) -> None:
        folder = self.runtime.latest_checkpoint()
        if folder is None:
            return
        tensors, saved = restore(folder, self.runtime.rank, self.config, self.inputs, self.model, self.optimizer)
        self.state = StudentState.of(saved)
        self.earlier = self.state.reports
        self.best = BestWeights(self.config, self.state.best, tensors.get("best", {}))
        self.train_step.restore(tensors.get("method", {}))
