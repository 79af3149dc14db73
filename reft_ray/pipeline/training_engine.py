"""The models of one base that a worker trains: in memory, on disk, and rebuilt from the log of their requests."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reft_ray.api.settings import TrainingSettings
from reft_ray.api.training_schema import Load as LoadWeights
from reft_ray.api.training_schema import OptimStep
from reft_ray.api.training_wire import DataRequest, Datum, read_request
from reft_ray.core.errors import ReftError
from reft_ray.core.job_threshold import JobThresholdRule
from reft_ray.core.loss_inputs import INPUTS, LossName, check_inputs
from reft_ray.finetuning.adapter_passes import Rows, Work
from reft_ray.finetuning.adapter_trainer import AdapterTrainer, Guidance, StepParameters, lora_settings
from reft_ray.finetuning.config import FinetuneConfig
from reft_ray.finetuning.encoding import alignment_rows
from reft_ray.finetuning.model import compute_dtype
from reft_ray.finetuning.targets import cached_distillation, ensure_soft_targets
from reft_ray.hf.adapter_bank import AdapterBank
from reft_ray.hf.compute import default_device
from reft_ray.hf.datum_text import DatumReader
from reft_ray.hf.loading import load_base
from reft_ray.hf.lora import read_adapter
from reft_ray.jobs.artefacts import local_folder, put_folder
from reft_ray.jobs.content import ContentStore
from reft_ray.jobs.training_queue import TrainingQueue, TrainingRequest
from reft_ray.jobs.training_records import TrainingCheckpoint, TrainingModel
from reft_ray.pipeline.model_context import ModelContext
from reft_ray.pipeline.training_findings import DataFindings, Load
from reft_ray.pipeline.training_gate import TrainingGate
from reft_ray.pipeline.training_screen import Judge, Screen, kept_tokens

SAMPLERS = 2
"""Saved weights in memory to sample from; the adapter that was used last goes first."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Parts:
    """What the engine is made of; `start` is the adapter that new models begin with, None for the base."""

    bank: AdapterBank
    trainer: AdapterTrainer
    screen: Screen
    gate: TrainingGate
    start: Path | None = None


def load_parts(
    context: ModelContext, settings: TrainingSettings, judge: Judge, shared: Path, device: str, signals: Load
) -> Parts:
    """Load the base once, with screening, guidance and gate around it. Raises ReftError.

    `signals` are those of data before, for findings.
    """
    where = default_device() if device == "auto" else device
    config = FinetuneConfig.of({"base": context.base, **context.args.finetune, "seed": settings.seed})
    base = load_base(context.base, compute_dtype(config, torch.device(where)), where)
    bank = AdapterBank(base)
    context.teacher.check(base, bank.chat)
    guidance = _guidance(context, bank, config, settings, shared) if settings.guidance_ratio else None
    screening = context.args.screening
    rule = JobThresholdRule(floor=screening.job_threshold_floor) if screening.job_threshold else None
    findings = DataFindings(signals, settings.findings_withheld) if screening.findings else None
    return Parts(
        bank,
        AdapterTrainer(bank, settings.batch_tokens, guidance, settings.seed),
        Screen(DatumReader(bank.chat), judge, context.teacher.manifest.thresholds, rule, findings),
        TrainingGate(context, bank, shared),
        context.teacher.folder / "adapter" if config.init == "aligned" else None,
    )


def _guidance(
    context: ModelContext, bank: AdapterBank, config: FinetuneConfig, settings: TrainingSettings, shared: Path
) -> Guidance:
    """Rows of the base model's default alignment set, with the teacher's soft labels, made once."""
    whole = context.alignment(None)
    alignment = whole[:: max(1, len(whole) // settings.alignment_rows)]
    rows, _ = alignment_rows(bank.chat, alignment, config.longest_row(bank.base.context))
    targets = shared / "targets"
    ensure_soft_targets(config, context.teacher, alignment, targets, bank.device)
    return Guidance(rows, cached_distillation(config, rows, context.teacher, targets), settings.guidance_ratio)


class TrainingEngine:
    """Runs requests on models; at most `max_loaded` of them are in memory. Not thread-safe."""

    def __init__(
        self, parts: Parts, queue: TrainingQueue, files: ContentStore, settings: TrainingSettings, owner: str
    ) -> None:
        self.parts = parts
        self._queue, self._files, self._settings, self._owner = queue, files, settings, owner
        self._slots: dict[str, str] = {}
        self._saved_steps: dict[str, int] = {}
        self._samplers: dict[str, str] = {}
        self._made = 0
        self.replaced: list[str] = []
        """Folders of weights that others of the same name have replaced."""

    def slot(self, model: TrainingModel) -> str:
        """The adapter of a model, as after all requests that it has applied; loaded and replayed where it is not."""
        if model.id in self._slots:
            self._slots[model.id] = self._slots.pop(model.id)
            return self._slots[model.id]
        while len(self._slots) >= self._settings.max_loaded:
            self.unload(next(iter(self._slots)))
        slot, trainer = self._name("m"), self.parts.trainer
        settings = lora_settings(model.lora)
        unsaved = self._queue.unsaved(model)
        # A model with requests and no saved state is one from before there was a start: it began with the base.
        start = self.parts.start if model.state_key is None and not unsaved else None
        if model.state_key is None:
            trainer.create(slot, settings, int(model.lora.get("seed") or 0), start)
        else:
            with local_folder(self._files.uri(model.state_key)) as folder:
                trainer.restore(slot, settings, folder)
        self._slots[model.id] = slot
        self._saved_steps[model.id] = trainer.loop(slot).steps
        try:
            if start is not None:
                # Now: a later worker may have another teacher.
                self._save_state(model, model.applied)
            for request in unsaved:
                self.apply(slot, request)
        except BaseException:
            self.forget(model.id)
            raise
        return slot

    def apply(self, slot: str, request: TrainingRequest) -> tuple[list[dict[str, Any]], Mapping[str, float]]:
        """The effect of one request on a model; the same whenever it is run. Raises ReftError."""
        if request.kind in ("forward", "forward_backward"):
            wanted = read_request(request.payload)
            work = self.work(slot, wanted, request.verdicts)
            return self.parts.trainer.forward(work.adapter, work.rows, work.loss, work.config, not wanted.forward_only)
        if request.kind == "optim_step":
            params = OptimStep.model_validate_json(request.payload).adam_params
            parameters = StepParameters() if params is None else StepParameters(**params.model_dump())
            return [], self.parts.trainer.step(slot, parameters)
        if request.kind == "load_weights":
            self._load(slot, request)
            return [], {}
        raise RuntimeError(f"{request.kind} has no effect on a model")

    def work(self, slot: str, wanted: DataRequest, verdicts: Mapping[str, Any] | None) -> Work:
        """The rows of a request for a model. Raises ReftError for data that it cannot read."""
        loss = self.checked(wanted.data, wanted.loss, wanted.config)
        if not wanted.forward_only and verdicts is None:
            raise RuntimeError("data without verdicts: nothing counts")
        rows = _rows(wanted.data, loss, None if wanted.forward_only else verdicts)
        return Work(slot, rows, loss, {name: float(value) for name, value in wanted.config.items()})

    def checked(self, data: Sequence[Datum], loss: str, config: Mapping[str, Any]) -> LossName:
        """The loss of data that this model can read. Raises ReftError."""
        bank = self.parts.bank
        vocabulary = len(bank.chat.tokenizer)
        known: LossName = "cross_entropy"
        for index, datum in enumerate(data):
            known = check_inputs(loss, datum.inputs, config)
            if len(datum) > bank.base.context:
                raise ReftError(f"data[{index}] has {len(datum)} tokens, the context holds {bank.base.context}")
            for name, ids in (("model_input", datum.tokens), ("target_tokens", datum.targets)):
                if ids.min() < 0 or ids.max() >= vocabulary:
                    raise ReftError(f"data[{index}].{name}: token ids are from 0 to {vocabulary - 1}")
        return known

    def checkpoint(self, model: TrainingModel, number: int, now: bool = False) -> None:
        """Save a model's state after request `number`: `now`, or if it has made enough steps and no gradient waits."""
        slot = self._slots.get(model.id)
        if slot is None:
            return
        loop = self.parts.trainer.loop(slot)
        due = loop.steps - self._saved_steps[model.id] >= self._settings.checkpoint_every
        if (due or now) and not loop.waits:
            self._save_state(model, number)

    def unload(self, model_id: str) -> None:
        """Move a model to disk. One with a gradient that waits is rebuilt from the log instead."""
        slot = self._slots[model_id]
        loop = self.parts.trainer.loop(slot)
        if not loop.waits and loop.steps > self._saved_steps[model_id]:
            model = self._queue.store.model(model_id, None)
            self._save_state(model, model.applied)
        self.forget(model_id)

    def forget(self, model_id: str) -> None:
        """Drop a model from memory: what is there is not to be used any more."""
        slot = self._slots.pop(model_id, None)
        if slot is not None:
            self.parts.trainer.drop(slot)
        self._saved_steps.pop(model_id, None)

    @property
    def loaded(self) -> list[str]:
        """The models in memory, least recently used first."""
        return list(self._slots)

    def save(self, model: TrainingModel, key: str, whole: bool) -> int:
        """Save a model's weights under a key, `whole` with its optimiser; their bytes."""
        save = self.parts.trainer.save if whole else self.parts.bank.save
        slot = self.slot(model)
        with tempfile.TemporaryDirectory(prefix="reft-training-") as scratch:
            folder = Path(scratch) / "weights"
            save(slot, folder, model.base_model)
            put_folder(folder, self._files.uri(key))
            return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    def sampler(self, checkpoint: TrainingCheckpoint, lora: Mapping[str, Any]) -> str:
        """The adapter of saved weights, loaded where it is not."""
        if checkpoint.key in self._samplers:
            self._samplers[checkpoint.key] = self._samplers.pop(checkpoint.key)
            return self._samplers[checkpoint.key]
        bank = self.parts.bank
        while len(self._samplers) >= SAMPLERS:
            bank.remove(self._samplers.pop(next(iter(self._samplers))))
        with local_folder(self._files.uri(checkpoint.key)) as folder:
            state = read_adapter(folder)
        name = self._name("s")
        bank.add(name, lora_settings(lora), 0, state)
        self._samplers[checkpoint.key] = name
        return name

    def _load(self, slot: str, request: TrainingRequest) -> None:
        wanted = LoadWeights.model_validate_json(request.payload)
        checkpoint = self._queue.store.checkpoint(wanted.path, request.project_id)
        settings = self.parts.trainer.loop(slot).settings
        with local_folder(self._files.uri(checkpoint.key)) as folder:
            self.parts.trainer.restore(slot, settings, folder, wanted.optimizer)

    def _save_state(self, model: TrainingModel, number: int) -> None:
        """Save a model that is in memory."""
        key = f"{model.folder}/state-{number}"
        self.save(model, key, whole=True)
        self._queue.saved(model, self._owner, number, key)
        self._saved_steps[model.id] = self.parts.trainer.loop(self._slots[model.id]).steps
        if model.state_key is not None and model.state_key != key:
            self._files.delete_tree(model.state_key)

    def _name(self, prefix: str) -> str:
        self._made += 1
        return f"{prefix}{self._made}"


def _rows(data: Sequence[Datum], loss: LossName, record: Mapping[str, Any] | None) -> Rows:
    ones = [np.ones(len(datum), np.float32) for datum in data]
    inputs = {
        name: [datum.inputs.get(name, one).astype(np.float32) for datum, one in zip(data, ones, strict=True)]
        for name in INPUTS[loss]
    }
    kept = ones if record is None else kept_tokens(record, data)
    return Rows([datum.tokens for datum in data], [datum.targets for datum in data], inputs, kept)
