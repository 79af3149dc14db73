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
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from reft_ray.api.moderator import ModeratorError
from reft_ray.api.settings import ChatModerationSettings, TrainingSettings
from reft_ray.api.shares import LeastSpent
from reft_ray.api.training_schema import Load, SampleRequest, Save, SaveExternal, SaveForSampler
from reft_ray.api.training_wire import Sample, write_samples
from reft_ray.core.completion import Sampling
from reft_ray.core.errors import ReftError
from reft_ray.finetuning.adapter_trainer import Stops
from reft_ray.hf.loading import context_of
from reft_ray.hf.model_store import local_name
from reft_ray.jobs.content import ContentStore
from reft_ray.jobs.errors import LeaseLostError
from reft_ray.jobs.training_queue import Extra, Outcome, TrainingQueue, TrainingRequest
from reft_ray.jobs.training_records import PASSED, REFUSED, TrainingModel
from reft_ray.jobs.training_signals import DataSignals
from reft_ray.pipeline.model_context import ModelContext
from reft_ray.pipeline.steps import StepsConfig
from reft_ray.pipeline.training_data import TOKEN_BYTES, DataRequests, Judged
from reft_ray.pipeline.training_engine import TrainingEngine, load_parts
from reft_ray.pipeline.training_findings import check_withheld
from reft_ray.pipeline.training_saves import Saves, as_json
from reft_ray.pipeline.training_screen import Judge
from reft_ray.telemetry import catalog
from reft_ray.telemetry.recorder import NullRecorder, Recorder

RENEW_SECONDS = 4.0
SWEEP_SECONDS = 60.0
IDLE_SECONDS = 0.02
RETRY_SECONDS = 1.0

T = TypeVar("T")
logger = logging.getLogger(__name__)
Point = Callable[[str], None]
"""Called with the name of each point at which a test may end the process."""


class FairTurns:
    """Chooses whose request is next: of the project that has had the least time, and there the oldest."""

    def __init__(self) -> None:
        self._turns = LeastSpent()

    def choose(self, requests: Sequence[TrainingRequest]) -> TrainingRequest:
        """The next of these; release gates wait for all others."""
        pressing = [request for request in requests if request.kind != "gate"] or list(requests)
        project = self._turns.choose(list(dict.fromkeys(request.project_id for request in pressing)))
        return next(request for request in pressing if request.project_id == project)

    def spend(self, project: str, seconds: float) -> None:
        """Count the time of a request."""
        self._turns.spend(project, seconds)


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
        """Run one request, or the data of several models at once, if there are any; whether it did."""
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
        requests = self._next(waiting)
        started = time.perf_counter()
        try:
            self._work(requests)
        finally:
            seconds = (time.perf_counter() - started) / sum(_cost(request) for request in requests)
            for request in requests:
                self._turns.spend(request.project_id, seconds * _cost(request))
                self._parts.recorder.observe(
                    catalog.TRAINING_REQUEST_SECONDS, seconds * _cost(request), kind=request.kind
                )
        return True

    def _next(self, waiting: Sequence[TrainingRequest]) -> list[TrainingRequest]:
        """The request whose turn it is; with it, if it has data, those of other models that fit into its pass."""
        chosen = [self._queue.loaded(self._turns.choose(waiting))]
        settings = self._parts.settings
        most = min(settings.batch_sessions, settings.max_loaded)
        if chosen[0].kind != "forward_backward" or most < 2 or not (self._engine and self._engine.parts.bank.mixes):
            return chosen
        free = TOKEN_BYTES * settings.batch_tokens - _cost(chosen[0])
        others = [each for each in waiting if each.kind == "forward_backward" and each.id != chosen[0].id]
        while others and len(chosen) < most:
            turn = self._turns.choose(others)
            others.remove(turn)
            other = self._queue.loaded(turn)
            free -= _cost(other)
            if free < 0:
                break
            chosen.append(other)
        return chosen

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
            made = load_parts(parts.context, parts.settings, parts.judge, parts.shared, parts.device, self._signals)
            self._engine = TrainingEngine(made, parts.queue, parts.files, parts.settings, self.owner)
        return self._engine

    @property
    def _data(self) -> DataRequests:
        parts = self._parts
        return DataRequests(self.engine, parts.queue, parts.settings, self.owner, parts.recorder, parts.point)

    def _signals(self, project: str, session: str | None) -> Sequence[DataSignals]:
        return self._queue.signals(project, self._parts.name, session)

    def _work(self, requests: Sequence[TrainingRequest]) -> None:
        for request in requests:
            self._parts.point(f"claimed {request.kind}")
        if len(requests) == 1:
            found = self._guarded(requests[0], partial(self._run, requests[0]))
            self._end(requests[0], *((found, None) if isinstance(found, Outcome) else found))
            return
        prepared = [self._guarded(request, partial(self._data.prepare, request)) for request in requests]
        judged = [each for each in prepared if isinstance(each, Judged)]
        try:
            outcomes = iter(self._data.learn(judged) if judged else ())
        except Exception:
            logger.exception("data of several models failed together; running them one by one")
            outcomes = iter([self._alone(each) for each in judged])
        for request, each in zip(requests, prepared, strict=True):
            self._end(request, next(outcomes) if isinstance(each, Judged) else each, None)

    def _alone(self, judged: Judged) -> Outcome:
        found = self._guarded(judged.request, partial(self._data.learn, [judged]))
        return found if isinstance(found, Outcome) else found[0]

    def _guarded(self, request: TrainingRequest, run: Callable[[], T]) -> T | Outcome:
        """What `run` returns, or the outcome of a request that failed. Raises ModeratorError and LeaseLostError."""
        try:
            return run()
        except (ModeratorError, LeaseLostError):
            raise
        except ReftError as error:
            return Outcome(error=str(error))
        except Exception:
            logger.exception("a training request failed")
            # What it did to the model is not known: rebuild it from the log.
            self.engine.forget(request.target)
            return Outcome(error="the server failed on this request", server=True)

    def _end(self, request: TrainingRequest, outcome: Outcome, extra: Extra | None) -> None:
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
                return self._data.learn([self._data.prepare(request)])[0], None
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


def _cost(request: TrainingRequest) -> int:
    """The share of a request in a pass with others."""
    return max(1, len(request.payload))


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
    check_withheld(settings.findings_withheld)
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
