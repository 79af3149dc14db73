"""The replica that holds a teacher: a plain class over lists, made a deployment in `app`."""

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
from reft_ray.core.conversation import Conversation
from reft_ray.core.errors import ReftError
from reft_ray.core.scoring import judge
from reft_ray.core.verdict import Thresholds, Verdict
from reft_ray.serving.args import TeacherArgs
from reft_ray.serving.batcher import Batcher, ExpiredError
from reft_ray.serving.loading import LoadedTeacher, approximate_tokens, load_teacher
from reft_ray.telemetry import catalog
from reft_ray.telemetry.drift import DriftMonitor, ScoreHistogram
from reft_ray.telemetry.recorder import NullRecorder, Recorder
from reft_ray.telemetry.tracing import Tracer
from reft_ray.telemetry.verdict_metrics import clear_canaries, record_canaries, unit_score

logger = logging.getLogger(__name__)

_STREAMS = ("moderation", "screening")


@dataclass(frozen=True, slots=True)
class Work:
    """One call: conversations under one pair of thresholds, None for the teacher's; `stream` is for telemetry."""

    conversations: tuple[Conversation, ...]
    thresholds: Thresholds | None
    stream: str


class DriftMonitors:
    """One monitor per stream; silent for a teacher without a calibration histogram."""

    def __init__(self, teacher: str, histogram: Sequence[int], recorder: Recorder) -> None:
        self._monitors: dict[str, DriftMonitor] = {}
        if sum(histogram):
            for stream in _STREAMS:
                calibration = ScoreHistogram.of_cosines(histogram)
                self._monitors[stream] = DriftMonitor(calibration, recorder, stream=stream, teacher=teacher)

    def add(self, stream: str, verdicts: Sequence[Verdict]) -> None:
        """Take the scores of judged rows; rows without text have none."""
        monitor = self._monitors.get(stream)
        if monitor is not None:
            monitor.add([unit_score(verdict.score) for verdict in verdicts if verdict.windows])

    def close(self) -> None:
        """Forget the gauges of a teacher that no longer answers."""
        for monitor in self._monitors.values():
            monitor.close()


class TeacherReplica:
    """Judges lists of conversations; calls that arrive together share forward batches.

    The teacher comes with `reconfigure`, which Serve calls with the deployment's `user_config` before the first
    request and whenever it changes: a new teacher is loaded and checked beside the old one, which answers until then.
    """

    def __init__(self, recorder: Recorder | None = None, tracer: Tracer | None = None) -> None:
        self._recorder = recorder or NullRecorder()
        self._tracer = tracer or Tracer()
        self._teacher: LoadedTeacher | None = None
        self._refused: str | None = None
        self._drift: DriftMonitors | None = None
        self._batcher: Batcher[Work, ModerationBatch] = Batcher(self._run, TeacherArgs().batch_tokens, self._waited)
        self._switching: asyncio.Task[None] | None = None

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take the configured teacher: at once when it is the first, else in the background.

        Serve routes nothing to a replica that reconfigures, so that a later teacher must not be waited for. One that
        cannot be had is refused, loudly, and the old one goes on: `GET /v1/teacher` shows why.
        """
        args = TeacherArgs.of(user_config, "user_config")
        if self._teacher is None:
            self._take(await self._batcher.alone(partial(load_teacher, args)))
        else:
            self._switching = asyncio.create_task(self._switch(args, self._switching))

    async def _switch(self, args: TeacherArgs, earlier: asyncio.Task[None] | None) -> None:
        if earlier is not None:
            await earlier
        if args == self._ready().args:
            self._refused = None
            return
        try:
            # Beside the batches, in a thread that ends: see Batcher.
            brief = ThreadPoolExecutor(1)
            loading = asyncio.get_running_loop().run_in_executor(brief, load_teacher, args)
            brief.shutdown(wait=False)
            self._take(await loading)
        except Exception as error:
            self._refused = str(error)
            logger.exception("the new teacher is refused, %s goes on", self._ready().plain.teacher_id)

    def _take(self, loaded: LoadedTeacher) -> None:
        if self._drift is not None:
            self._drift.close()
        if self._teacher is not None:
            clear_canaries(self._recorder, self._teacher.plain.teacher_id)
        self._drift = DriftMonitors(loaded.plain.teacher_id, loaded.histogram, self._recorder)
        self._announce(loaded)
        self._record_canaries(loaded, loaded.expected)
        self._teacher, self._refused = loaded, None
        # One forward batch is the scorer's own matter; a turn holds a few, so that sorting by length pays.
        self._batcher.budget = 4 * loaded.args.batch_tokens
        logger.info("teacher %s answers", loaded.plain.teacher_id)

    async def judge(
        self, conversations: Sequence[Conversation], thresholds: Thresholds | None, seconds: float, urgent: bool
    ) -> ModerationBatch | None:
        """Verdicts in order, or None when the `seconds` ran out before the call's turn came."""
        texts = [turn.content for conversation in conversations for turn in conversation]
        work = Work(tuple(conversations), thresholds, "moderation" if urgent else "screening")
        deadline = time.monotonic() + seconds
        with self._tracer.span("moderation", self._ready().plain.teacher_id, stream=work.stream) as span:
            try:
                judgement = await self._batcher.submit(work, approximate_tokens(texts), deadline, urgent)
            except ExpiredError:
                return None
            for verdict in judgement.verdicts:
                span.add_verdict(verdict.score, verdict.decision)
            return judgement

    async def info(self) -> TeacherInfo:
        """The teacher that answers, and why a newer one does not."""
        teacher = self._ready()
        plain = teacher.plain
        details: dict[str, object] = {"canary_scores": [round(score, 6) for score in teacher.expected]}
        for name in ("layer", "window_tokens", "padding_share"):
            value = getattr(plain, name, None)
            if value is not None:
                details[name] = value
        if self._refused is not None:
            details["refused_update"] = self._refused
        return info_of(plain, details)

    async def check_health(self) -> None:
        """Score the canary pair between two batches; raises when the scores are wrong: Serve replaces the replica."""
        teacher = self._ready()
        scores = await self._batcher.alone(teacher.canary_scores)
        if teacher is self._teacher:
            # A teacher that was replaced meanwhile has had its gauges forgotten.
            self._record_canaries(teacher, scores)
        teacher.check(scores)

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

    def _waited(self, seconds: float) -> None:
        waiting = sum(len(work.conversations) for work in self._batcher.items)
        self._recorder.set(catalog.FILTER_QUEUE_DEPTH, waiting)
        self._recorder.observe(catalog.FILTER_QUEUE_SECONDS, seconds)

    def _run(self, works: Sequence[Work]) -> list[ModerationBatch]:
        """One turn of the teacher; runs in a thread."""
        teacher = self._ready()
        before, tokenised = _counters(teacher), _tokenise_seconds(teacher)
        started = time.perf_counter()
        # Nearly always one group: overrides of the thresholds are rare, and a text seen twice is in the cache.
        groups: dict[Thresholds | None, list[int]] = {}
        for index, work in enumerate(works):
            groups.setdefault(work.thresholds, []).append(index)
        judgements: dict[int, ModerationBatch] = {}
        for thresholds, indices in groups.items():
            rows = [conversation for index in indices for conversation in works[index].conversations]
            verdicts = iter(judge(teacher.cached, rows, thresholds))
            for index in indices:
                own = [next(verdicts) for _ in works[index].conversations]
                judgements[index] = ModerationBatch(teacher.plain.teacher_id, own)
                if self._drift is not None:
                    self._drift.add(works[index].stream, own)
        tokenising = _tokenise_seconds(teacher) - tokenised
        self._recorder.observe(catalog.FILTER_TOKENISE_SECONDS, tokenising)
        self._recorder.observe(catalog.FILTER_FORWARD_SECONDS, time.perf_counter() - started - tokenising)
        self._recorder.observe(catalog.FILTER_BATCH_ROWS, sum(len(work.conversations) for work in works))
        self._count(before, _counters(teacher))
        return [judgements[index] for index in range(len(works))]

    def _count(self, before: tuple[int, ...], after: tuple[int, ...]) -> None:
        hits, misses, text, computed = (new - old for new, old in zip(after, before, strict=True))
        self._recorder.count(catalog.FILTER_CACHE, hits, result="hit")
        self._recorder.count(catalog.FILTER_CACHE, misses, result="miss")
        self._recorder.count(catalog.FILTER_TOKENS, text, content="text")
        self._recorder.count(catalog.FILTER_TOKENS, computed - text, content="padding")
        if computed:
            self._recorder.observe(catalog.FILTER_BATCH_TOKENS, computed)


def _counters(teacher: LoadedTeacher) -> tuple[int, ...]:
    """Cache hits and misses, text tokens and computed tokens so far; 0 for what this scorer does not count."""
    cached, plain = teacher.cached, teacher.plain
    counts = [(cached, "hits"), (cached, "misses"), (plain, "tokens_run"), (plain, "tokens_padded")]
    return tuple(int(getattr(owner, name, 0)) for owner, name in counts)


def _tokenise_seconds(teacher: LoadedTeacher) -> float:
    """Seconds that the scorer has spent on tokens so far; 0 for one that has none."""
    return float(getattr(teacher.plain, "tokenise_seconds", 0.0))
