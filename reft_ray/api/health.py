"""`/healthz`: this process answers. `/readyz`: verdicts can be had."""

from __future__ import annotations

import time

from fastapi import APIRouter

from reft_ray.api.errors import busy
from reft_ray.api.moderator import Moderator, ModeratorError, OverloadedError
from reft_ray.core.conversation import chat

READY_SECONDS = 5.0


def router(judge: Moderator) -> APIRouter:
    """The health routes; they need no key."""
    routes = APIRouter(tags=["health"])

    @routes.get("/healthz")
    async def healthz() -> dict[str, str]:
        """Alive."""
        return {"status": "ok"}

    @routes.get("/readyz")
    async def readyz() -> dict[str, str]:
        """Ready: a teacher has just judged a prompt. 503 otherwise."""
        try:
            judgement = await judge.judge([chat("Good morning.")], None, time.monotonic() + READY_SECONDS)
        except OverloadedError:
            # A full queue is work in progress: taking the replica out of rotation would make it worse.
            return {"status": "busy"}
        except ModeratorError:
            raise busy("No teacher answers.", 2, status=503) from None
        return {"status": "ok", "teacher": judgement.teacher}

    return routes
