"""`GET /v1/teacher`: which teacher answers, and how it decides."""

from __future__ import annotations

from fastapi import APIRouter

from reft_ray.api.context import Filter
from reft_ray.api.moderator import ModeratorError
from reft_ray.api.schema import Teacher


def router(guard: Filter) -> APIRouter:
    """The teacher route."""
    routes = APIRouter(tags=["teacher"])

    @routes.get("/teacher")
    async def teacher() -> Teacher:
        """The teacher that answers, its thresholds and its calibration."""
        try:
            info = await guard.judge.info()
        except ModeratorError as error:
            raise guard.failure(error) from None
        return Teacher(
            id=info.id,
            thresholds={"review": info.thresholds.review, "block": info.thresholds.block},
            calibration={"slope": info.slope, "intercept": info.intercept},
            details=dict(info.details),
        )

    return routes
