"""The teacher replica: a plain class over lists. `app` makes it a deployment."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

from reft_ray.api.moderator import ModerationBatch, TeacherInfo, info_of
from reft_ray.core.cascade import Rules
from reft_ray.core.conversation import Conversation
from reft_ray.core.errors import ReftError
from reft_ray.core.scoring import judge
from reft_ray.core.verdict import Thresholds, Verdict
from reft_ray.serving.args import TeacherArgs
from reft_ray.serving.batcher import Batcher, ExpiredError
from reft_ray.serving.loading import LoadedTeacher, approximate_tokens, load_teacher, pinned
from reft_ray.telemetry import catalog
from reft_ray.telemetry.drift import DriftMonitor, ScoreHistogram
from reft_ray.telemetry.recorder import NullRecorder, Recorder
from reft_ray.telemetry.tracing import Tracer
from reft_ray.telemetry.verdict_metrics import clear_canaries, record_canaries, unit_score

logger = logging.getLogger(__name__)

_STREAMS = ("moderation", "screening")


@dataclass(frozen=True, slots=True)
class Call:
    """Conversations under one pair of thresholds, None for the teacher's; `stream` is for telemetry."""

    conversations: tuple[Conversation, ...]
    thresholds: Thresholds | None
    stream: str


class DriftMonitors:
    """Drift of scores from the calibration, per stream; none for a teacher without a calibration histogram."""

    def __init__(self, teacher: str, histogram: Sequence[int], recorder: Recorder) -> None:
        self._monitors: dict[str, DriftMonitor] = {}
        if sum(histogram):
            for stream in _STREAMS:
                calibration = ScoreHistogram.of_cosines(histogram)
                self._monitors[stream] = DriftMonitor(calibration, recorder, stream=stream, teacher=teacher)

    def add(self, stream: str, verdicts: Sequence[Verdict]) -> None:
        """Add the scores of judged rows; rows without text have none."""
        monitor = self._monitors.get(stream)
        if monitor is not None:
            monitor.add([unit_score(verdict.score) for verdict in verdicts if verdict.windows])

    def close(self) -> None:
        """Remove the gauges of a teacher that was replaced."""
        for monitor in self._monitors.values():
            monitor.close()


class TeacherReplica:
    """Judges lists of conversations; concurrent calls share forward batches.

    Serve calls `reconfigure` with the deployment's `user_config` before the first request and whenever it changes. A
    new teacher is loaded and checked while the old one keeps answering; so is one that the link `teacher` shows now,
    which is looked up at every health check.
    """

    def __init__(self, recorder: Recorder | None = None, tracer: Tracer | None = None) -> None:
        self._recorder = recorder or NullRecorder()
        self._tracer = tracer or Tracer()
        self._teacher: LoadedTeacher | None = None
        self._load_error: str | None = None
        self._drift: DriftMonitors | None = None
        self._batcher: Batcher[Call, ModerationBatch] = Batcher(
            self._run, TeacherArgs().batch_tokens, self._record_wait
        )
        self._replacing: asyncio.Task[None] | None = None
        self._wanted = TeacherArgs()
        self._refused: TeacherArgs | None = None

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Load the configured teacher; any but the first in the background.

        Serve sends no requests to a replica while it reconfigures. If a later teacher fails to load, the error is
        logged and shown by `GET /v1/teacher`, and the old one stays.
        """
        self._wanted = TeacherArgs.of(user_config, "user_config")
        args = pinned(self._wanted)
        if self._teacher is None:
            self._use(await self._batcher.alone(partial(load_teacher, args)))
        else:
            self._replacing = asyncio.create_task(self._replace(args, self._replacing))

    async def _replace(self, args: TeacherArgs, earlier: asyncio.Task[None] | None) -> None:
        if earlier is not None:
            await earlier
        if args == self._ready().args:
            self._load_error = None
            return
        try:
            # A temporary thread, so that batches continue; Batcher says why it must not stay.
            executor = ThreadPoolExecutor(1)
            loading = asyncio.get_running_loop().run_in_executor(executor, load_teacher, args)
            executor.shutdown(wait=False)
            self._use(await loading)
        except Exception as error:
            self._load_error, self._refused = str(error), args
            logger.exception("the new teacher was rejected, %s stays", self._ready().plain.teacher_id)

    def _use(self, loaded: LoadedTeacher) -> None:
        if self._drift is not None:
            self._drift.close()
        if self._teacher is not None:
            clear_canaries(self._recorder, self._teacher.plain.teacher_id)
        self._drift = DriftMonitors(loaded.plain.teacher_id, loaded.histogram, self._recorder)
        self._announce(loaded)
        self._record_canaries(loaded, loaded.expected)
        self._teacher, self._load_error = loaded, None
        # The scorer cuts forward batches itself; it gets a few at once, so that sorting by length pays.
        self._batcher.budget = 4 * loaded.args.batch_tokens
        logger.info("teacher %s is ready", loaded.plain.teacher_id)

    async def judge(
        self,
        conversations: Sequence[Conversation],
        thresholds: Thresholds | None,
        seconds: float,
        urgent: bool,
        owner: str | None = None,
    ) -> ModerationBatch | None:
        """Verdicts in order, or None if `seconds` passed before the call's batch started.

        The calls of each `owner` wait for its own calls, and take turns with those of others.
        """
        texts = [turn.content for conversation in conversations for turn in conversation]
        call = Call(tuple(conversations), thresholds, "moderation" if urgent else "screening")
        deadline = time.monotonic() + seconds
        with self._tracer.span("moderation", self._ready().plain.teacher_id, stream=call.stream) as span:
            try:
                batch = await self._batcher.submit(call, approximate_tokens(texts), deadline, urgent, owner)
            except ExpiredError:
                return None
            for verdict in batch.verdicts:
                span.add_verdict(verdict.score, verdict.decision)
            return batch

    async def info(self) -> TeacherInfo:
        """The current teacher, and why a newer one failed to load."""
        teacher = self._ready()
        plain = teacher.plain
        details: dict[str, object] = {"canary_scores": [round(score, 6) for score in teacher.expected]}
        for name in ("layer", "window_tokens", "padding_share"):
            value = getattr(plain, name, None)
            if value is not None:
                details[name] = value
        if self._load_error is not None:
            details["refused_update"] = self._load_error
        return info_of(plain, details)

    async def check_health(self) -> None:
        """Score the canary pair between two batches; Serve replaces the replica if this raises."""
        teacher = self._ready()
        scores = await self._batcher.alone(teacher.canary_scores)
        if teacher is self._teacher:
            # The gauges of a teacher that was replaced meanwhile are already removed.
            self._record_canaries(teacher, scores)
        teacher.check(scores)
        args = pinned(self._wanted)
        replacing = self._replacing is not None and not self._replacing.done()
        if args not in (teacher.args, self._refused) and not replacing:
            self._replacing = asyncio.create_task(self._replace(args, None))

    def _ready(self) -> LoadedTeacher:
        if self._teacher is None:
            raise ReftError("no teacher is configured: set user_config of the deployment Teacher")
        return self._teacher

    def _announce(self, teacher: LoadedTeacher) -> None:
        plain = teacher.plain
        self._recorder.set(
            catalog.TEACHER_INFO,
            1,
            teacher=plain.teacher_id,
            layer=str(getattr(plain, "layer", "none")),
            review_threshold=f"{plain.thresholds.review:.4f}",
            block_threshold=f"{plain.thresholds.block:.4f}",
        )

    def _record_canaries(self, teacher: LoadedTeacher, scores: Sequence[float]) -> None:
        if decisions := teacher.canary_decisions(scores):
            record_canaries(self._recorder, decisions[:1], decisions[1:], teacher=teacher.plain.teacher_id)

    def _record_wait(self, seconds: float) -> None:
        waiting = sum(len(call.conversations) for call in self._batcher.items)
        self._recorder.set(catalog.FILTER_QUEUE_DEPTH, waiting)
        self._recorder.observe(catalog.FILTER_QUEUE_SECONDS, seconds)

    def _run(self, calls: Sequence[Call]) -> list[ModerationBatch]:
        """Judge one batch of calls; runs in the batcher's thread."""
        teacher = self._ready()
        before, tokenising = _counters(teacher), _tokenise_seconds(teacher)
        started = time.perf_counter()
        # Nearly always one group: requests rarely override the thresholds.
        groups: dict[Thresholds | None, list[int]] = {}
        for index, call in enumerate(calls):
            groups.setdefault(call.thresholds, []).append(index)
        batches: dict[int, ModerationBatch] = {}
        for thresholds, indices in groups.items():
            rows = [conversation for index in indices for conversation in calls[index].conversations]
            policy = Rules(teacher.plain.teacher_id, thresholds or teacher.plain.thresholds).version
            verdicts = iter(judge(teacher.cached, rows, thresholds))
            for index in indices:
                batch = [next(verdicts) for _ in calls[index].conversations]
                batches[index] = ModerationBatch(teacher.plain.teacher_id, batch, policy)
                if self._drift is not None:
                    self._drift.add(calls[index].stream, batch)
        tokenising = _tokenise_seconds(teacher) - tokenising
        self._recorder.observe(catalog.FILTER_TOKENISE_SECONDS, tokenising)
        self._recorder.observe(catalog.FILTER_FORWARD_SECONDS, time.perf_counter() - started - tokenising)
        self._recorder.observe(catalog.FILTER_BATCH_ROWS, sum(len(call.conversations) for call in calls))
        self._count(before, _counters(teacher))
        return [batches[index] for index in range(len(calls))]

    def _count(self, before: tuple[int, ...], after: tuple[int, ...]) -> None:
        hits, misses, text, computed = (new - old for new, old in zip(after, before, strict=True))
        self._recorder.count(catalog.FILTER_CACHE, hits, result="hit")
        self._recorder.count(catalog.FILTER_CACHE, misses, result="miss")
        self._recorder.count(catalog.FILTER_TOKENS, text, content="text")
        self._recorder.count(catalog.FILTER_TOKENS, computed - text, content="padding")
        if computed:
            self._recorder.observe(catalog.FILTER_BATCH_TOKENS, computed)


def _counters(teacher: LoadedTeacher) -> tuple[int, ...]:
    """Cache hits and misses, text tokens and computed tokens so far; 0 for what the scorer does not count."""
    cached, plain = teacher.cached, teacher.plain
    counts = [(cached, "hits"), (cached, "misses"), (plain, "tokens_run"), (plain, "tokens_padded")]
    return tuple(int(getattr(owner, name, 0)) for owner, name in counts)


def _tokenise_seconds(teacher: LoadedTeacher) -> float:
    """Seconds spent on tokenising so far; 0 for a scorer that does not measure it."""
    return float(getattr(teacher.plain, "tokenise_seconds", 0.0))
