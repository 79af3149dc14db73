"""`POST /v1/moderations`, for the openai client unchanged."""

from __future__ import annotations

import time
import uuid
from typing import Any

from fastapi import APIRouter, Header
from fastapi.responses import JSONResponse

from reft_ray.api.context import Filter, finite
from reft_ray.api.errors import ApiError, invalid
from reft_ray.api.moderator import ModeratorError
from reft_ray.api.schema import HARMFUL, OPENAI_CATEGORIES, Moderation, ModerationRequest
from reft_ray.core.conversation import Message, readable
from reft_ray.core.verdict import Decision, Verdict

# The names that OpenAI's clients send by default; each means the teacher that answers here.
ALIASES = frozenset(
    {
        "omni-moderation-latest",
        "omni-moderation-2024-09-26",
        "text-moderation-latest",
        "text-moderation-stable",
        "text-moderation-007",
    }
)


def router(guard: Filter) -> APIRouter:
    """The moderation route."""
    routes = APIRouter(tags=["moderations"])

    @routes.post("/moderations", response_model=Moderation)
    async def moderate(
        request: ModerationRequest,
        timeout_ms: int | None = Header(
            default=None, alias="x-request-timeout-ms", ge=1, description="A deadline shorter than the server's."
        ),
    ) -> JSONResponse:
        """Moderator texts: allow, review or block."""
        with guard.timed("moderation"):
            return JSONResponse(await _moderate(guard, request, timeout_ms))

    return routes


async def _moderate(guard: Filter, request: ModerationRequest, timeout_ms: int | None) -> dict[str, Any]:
    seconds = guard.settings.moderation_seconds
    deadline = time.monotonic() + (seconds if timeout_ms is None else min(seconds, timeout_ms / 1000))
    inputs = request.texts()
    if len(inputs) > guard.settings.max_inputs:
        raise invalid(f"input has {len(inputs)} texts, at most {guard.settings.max_inputs} are judged at once", "input")
    overrides = request.reft
    thresholds = await guard.thresholds(overrides.review, overrides.block) if overrides else None
    conversations = [tuple(Message("user", readable(text)) for text in texts) for texts in inputs]
    try:
        judgement = await guard.judge.judge(conversations, thresholds, deadline)
    except ModeratorError as error:
        raise guard.failure(error) from None
    if request.model not in ALIASES and request.model != judgement.teacher:
        raise ApiError(
            404,
            f"The model does not exist: this service judges as {judgement.teacher}, or under OpenAI's moderation names",
            param="model",
            code="model_not_found",
        )
    guard.record(judgement, "moderation")
    return {
        "id": f"modr-{uuid.uuid4().hex}",
        "model": judgement.teacher,
        "results": [result(verdict, judgement.teacher) for verdict in judgement.verdicts],
    }


def result(verdict: Verdict, teacher: str) -> dict[str, Any]:
    """One result in OpenAI's form.

    All of OpenAI's categories are there, because its client reads a missing one as not flagged; the teacher has no
    view on them, hence no applied input type. `harmful` is its own.
    """
    flagged = verdict.decision is not Decision.ALLOW
    return {
        "flagged": flagged,
        "categories": dict.fromkeys(OPENAI_CATEGORIES, False) | {HARMFUL: flagged},
        "category_scores": dict.fromkeys(OPENAI_CATEGORIES, 0.0) | {HARMFUL: finite(verdict.probability) or 0.0},
        "category_applied_input_types": {category: [] for category in OPENAI_CATEGORIES} | {HARMFUL: ["text"]},
        "reft": evidence(verdict) | {"similarity": finite(verdict.score), "teacher": teacher},
    }


def evidence(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON values."""
    return {
        "decision": verdict.decision.value,
        "score": finite(verdict.score),
        "probability": finite(verdict.probability),
        "threshold": verdict.threshold,
        "part": verdict.part,
        "encoding": verdict.encoding,
        "windows": verdict.windows,
        "truncated": verdict.truncated,
    }
