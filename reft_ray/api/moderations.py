"""`POST /v1/moderations`, compatible with OpenAI's client, and `GET /v1/teacher`."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import APIRouter, Header, Request
from fastapi.responses import JSONResponse

from reft_ray.api.context import FilterContext, charge, rounded
from reft_ray.api.errors import ApiError, invalid
from reft_ray.api.moderator import ModerationBatch, ModeratorError
from reft_ray.api.schema import HARMFUL, Moderation, ModerationRequest, Teacher
from reft_ray.core.cascade import GuardedVerdict
from reft_ray.core.conversation import Message
from reft_ray.core.hazards import OPENAI_CATEGORIES
from reft_ray.core.verdict import Decision, Verdict
from reft_ray.rows.text import readable

# The names that OpenAI's clients send; each means the teacher of this service.
ALIASES = frozenset(
    {
        "omni-moderation-latest",
        "omni-moderation-2024-09-26",
        "text-moderation-latest",
        "text-moderation-stable",
        "text-moderation-007",
    }
)


def router(context: FilterContext) -> APIRouter:
    """The routes of moderation and of the teacher."""
    routes = APIRouter()

    @routes.post("/moderations", response_model=Moderation, tags=["moderations"])
    async def moderate(
        http: Request,
        request: ModerationRequest,
        timeout_ms: int | None = Header(
            default=None, alias="x-request-timeout-ms", ge=1, description="A deadline below the server's."
        ),
    ) -> JSONResponse:
        """Moderate texts: allow, review or block."""
        await charge(http, sum(len(text.encode("utf-8", "replace")) for texts in request.texts() for text in texts))
        with context.timed("moderation"):
            return JSONResponse(await _moderate(context, request, timeout_ms))

    @routes.get("/teacher", tags=["teacher"])
    async def teacher() -> Teacher:
        """The current teacher with its thresholds and calibration."""
        try:
            info = await context.moderator.info()
        except ModeratorError as error:
            raise context.failure(error) from None
        return Teacher(
            id=info.id,
            thresholds={"review": info.thresholds.review, "block": info.thresholds.block},
            calibration={"slope": info.slope, "intercept": info.intercept},
            details=dict(info.details),
        )

    return routes


async def _moderate(context: FilterContext, request: ModerationRequest, timeout_ms: int | None) -> dict[str, Any]:
    seconds = context.settings.moderation_seconds
    deadline = time.monotonic() + (seconds if timeout_ms is None else min(seconds, timeout_ms / 1000))
    inputs = request.texts()
    if len(inputs) > context.settings.max_inputs:
        raise invalid(
            f"input has {len(inputs)} texts, at most {context.settings.max_inputs} are judged at once", "input"
        )
    overrides = request.reft
    thresholds = await context.thresholds(overrides.review, overrides.block) if overrides else None
    conversations = [tuple(Message("user", readable(text)) for text in texts) for texts in inputs]
    try:
        batch = await context.moderator.judge(conversations, thresholds, deadline)
    except ModeratorError as error:
        raise context.failure(error) from None
    if request.model not in ALIASES and request.model != batch.teacher:
        raise ApiError(
            404,
            f"The model does not exist; use {batch.teacher} or one of OpenAI's moderation models.",
            param="model",
            code="model_not_found",
        )
    context.record(batch, "moderation")
    return {
        "id": f"modr-{uuid.uuid4().hex}",
        "model": batch.teacher,
        "results": [result(verdict, batch) for verdict in batch.verdicts],
    }


def result(verdict: Verdict, batch: ModerationBatch) -> dict[str, Any]:
    """One result in OpenAI's format.

    All of OpenAI's categories are present, because its client reads a missing one as not flagged. The teacher judges
    `harmful` only; a guard that flagged the text adds its categories, with its probability as their score. The others
    have no applied input type.
    """
    flagged = verdict.decision is not Decision.ALLOW
    scores = {HARMFUL: rounded(verdict.probability) or 0.0}
    if isinstance(verdict, GuardedVerdict) and verdict.guard_score is not None and flagged:
        scores[HARMFUL] = max(scores[HARMFUL], rounded(verdict.guard_score) or 0.0)
        scores |= dict.fromkeys(verdict.categories, rounded(verdict.guard_score) or 0.0)
    return {
        "flagged": flagged,
        "categories": dict.fromkeys(OPENAI_CATEGORIES, False) | dict.fromkeys(scores, flagged),
        "category_scores": dict.fromkeys(OPENAI_CATEGORIES, 0.0) | scores,
        "category_applied_input_types": {name: [] for name in OPENAI_CATEGORIES} | {name: ["text"] for name in scores},
        "reft": evidence(verdict)
        | {"similarity": rounded(verdict.score), "teacher": batch.teacher, "policy": batch.policy},
    }


def evidence(verdict: Verdict) -> dict[str, Any]:
    """The JSON fields of a verdict; `decided_by` is null where the teacher decided alone, without guards."""
    guards = verdict if isinstance(verdict, GuardedVerdict) else None
    return {
        "decision": verdict.decision.value,
        "score": rounded(verdict.score),
        "probability": rounded(verdict.probability),
        "threshold": verdict.threshold,
        "part": verdict.part,
        "encoding": verdict.encoding,
        "windows": verdict.windows,
        "truncated": verdict.truncated,
        "span": verdict.span,
        "categories": verdict.categories,
        "hazards": verdict.hazards,
        "decided_by": guards and guards.decided_by,
        "guard_score": guards and guards.guard_score,
    }
