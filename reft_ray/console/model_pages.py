"""A model next to its base and its reference, and the teacher that judges them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import aclosing
from typing import Annotated, Any

from fastapi import APIRouter, Form, Query, Request
from fastapi.responses import HTMLResponse

from reft_ray.api.chat_model import ChatError, ChatModel, Target
from reft_ray.api.errors import ApiError
from reft_ray.api.moderator import Moderator, ModeratorError
from reft_ray.api.stores import Stores
from reft_ray.console import charts
from reft_ray.console.page import Site, route_class
from reft_ray.console.text import pieces
from reft_ray.core.completion import Sampling
from reft_ray.core.conversation import chat as conversation
from reft_ray.jobs.card import CARD_NAME
from reft_ray.jobs.files import job_key
from reft_ray.jobs.models import Student
from reft_ray.jobs.review_stats import teacher_stats

MODERATION_SECONDS = 10.0
ANSWER_TOKENS = 200
PROMPT_CHARACTERS = 4000


def router(
    site: Site,
    stores: Stores,
    moderator: Moderator,
    chat: ChatModel,
    references: Mapping[str, str],
    quality: Mapping[str, object],
) -> APIRouter:
    """The routes of models and of the teacher."""
    routes = APIRouter(route_class=route_class(site))
    sessions = site.sessions

    @routes.get("/models")
    def list_models(request: Request) -> HTMLResponse:
        session = sessions.required(request)
        found = stores.models.list(session.principal.visible)
        return site.page("models", session, title="Models", models=found, bases=list(stores.settings.base_models))

    @routes.get("/models/{model:path}")
    def model_page(request: Request, model: str) -> HTMLResponse:
        session = sessions.required(request)
        student = _student(model, session.principal.visible)
        return site.page("model", session, title="Model", model=student, card=_card(student), answers=None, prompt="")

    @routes.post("/models/{model:path}")
    async def try_model(
        request: Request,
        model: str,
        prompt: Annotated[str, Form(min_length=1, max_length=PROMPT_CHARACTERS)],
        csrf: Annotated[str, Form(max_length=100)] = "",
    ) -> HTMLResponse:
        session = await asyncio.to_thread(sessions.posted, request, csrf)
        session.need("chat")
        student = await asyncio.to_thread(_student, model, session.principal.visible)
        base = stores.settings.base_models.get(student.base_model)
        if base is None:
            raise ApiError(404, f"The base model {student.base_model} is no longer served.")
        adapters = {"base": None, "this model": student.uri, "reference": references.get(student.base_model)}
        targets = {
            name: Target(student.id if name == "this model" else student.base_model, student.base_model, base.uri, uri)
            for name, uri in adapters.items()
            if name != "reference" or uri is not None
        }
        answers = await asyncio.gather(*(_answer(target, prompt) for target in targets.values()))
        named = dict(zip(targets, answers, strict=True))
        card = await asyncio.to_thread(_card, student)
        return site.page("model", session, title="Model", model=student, card=card, answers=named, prompt=prompt)

    @routes.get("/teacher")
    async def teacher_page(
        request: Request, false_positives: Annotated[float | None, Query(ge=0, le=1)] = None
    ) -> HTMLResponse:
        session = await asyncio.to_thread(sessions.required, request)
        session.need("reviews.read")
        if session.is_owner:
            raise ApiError(403, "This page is for the operator's people.")
        try:
            info = await moderator.info()
        except ModeratorError:
            info = None
        stats = await asyncio.to_thread(lambda: list(teacher_stats(stores.database)))
        return site.page(
            "teacher",
            session,
            title="Teacher",
            info=info,
            stats=stats,
            quality=quality.get("quality", {}),
            sources=quality.get("per_source", {}),
            bars=charts.histogram(_numbers(quality.get("histogram"))),
            curves=_curves(quality),
            marks={} if info is None else _marks(info),
            false_positives=false_positives,
            recall=_recall_at(quality, false_positives),
        )

    def _student(model: str, visible: str | None) -> Student:
        return stores.models.get(model, visible)

    def _card(student: Student) -> str | None:
        key = f"{job_key(student.project_id, student.job_id)}/export/{CARD_NAME}"
        try:
            return b"".join(stores.files.content.read(key)).decode("utf-8", "replace")
        except FileNotFoundError:
            return None

    async def _answer(target: Target, prompt: str) -> dict[str, Any]:
        """A model's answer and the teacher's verdict on it."""
        turns, text = conversation(prompt), ""
        try:
            async with aclosing(chat.generate(target, turns, Sampling(max_tokens=ANSWER_TOKENS))) as found:  # type: ignore[type-var]
                async for piece in found:
                    text += piece.text
        except ChatError as error:
            return {"error": str(error), "pieces": (), "verdict": None}
        try:
            deadline = time.monotonic() + MODERATION_SECONDS
            batch = await moderator.judge([conversation(prompt, text)], None, deadline)
        except ModeratorError:
            return {"error": None, "pieces": pieces(text), "verdict": None}
        return {"error": None, "pieces": pieces(text), "verdict": batch.verdicts[0]}

    return routes


def _marks(info: Any) -> dict[str, tuple[float, float]]:
    limits = {"review": info.thresholds.review, "block": info.thresholds.block}
    return {name: (value, charts.at(value)) for name, value in limits.items()}


def _numbers(values: object) -> list[int]:
    return [int(value) for value in values] if isinstance(values, list) else []


def _curves(quality: Mapping[str, object]) -> dict[str, list[charts.Curve]]:
    found = quality.get("curves")
    if not isinstance(found, Mapping):
        return {}
    return {name: charts.curves({name: [(x, y) for x, y in points]}, top=1.0) for name, points in found.items()}


def _recall_at(quality: Mapping[str, object], rate: float | None) -> float | None:
    """The recall of the ROC curve at a false-positive rate."""
    found = quality.get("curves")
    if rate is None or not isinstance(found, Mapping):
        return None
    return max((recall for x, recall in found.get("roc", ()) if x <= rate), default=None)
