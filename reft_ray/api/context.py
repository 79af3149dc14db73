"""What the filter's routes share: moderator, limits and metrics."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from fastapi import Request

from reft_ray.api.errors import ApiError, busy, invalid
from reft_ray.api.moderator import (
    DeadlineError,
    GuardError,
    ModerationBatch,
    Moderator,
    ModeratorError,
    OverloadedError,
    UnavailableError,
)
from reft_ray.api.settings import Bounds, FilterSettings
from reft_ray.api.shares import Shares
from reft_ray.core.verdict import Thresholds
from reft_ray.telemetry import catalog
from reft_ray.telemetry.recorder import Recorder
from reft_ray.telemetry.verdict_metrics import record_verdicts


def owner_of(request: Request) -> str | None:
    """The project of the caller; None for a filter without keys."""
    project: str | None = getattr(request.state, "project", None)
    return project


async def charge(request: Request, texts: int) -> None:
    """Charge the caller's project for `texts` bytes that the teacher is to read. Raises ApiError 429."""
    gate, principal = request.state.gate, request.state.principal
    if gate is not None:
        await asyncio.to_thread(gate.charge, request, principal, texts)


@dataclass(frozen=True, slots=True)
class FilterContext:
    """The online filter, as its routes use it."""

    moderator: Moderator
    settings: FilterSettings
    recorder: Recorder
    turns: Shares = field(default_factory=lambda: Shares(1))
    """Whose rows are read or written next; see `shares.step_aside`."""

    async def thresholds(self, review: float | None, block: float | None) -> Thresholds | None:
        """The thresholds of a request; None for the teacher's own.

        Raises ApiError 400 outside the operator's bounds, 503 when no teacher answers.
        """
        if review is None and block is None:
            return None
        try:
            own = (await self.moderator.info()).thresholds
        except ModeratorError as error:
            raise self.failure(error) from None
        block = _within("block", own.block if block is None else block, own.block, self.settings.block_bounds)
        # A stricter block threshold lowers the teacher's review threshold too.
        review = min(own.review, block) if review is None else review
        review = _within("review", review, own.review, self.settings.review_bounds)
        if review > block:
            raise invalid(f"reft.review ({review}) must not exceed reft.block ({block})", "reft.review")
        return Thresholds(review, block)

    def failure(self, error: ModeratorError) -> ApiError:
        """Count a missing verdict and return its error response."""
        match error:
            case OverloadedError():
                self.recorder.count(catalog.FILTER_SHED, reason="queue_full")
                return busy("The filter is at capacity. Nothing was judged; try again later.", error.retry_after)
            case DeadlineError():
                self.recorder.count(catalog.FILTER_ERRORS, error_type="deadline")
                return ApiError(504, "No verdict within the deadline. Nothing was judged.", code="deadline_exceeded")
            case GuardError():
                self.recorder.count(catalog.FILTER_ERRORS, error_type="guard")
                return busy("A guard gave no verdict. Nothing was judged; try again later.", 2, status=503)
            case UnavailableError():
                self.recorder.count(catalog.FILTER_ERRORS, error_type="teacher_unavailable")
                return busy("No teacher answers. Nothing was judged; try again later.", 2, status=503)
            case _:
                self.recorder.count(catalog.FILTER_ERRORS, error_type="scorer")
                return ApiError(500, "The teacher failed on this input. Nothing was judged.", code="teacher_failed")

    def record(self, batch: ModerationBatch, stream: str) -> None:
        """Count verdicts."""
        verdicts = batch.verdicts
        record_verdicts(
            self.recorder,
            [verdict.decision for verdict in verdicts],
            [verdict.reason for verdict in verdicts],
            [verdict.score for verdict in verdicts],
            stream=stream,
            policy="online",
            teacher=batch.teacher,
        )
        truncated = sum(verdict.truncated for verdict in verdicts)
        if truncated:
            self.recorder.count(catalog.FILTER_TRUNCATIONS, truncated, stream=stream)

    @contextmanager
    def timed(self, stream: str) -> Iterator[None]:
        """Observe the seconds that the block takes."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.recorder.observe(catalog.FILTER_REQUEST_SECONDS, time.perf_counter() - started, stream=stream)


def rounded(score: float) -> float | None:
    """Round a score for JSON; None for NaN and infinities, which JSON does not have."""
    return round(score, 6) if math.isfinite(score) else None


def _within(name: str, value: float, own: float, bounds: Bounds | None) -> float:
    allowed = bounds or Bounds(lowest=-1.0, highest=own)
    if not allowed.lowest <= value <= allowed.highest:
        raise invalid(
            f"reft.{name} must be between {allowed.lowest:g} and {allowed.highest:g}, the operator's bounds",
            f"reft.{name}",
        )
    return value
