"""Requests of data in the worker of the training API: judged first, then learned from, of several models at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from reft_ray.api.settings import TrainingSettings
from reft_ray.api.training_wire import DataRequest, read_request, write_output
from reft_ray.core.errors import ReftError
from reft_ray.core.loss_inputs import LossName
from reft_ray.jobs.training_queue import Outcome, TrainingQueue, TrainingRequest
from reft_ray.pipeline.training_engine import TrainingEngine
from reft_ray.pipeline.training_findings import FOUND
from reft_ray.pipeline.training_screen import Record, Source, account_of, kept_tokens, metrics_of, refuse_if_asked
from reft_ray.telemetry import catalog
from reft_ray.telemetry.recorder import Recorder

TOKEN_BYTES = 16
"""Bytes of a token in a request, at least: its id, its target and one input of the loss."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Judged:
    """A request whose verdicts are stored, for the adapter `slot`; with the metrics of its screening."""

    request: TrainingRequest
    wanted: DataRequest
    slot: str
    metrics: Mapping[str, float]


class DataRequests:
    """Judges the data of requests, and learns from them."""

    def __init__(
        self,
        engine: TrainingEngine,
        queue: TrainingQueue,
        settings: TrainingSettings,
        owner: str,
        recorder: Recorder,
        point: Callable[[str], None],
    ) -> None:
        self._engine, self._queue, self._settings = engine, queue, settings
        self._owner, self._recorder, self._point = owner, recorder, point

    def prepare(self, request: TrainingRequest) -> Judged:
        """Judge a request's data: no gradient before the verdicts are stored. Raises ReftError."""
        wanted = read_request(request.payload)
        loss = self._engine.checked(wanted.data, wanted.loss, wanted.config)
        model = self._queue.store.model(request.target, None)
        slot = self._engine.slot(model)
        metrics: dict[str, float] = {}
        if not wanted.forward_only:
            if request.verdicts is None:
                request = replace(request, verdicts=self._judge(request, wanted, loss, model.session_id))
            self._point("judged")
            record = request.verdicts or {}
            refuse_if_asked(record)
            metrics = metrics_of(record, kept_tokens(record, wanted.data))
            self._count(metrics, sum(map(len, wanted.data)))
        return Judged(request, wanted, slot, metrics)

    def learn(self, judged: Sequence[Judged]) -> list[Outcome]:
        """The outcomes of requests of different models, all `forward` or all `forward_backward`.

        Raises what a pass raises: then nothing of any request was learned.
        """
        works = [self._engine.work(each.slot, each.wanted, each.request.verdicts) for each in judged]
        backward = not all(each.wanted.forward_only for each in judged)
        outcomes = []
        for each, found in zip(judged, self._engine.parts.trainer.forward_together(works, backward), strict=True):
            if isinstance(found, ReftError):
                outcomes.append(Outcome(error=str(found)))
            else:
                outputs, sums = found
                outcomes.append(Outcome(write_output(outputs, {**sums, **each.metrics}), binary=True))
        return outcomes

    def _judge(self, request: TrainingRequest, wanted: DataRequest, loss: LossName, session_id: str) -> Record:
        """Judge data and record the verdicts."""
        project = request.project_id
        source = Source(project, session_id, self._queue.scores(project, request.base_model))
        found = self._engine.parts.screen.screen(wanted.data, loss, source, self._settings.policy_of(project))
        account = account_of(found.record, kept_tokens(found.record, wanted.data))
        self._queue.judged(request, self._owner, found.record, found.scores, found.events, account, found.signals)
        for kind, event in found.events:
            if kind == FOUND:
                labels = {"finding": event["finding"], "severity": event["severity"]}
                self._recorder.count(catalog.SCREENING_FINDINGS, **labels)
        return found.record

    def _count(self, metrics: Mapping[str, float], tokens: int) -> None:
        recorder, withheld = self._recorder, metrics["withheld_tokens:sum"]
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
