"""The worker of the training API: the one process that runs a base model's requests, in fair turns of projects.

It holds a lease in the records. After it is killed another one takes over, loads the last saved states and runs the
requests after them again: with the stored verdicts, so that the outcome is the same.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from reft_ray.api.moderator import ModeratorError
from reft_ray.api.settings import ChatModerationSettings, TrainingSettings
from reft_ray.api.training_schema import Load, SampleRequest, Save, SaveExternal, SaveForSampler
from reft_ray.api.training_wire import Sample, read_request, write_output, write_samples
from reft_ray.core.completion import Sampling
from reft_ray.core.errors import ReftError
from reft_ray.finetuning.adapter_trainer import Stops
from reft_ray.hf.loading import context_of
from reft_ray.hf.model_store import local_name
from reft_ray.jobs.content import ContentStore
from reft_ray.jobs.errors import LeaseLostError
from reft_ray.jobs.training_queue import Extra, Outcome, TrainingQueue, TrainingRequest
from reft_ray.jobs.training_records import PASSED, REFUSED, TrainingModel
from reft_ray.pipeline.model_context import ModelContext
from reft_ray.pipeline.steps import StepsConfig
from reft_ray.pipeline.training_engine import TrainingEngine, load_parts
from reft_ray.pipeline.training_saves import Saves, as_json
from reft_ray.pipeline.training_screen import Judge, kept_tokens, metrics_of, refuse_if_asked
from reft_ray.telemetry import catalog
from reft_ray.telemetry.recorder import NullRecorder, Recorder

RENEW_SECONDS = 4.0
SWEEP_SECONDS = 60.0
IDLE_SECONDS = 0.02
RETRY_SECONDS = 1.0

logger = logging.getLogger(__name__)
Point = Callable[[str], None]
"""Called with the name of each point at which a test may end the process."""


class FairTurns:
    """Chooses whose request is next: of the project that has had the least time, and there the oldest."""

    def __init__(self) -> None:
        self._spent: dict[str, float] = {}

    def choose(self, requests: Sequence[TrainingRequest]) -> TrainingRequest:
        """The next of these; release gates wait for all others."""
        pressing = [request for request in requests if request.kind != "gate"] or list(requests)
        waiting = {request.project_id for request in pressing}
        # Who comes back starts with those who are here: time without requests is not saved up.
        least = min((self._spent[project] for project in waiting if project in self._spent), default=0.0)
        for project in waiting:
            self._spent[project] = max(self._spent.get(project, least), least)
        return min(pressing, key=lambda request: self._spent[request.project_id])

    def spend(self, project: str, seconds: float) -> None:
        """Count the time of a request."""
        self._spent[project] = self._spent.get(project, 0.0) + seconds


@dataclass(frozen=True)
class WorkerParts:
    """What a worker is made of: the base model's public name and context, the judge, the records, and where to keep."""

    name: str
    context: ModelContext
    settings: TrainingSettings
    queue: TrainingQueue
    files: ContentStore
    judge: Judge
    shared: Path
    device: str = "auto"
    recorder: Recorder = field(default_factory=NullRecorder)
    point: Point = lambda _name: None
    moderation: ChatModerationSettings | None = None


class TrainingWorker:
    """Runs requests until it is stopped."""

    def __init__(self, parts: WorkerParts) -> None:
        self._parts = parts
        self._queue = parts.queue
        self.owner = f"worker-{secrets.token_hex(8)}"
        self._turns = FairTurns()
        self._engine: TrainingEngine | None = None
        self._facts: Mapping[str, Any] = {}
        self._swept = 0.0
        self._held = False

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set. Errors of the records are logged and tried again."""
        renewing = threading.Thread(target=self._renew, args=(stop,), name="training lease", daemon=True)
        renewing.start()
        while not stop.is_set():
            try:
                worked = self.tick()
            except LeaseLostError:
                logger.warning("another worker trains on %s", self._parts.name)
                self._engine, self._held, worked = None, False, False
            except ModeratorError as error:
                logger.warning("no verdict, so no training: %s", error)
                stop.wait(RETRY_SECONDS)
                continue
            except Exception:
                logger.exception("the training worker failed; trying again")
                self._engine = None
                stop.wait(RETRY_SECONDS)
                continue
            if not worked:
                stop.wait(IDLE_SECONDS if self._held else RETRY_SECONDS)
        renewing.join()
        self._queue.release(self._parts.name, self.owner)

    def tick(self) -> bool:
        """Run one request, if there is one and this is the worker; whether it did."""
        if not self._held:
            self._facts = self._facts or _facts(self._parts.context)
            self._held = self._queue.acquire(self._parts.name, self.owner, self._facts)
            if not self._held:
                return False
        if time.monotonic() - self._swept > SWEEP_SECONDS:
            self._swept = time.monotonic()
            self.sweep()
        waiting = self._queue.runnable(self._parts.name)
        if not waiting:
            return False
        request = self._turns.choose(waiting)
        started = time.perf_counter()
        try:
            self._work(self._queue.loaded(request))
        finally:
            seconds = time.perf_counter() - started
            self._turns.spend(request.project_id, seconds)
            self._parts.recorder.observe(catalog.TRAINING_REQUEST_SECONDS, seconds, kind=request.kind)
        return True

    def sweep(self) -> None:
        """Forget what is not needed any more: results, expired weights, the models of sessions that have ended."""
        queue, store, files = self._queue, self._queue.store, self._parts.files
        queue.sweep()
        queue.close_waiting(self._parts.name, self.owner)
        while self._engine is not None and self._engine.replaced:
            files.delete_tree(self._engine.replaced.pop())
        for checkpoint in store.expired():
            files.delete_tree(checkpoint.key)
        for model in store.ended(self._parts.name):
            if self._engine is not None:
                self._engine.forget(model.id)
            if model.state_key is not None:
                files.delete_tree(model.state_key)

    def _renew(self, stop: threading.Event) -> None:
        while not stop.wait(RENEW_SECONDS):
            try:
                if self._held and not self._queue.acquire(self._parts.name, self.owner, self._facts):
                    self._held = False
            except Exception:
                logger.exception("the lease was not renewed; trying again")

    @property
    def engine(self) -> TrainingEngine:
        """The models; the base is loaded with the first request."""
        if self._engine is None:
            parts = self._parts
            made = load_parts(parts.context, parts.settings, parts.judge, parts.shared, parts.device)
            self._engine = TrainingEngine(made, parts.queue, parts.files, parts.settings, self.owner)
        return self._engine

    def _work(self, request: TrainingRequest) -> None:
        self._parts.point(f"claimed {request.kind}")
        extra: Extra | None = None
        try:
            outcome, extra = self._run(request)
        except (ModeratorError, LeaseLostError):
            raise
        except ReftError as error:
            outcome = Outcome(error=str(error))
        except Exception:
            logger.exception("a training request failed")
            outcome = Outcome(error="the server failed on this request", server=True)
            # What it did to the model is not known: rebuild it from the log.
            self.engine.forget(request.target)
        self._parts.point(f"ran {request.kind}")
        self._queue.end(request, self.owner, outcome, extra)
        self._parts.point(f"ended {request.kind}")
        status = "failed" if outcome.error else "done"
        self._parts.recorder.count(catalog.TRAINING_REQUESTS, kind=request.kind, status=status)
        if request.kind in ("optim_step", "load_weights") and not outcome.error:
            # What was loaded may be deleted before the next step.
            self.engine.checkpoint(self._model(request), request.number, now=request.kind == "load_weights")
            self._parts.point("saved")

    def _run(self, request: TrainingRequest) -> tuple[Outcome, Extra | None]:
        match request.kind:
            case "forward" | "forward_backward":
                return self._data(request), None
            case "optim_step":
                _, metrics = self.engine.apply(self.engine.slot(self._model(request)), request)
                self._parts.recorder.count(
                    catalog.TRAINING_TOKENS, metrics.get("guidance_tokens", 0.0), content="guidance"
                )
                return as_json({"metrics": dict(metrics)}), None
            case "load_weights":
                return self._load(request), None
            case "save_weights":
                return Saves(self.engine, self._queue).save(request, Save.model_validate_json(request.payload))
            case "save_weights_for_sampler":
                return Saves(self.engine, self._queue).save_for_sampler(
                    request, SaveForSampler.model_validate_json(request.payload)
                )
            case "save_weights_external":
                return Saves(self.engine, self._queue).save_external(
                    request, SaveExternal.model_validate_json(request.payload)
                )
            case "sample":
                return self._sample(request, SampleRequest.model_validate_json(request.payload)), None
            case "gate":
                return self._gate(request), None
            case _:
                raise ReftError(f"{request.kind} is not supported by this server")

    def _data(self, request: TrainingRequest) -> Outcome:
        """Judge, then learn: no gradient before the verdicts are stored."""
        wanted = read_request(request.payload)
        loss = self.engine.checked(wanted.data, wanted.loss, wanted.config)
        slot = self.engine.slot(self._model(request))
        metrics: dict[str, float] = {}
        if not wanted.forward_only:
            if request.verdicts is None:
                earlier = self._queue.scores(request.project_id, request.base_model)
                policy = self._parts.settings.policy_of(request.project_id)
                found = self.engine.parts.screen.screen(wanted.data, loss, earlier, policy)
                self._queue.judged(request, self.owner, found.record, found.scores, found.events)
                request = replace(request, verdicts=found.record)
            self._parts.point("judged")
            record = request.verdicts or {}
            refuse_if_asked(record)
            metrics = metrics_of(record, kept_tokens(record, wanted.data))
            self._count(metrics, sum(map(len, wanted.data)))
        outputs, sums = self.engine.apply(slot, request)
        return Outcome(write_output(outputs, {**sums, **metrics}), binary=True)

    def _count(self, metrics: Mapping[str, float], tokens: int) -> None:
        recorder, withheld = self._parts.recorder, metrics["withheld_tokens:sum"]
        allowed = metrics["judged_data:sum"] - metrics["withheld_data:sum"] - metrics["masked_data:sum"]
        for outcome, count in (
            ("kept", allowed),
            ("withheld", metrics["withheld_data:sum"]),
            ("masked", metrics["masked_data:sum"]),
        ):
            recorder.count(catalog.TRAINING_DATA, count, outcome=outcome)
        for content, count in (
            ("learned", tokens - withheld),
            ("withheld", withheld),
            ("unjudged", metrics["unjudged_tokens:sum"]),
        ):
            recorder.count(catalog.TRAINING_TOKENS, count, content=content)

    def _load(self, request: TrainingRequest) -> Outcome:
        model = self._model(request)
        self.engine.apply(self.engine.slot(model), request)
        path = Load.model_validate_json(request.payload).path
        return as_json({"type": "load_weights", "path": path, "model_id": model.id})

    def _gate(self, request: TrainingRequest) -> Outcome:
        checkpoint = self._queue.store.checkpoint(request.target, None)
        lora = self._queue.store.model(checkpoint.model_id, None).lora
        result = self.engine.parts.gate.check(self.engine.sampler(checkpoint, lora))
        gate, checks = PASSED if result.passed else REFUSED, list(map(str, result.checks))
        self._queue.gated(checkpoint.id, request.base_model, self.owner, gate, checks)
        return as_json({"gate": gate, "checks": checks})

    def _sample(self, request: TrainingRequest, wanted: SampleRequest) -> Outcome:
        store, parts = self._queue.store, self.engine.parts
        sampler = store.sampler(request.target, None)
        adapter = None
        if sampler.checkpoint_id is not None:
            checkpoint = store.checkpoint(sampler.checkpoint_id, request.project_id)
            adapter = self.engine.sampler(checkpoint, store.model(checkpoint.model_id, None).lora)
        prompt, params = wanted.prompt.tokens, wanted.sampling_params
        vocabulary, context = len(parts.bank.chat.tokenizer), parts.bank.base.context
        if max(prompt) >= vocabulary:
            raise ReftError(f"prompt: token ids are from 0 to {vocabulary - 1}")
        room = context - len(prompt)
        if room < 1 or (params.max_tokens or 1) > room:
            raise ReftError(f"prompt: {len(prompt)} tokens leave {max(room, 0)} of the context of {context}")
        moderation = self._parts.moderation and self._parts.moderation.modes(request.project_id)
        if moderation is not None and moderation.input == "block":
            parts.screen.refuse_sample(prompt)
        seed = params.seed if params.seed is not None else secrets.randbits(48)
        sampling = Sampling(params.max_tokens or room, params.temperature, params.top_p, seed=seed)
        found = parts.trainer.sample(
            adapter, prompt, wanted.num_samples, sampling, _stops(params.stop, parts.bank.chat)
        )
        if moderation is not None and moderation.output == "block":
            parts.screen.refuse_sample(prompt, [each.tokens for each in found])
        scores = parts.trainer.prompt_logprobs(adapter, prompt) if wanted.prompt_logprobs else None
        tokens = sum(len(each.tokens) for each in found)
        self._parts.recorder.count(catalog.TRAINING_TOKENS, tokens, content="sampled")
        return Outcome(
            write_samples([Sample(each.tokens, each.logprobs, each.stopped) for each in found], scores), binary=True
        )

    def _model(self, request: TrainingRequest) -> TrainingModel:
        return self._queue.store.model(request.target, None)


def _stops(stop: str | Sequence[str] | Sequence[int] | None, chat: Any) -> Stops:
    if stop is None:
        return Stops(frozenset(chat.stop_ids))
    texts = [stop] if isinstance(stop, str) else [item for item in stop if isinstance(item, str)]
    ids = [] if isinstance(stop, str) else [item for item in stop if isinstance(item, int)]
    return Stops(frozenset(ids), tuple(filter(None, texts)))


def _facts(context: ModelContext) -> dict[str, Any]:
    """What clients ask of a base model before it is loaded."""
    return {"context": context_of(context.base), "tokenizer": local_name(context.base), "arch": None}


def make(
    name: str,
    options: Mapping[str, Any],
    settings: TrainingSettings,
    queue: TrainingQueue,
    files: ContentStore,
    judge: Judge,
    recorder: Recorder,
    moderation: ChatModerationSettings | None = None,
) -> TrainingWorker:
    """The worker of a base model; `options` are those of `pipeline.steps:make`. Raises UsageError for invalid ones.

    With `moderation` samples are judged as chats are: they must not be a way around it.
    """
    config = StepsConfig.of(dict(options))
    context = ModelContext(config.base(name))
    return TrainingWorker(
        WorkerParts(
            name,
            context,
            settings,
            queue,
            files,
            judge,
            config.folder,
            config.device,
            recorder,
            moderation=moderation,
        )
    )
