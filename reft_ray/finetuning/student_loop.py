"""Stage 2 on one rank: `core.guided` over a stream of rows, with checkpoints that resume at the exact row."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from reft_ray.core.batch import Batch, TokenizedExample, answered, dummy_batch, micro_batches
from reft_ray.core.conversation import Example
from reft_ray.core.errors import ReftError
from reft_ray.core.guided import AlignmentLoss, GuidedTerms, cached_teacher, hard_labels, live_teacher
from reft_ray.core.held_out import held_out
from reft_ray.core.optimization import adamw, clip_gradients, learning_rate_at, reduce_gradients, set_learning_rate
from reft_ray.finetuning.checkpoint import (
    gather_state,
    restore,
    trainable,
    write_state,
)
from reft_ray.finetuning.config import FinetuneConfig
from reft_ray.finetuning.encoding import SkippedRows, alignment_rows, encode_rows
from reft_ray.finetuning.export import ADAPTER, EXPORT, export_student
from reft_ray.finetuning.model import TrainableModel, load_trainable, shard
from reft_ray.finetuning.rows import CyclingSampler, RowSource, global_batches, share, shuffled
from reft_ray.finetuning.runtime import Runtime
from reft_ray.finetuning.steps import step_of
from reft_ray.hf.forward import ModelForward
from reft_ray.hf.lora import (
    acting,
    adapter_scale,
    adapter_state,
    is_adapted,
    load_adapter_state,
    read_adapter,
    saved_scale,
)
from reft_ray.hf.ref_teacher import RefTeacher
from reft_ray.hf.soft_targets import StoredTargets, alignment_key, key_name, rows_key

STUDENT = "student"

_REMEMBERED_REPORTS = 500
"""So many of the last reports are kept in a checkpoint. Whoever listened may have died before it heard of them, so the
first report behind a restart brings them again, as `earlier`."""


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
    `finetuning.targets`). `validation` rows are not learned; their figures go with the reports of checkpoints.
    `identity` tells the rows from others: no checkpoint of others is gone on from.
    Raises ReftError when one is missing or no row can be trained on.
    """
    torch.manual_seed(config.seed + runtime.rank)
    trainable_model = load_trainable(config, runtime, STUDENT)
    if sharded and config.step != "guided":
        raise ReftError(f"step={config.step} keeps whole weights: use strategy=data_parallel")
    if config.init == "aligned":
        start_from_teacher(trainable_model, teacher)
    if config.init_adapter:
        start_from(trainable_model, Path(config.init_adapter))
    aligned: CyclingSampler | None = None
    alignment_loss: AlignmentLoss = hard_labels
    alignment_left_out = SkippedRows()
    inputs = {"dataset": identity, "Ref-Teacher": teacher.id if teacher else "", "alignment set": ""}
    if config.method.distills:
        encoded, alignment_left_out = alignment_rows(trainable_model.chat, alignment, trainable_model.max_tokens)
        if not encoded:
            raise ReftError("distillation needs alignment rows with answers that fit the model's context")
        aligned = CyclingSampler(encoded, f"{config.seed}/alignment")
        inputs["alignment set"] = rows_key(encoded)
        alignment_loss = alignment_loss_of(config, trainable_model, encoded, teacher, targets_folder)
    if sharded:
        shard(trainable_model.model)
    run = _Run(runtime, config, trainable_model, rows, aligned, alignment_loss, sharded)
    run.inputs = inputs
    run.notes = [alignment_left_out.note]
    run.validation = answered(encode_rows(trainable_model.chat, validation, trainable_model.max_tokens).encoded)
    run.train()
    return trainable_model


def start_from_teacher(trainable_model: TrainableModel, teacher: RefTeacher | None) -> None:
    """Start from the teacher's weights: the safety-aligned start that the method argues against."""
    if teacher is None:
        raise ReftError("init=aligned needs a Ref-Teacher to start from")
    teacher.check(trainable_model.base, trainable_model.chat)
    start_from(trainable_model, teacher.folder / "adapter")


def start_from(trainable_model: TrainableModel, adapter: Path) -> None:
    """Start from an adapter's weights. Raises ReftError where its shape or its scale is another."""
    state = read_adapter(adapter)
    mine = adapter_state(trainable_model.model, STUDENT)  # type: ignore[arg-type]
    odd = [name for name in mine.keys() | state.keys() if name not in mine or name not in state]
    odd += [name for name in mine if name in state and mine[name].shape != state[name].shape]
    if odd:
        raise ReftError(f"{adapter} does not fit this adapter's rank and layers: {min(odd)} differs")
    scale = saved_scale(adapter)
    if scale != adapter_scale(trainable_model.model, STUDENT):  # type: ignore[arg-type]
        raise ReftError(f"{adapter} acts at a scale of {scale:g}: set lora.scale={scale:g} to start from it")
    load_adapter_state(trainable_model.model, STUDENT, state)  # type: ignore[arg-type]


def alignment_loss_of(
    config: FinetuneConfig,
    trainable_model: TrainableModel,
    encoded: Sequence[TokenizedExample],
    teacher: RefTeacher | None,
    targets_folder: Path | None,
) -> AlignmentLoss:
    """The alignment term that a configuration asks for, on `encoded` rows as `alignment_rows` gives them."""
    if config.labels == "hard":
        return hard_labels
    if teacher is None:
        raise ReftError("soft labels need a Ref-Teacher")
    teacher.check(trainable_model.base, trainable_model.chat)
    if config.teacher_forward == "live":
        model = teacher.attach(trainable_model.model)
        model.set_adapter(STUDENT)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(f".{STUDENT}." in name)
        forward = ModelForward(model)

        def teach(batch: Any, *, logits: bool = True, layer: int | None = None) -> Any:
            with acting(model, "teacher"):
                return forward(batch, logits=logits, layer=layer)

        return live_teacher(teach, config.temperature)
    if targets_folder is None:
        raise ReftError("cached soft labels need the folder that holds them")
    key = alignment_key(encoded, teacher.id, config.temperature, config.topk)
    return cached_teacher(StoredTargets(targets_folder / key_name(key), key), config.temperature)


class _Run:
    """The mutable state of a run: where it stands in the data, its optimiser and its metrics."""

    def __init__(
        self,
        runtime: Runtime,
        config: FinetuneConfig,
        trainable_model: TrainableModel,
        rows: RowSource,
        aligned: CyclingSampler | None,
        alignment_loss: AlignmentLoss,
        sharded: bool,
    ) -> None:
        self.runtime, self.config, self.trainable_model = runtime, config, trainable_model
        self.rows, self.aligned, self.sharded = rows, aligned, sharded
        self.model: nn.Module = trainable_model.model
        self.optimizer = adamw(self.model.parameters(), config.optimizer.learning_rate, config.optimizer.weight_decay)
        self.step = 0
        self.rows_done = 0
        self.tokens_done = 0
        self.row_tokens = 0
        self.user_tokens = 0
        self.alignment_rows = 0
        self.alignment_tokens = 0
        self.skipped = SkippedRows()
        self.inputs: dict[str, str] = {}
        self.notes: list[str] = []
        self.validation: list[TokenizedExample] = []
        self.told: deque[dict[str, Any]] = deque(maxlen=_REMEMBERED_REPORTS)
        self.earlier: list[dict[str, Any]] = []
        self.total_rows = round(config.epochs * len(rows))
        if self.total_rows < 1:
            raise ReftError("no rows to train on: screening kept none, or the dataset is empty")
        self.alignment_steps = config.alignment_steps(len(rows))
        self.learn = step_of(config, self.model, alignment_loss, runtime.all_reduce, config.total_steps(len(rows)))

    def train(self) -> None:
        """Train to the end or until asked to stop, from the latest checkpoint where there is one."""
        self._resume()
        terms: GuidedTerms | None = None
        while self.step < self.alignment_steps:
            started = time.perf_counter()
            terms = self._train_on(())
            if self._told_to_stop(terms, started):
                return
        trained = self.step
        while self.rows_done < self.total_rows:
            epoch, position = divmod(self.rows_done, len(self.rows))
            order = shuffled(self.rows, self.config.shuffle_rows, f"{self.config.seed}/{epoch}")
            for batch in global_batches(order, self.config.batch_rows, skip=position):
                started = time.perf_counter()
                self._refuse_unscreened(self.rows_done + len(batch) - (epoch + 1) * len(self.rows))
                terms = self._train_on(batch[: self.total_rows - self.rows_done])
                if self.rows_done >= self.total_rows:
                    break
                if self._told_to_stop(terms, started):
                    return
            if self.step == trained:
                self._tell(missing_rows=len(self.rows) - position)
                raise ReftError(f"the dataset ended at row {position} of {len(self.rows)}: it is not what was screened")
            trained = self.step
        if not self.user_tokens:
            raise ReftError(self.skipped.note or "no row has an answer to learn")
        self._report(terms, 0.0, last=True)

    def _told_to_stop(self, terms: GuidedTerms, started: float) -> bool:
        """Report a step; whether somebody asks to stop behind it, in which case the state is saved."""
        stop = self.runtime.stop_asked()
        self._report(terms, time.perf_counter() - started, save=stop)
        return stop

    def _progress(self, rows: float) -> float:
        """The share of the run that is done after `rows` user rows; a step without any counts as a whole batch."""
        alone = self.alignment_steps * self.config.batch_rows
        return (min(self.step * self.config.batch_rows, alone) + rows) / (alone + self.total_rows)

    def _refuse_unscreened(self, beyond: int) -> None:
        """Stop before the first row that the screening did not count."""
        if beyond > 0:
            self._tell(unscreened_rows=beyond)
            raise ReftError(f"the dataset has more than the {len(self.rows)} rows that were screened")

    def _tell(self, **counts: int) -> None:
        self.runtime.report({"step": self.step, "progress": self._progress(self.rows_done), **counts})

    def _train_on(self, batch: Sequence[Example]) -> GuidedTerms:
        runtime, config, chat = self.runtime, self.config, self.trainable_model.chat
        # Rows are counted in the first epoch only: the others bring the same ones.
        counted = self.skipped if self.rows_done < len(self.rows) else SkippedRows()
        encoded = encode_rows(chat, batch, self.trainable_model.max_tokens, counted).encoded
        tokens = sum(map(len, encoded))
        streams = self.learn.streams
        aligned = []
        if self.aligned and streams.alignment:
            if batch:
                aligned = self.aligned.take_tokens(tokens * config.alignment_ratio)
            else:
                aligned = self.aligned.take_rows(max(1, round(config.batch_rows * config.alignment_ratio)))
        if not streams.user:
            encoded, tokens = [], 0
        user, alignment = (
            micro_batches(
                answered(share(rows, runtime.rank, runtime.world_size)),
                config.micro_batch_tokens,
                chat.pad_id,
                runtime.device,
            )
            for rows in (encoded, aligned)
        )
        set_learning_rate(
            self.optimizer,
            learning_rate_at(
                self._progress(self.rows_done + len(batch) / 2),
                config.optimizer.learning_rate,
                config.optimizer.warmup,
            ),
        )
        if self.sharded:
            user, alignment = self._even(user), self._even(alignment)
        terms = self.learn(user, alignment)
        parameters = list(trainable(self.model).values())
        if runtime.world_size > 1 and not self.sharded:
            reduce_gradients(parameters, runtime.all_reduce)
        clip_gradients(parameters, config.optimizer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.rows_done += len(batch)
        self.tokens_done += tokens + sum(map(len, aligned))
        self.row_tokens += tokens
        self.user_tokens += terms.user_tokens
        self.alignment_rows += len(aligned)
        self.alignment_tokens += terms.alignment_tokens
        return terms

    def _even(self, batches: list[Batch]) -> list[Batch]:
        """As many micro-batches on every rank, because sharded layers are gathered by all of them at once."""
        counts = torch.zeros(self.runtime.world_size, dtype=torch.float64)
        counts[self.runtime.rank] = len(batches)
        most = int(self.runtime.all_reduce(counts).max())
        idle = dummy_batch(self.trainable_model.chat.pad_id, self.runtime.device)
        return batches + [idle] * (most - len(batches))

    def _report(self, terms: GuidedTerms | None, seconds: float, last: bool = False, save: bool = False) -> None:
        config = self.config
        due = last or save or self.step % config.checkpoint_every == 0
        if not (due or self.step % config.log_every == 0 or self.step == 1):
            return
        metrics: dict[str, Any] = {
            "step": self.step,
            "progress": self._progress(self.rows_done),
            "rows": self.rows_done,
            "tokens": self.tokens_done,
            "user_rows": self.rows_done,
            "user_tokens": self.user_tokens,
            "alignment_rows": self.alignment_rows,
            "alignment_tokens": self.alignment_tokens,
            "row_tokens": self.row_tokens,
            "saved": due,
            "step_seconds": seconds,
        }
        if last:
            metrics["note"] = "; ".join(filter(None, [*self.notes, self.skipped.note]))
        if terms is not None:
            metrics |= {"loss": terms.total, "distill": terms.distill}
            if terms.user_tokens:
                metrics["task"] = terms.task
            metrics["soft_labels"] = config.labels == "soft" and terms.alignment_tokens > 0
            if terms.user_tokens and terms.user_correct is not None:
                metrics["accuracy"] = terms.user_correct / terms.user_tokens
        # Not where a run was told to stop in between: its figures are those of a run that nobody stopped.
        if self.validation and (last or self.step % config.checkpoint_every == 0):
            metrics |= self._held_out()
        self.told.append(metrics)
        if self.earlier:
            metrics, self.earlier = {**metrics, "earlier": self.earlier}, []
        if not due:
            self.runtime.report(metrics)
            return
        tensors = gather_state(self.model, self.optimizer)
        if method := self.learn.state():
            tensors["method"] = method
        state = {
            "step": self.step,
            "rows_done": self.rows_done,
            "tokens_done": self.tokens_done,
            "user_tokens": self.user_tokens,
            "alignment_rows": self.alignment_rows,
            "alignment_tokens": self.alignment_tokens,
            "row_tokens": self.row_tokens,
            "skipped": [self.skipped.count, self.skipped.first],
            "alignment_position": self.aligned.position if self.aligned else 0,
            "alignment_ahead": self.aligned.ahead if self.aligned else 0.0,
            "told": list(self.told),
            "config": config.model_dump(mode="json"),
            "inputs": self.inputs,
        }

        def write(folder: Path) -> None:
            write_state(folder, self.runtime.rank, tensors, state)
            if self.runtime.rank == 0 and (last or is_adapted(self.model)):
                export_student(self.trainable_model, tensors["weights"], folder / (EXPORT if last else ADAPTER))

        self.runtime.report(metrics, write)

    def _held_out(self) -> dict[str, float]:
        """The student's figures on the validation rows, without dropout and without a trace in the random numbers."""
        mine = share(self.validation, self.runtime.rank, self.runtime.world_size)
        batches = micro_batches(
            mine, self.config.micro_batch_tokens, self.trainable_model.chat.pad_id, self.runtime.device
        )
        if self.sharded:
            batches = self._even(batches)
        self.model.eval()
        found = held_out(ModelForward(self.model), batches, self.runtime.all_reduce)
        self.model.train()
        return {"valid_loss": found.loss, "valid_accuracy": found.accuracy} if found else {}

    def _resume(self) -> None:
        folder = self.runtime.latest_checkpoint()
        if folder is None:
            return
        groups, state = restore(folder, self.runtime.rank, self.config, self.inputs, self.model, self.optimizer)
        self.step, self.rows_done = state["step"], state["rows_done"]
        self.tokens_done, self.user_tokens = state["tokens_done"], state["user_tokens"]
        self.alignment_rows, self.alignment_tokens = state["alignment_rows"], state["alignment_tokens"]
        self.row_tokens = state["row_tokens"]
        self.skipped = SkippedRows(*state["skipped"])
        self.earlier = state["told"]
        self.told.extend(self.earlier)
        self.learn.restore(groups.get("method", {}))
        if self.aligned:
            self.aligned.position, self.aligned.ahead = state["alignment_position"], state["alignment_ahead"]
