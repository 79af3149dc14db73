"""`POST /chat/completions`: base and finetuned models, with or without streaming, optionally moderated."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from reft_ray.api.auth import Caller, take
from reft_ray.api.chat_model import (
    ChatError,
    ChatModel,
    ChatOverloadedError,
    ContextLengthError,
    ConversationError,
    Target,
)
from reft_ray.api.chat_moderation import ChatModeration
from reft_ray.api.chat_schema import ChatRequest, InlineModeration, ModerationPolicy, Side
from reft_ray.api.errors import ApiError, busy, invalid
from reft_ray.api.models import unknown_model
from reft_ray.api.stores import Stores
from reft_ray.api.verdict_stream import EVENT_STREAM
from reft_ray.core.completion import Piece, Sampling, TokenLogprob
from reft_ray.core.conversation import parts
from reft_ray.jobs.errors import NotFoundError
from reft_ray.jobs.tenants import Principal

REFUSAL = "This was blocked by the content filter."
DONE = b"data: [DONE]\n\n"
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {EVENT_STREAM: {}}}}
"""The OpenAPI description of answers that are streamed where the body asks for it."""


@dataclass(slots=True)
class Usage:
    """Token usage of one request so far."""

    prompt: int = 0
    completion: int = 0

    def add(self, piece: Piece) -> None:
        """Add a piece; the prompt counts once, whatever the number of choices."""
        self.prompt = max(self.prompt, piece.prompt_tokens)
        self.completion += piece.tokens

    def body(self) -> dict[str, int]:
        """The `usage` object."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


class Choice(NamedTuple):
    """One complete choice."""

    text: str
    reason: str
    logprobs: tuple[TokenLogprob, ...] = ()

    @classmethod
    def of(cls, pieces: Sequence[Piece]) -> Choice:
        """The choice that was generated in these pieces."""
        logprobs = tuple(item for piece in pieces for item in piece.logprobs)
        return cls("".join(piece.text for piece in pieces), pieces[-1].finish_reason or "stop", logprobs)


BLOCKED = Choice("", "content_filter")


@dataclass(slots=True)
class Completion:
    """One request in progress."""

    model: ChatModel
    target: Target
    request: ChatRequest
    sampling: Sampling
    moderation: ChatModeration
    usage: Usage = field(default_factory=Usage)
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def choices(self) -> int:
        """The number of requested choices."""
        return self.request.n or 1

    async def pieces(self, index: int) -> AsyncIterator[Piece]:
        """Generate one choice and count its tokens; with a seed, each choice of a request gets a different one."""
        seed = self.sampling.seed
        sampling = self.sampling if seed is None or index == 0 else replace(self.sampling, seed=seed + index)
        generated = self.model.generate(self.target, self.request.conversation, sampling)
        async with aclosing(generated) as stream:  # type: ignore[type-var]
            async for piece in stream:
                self.usage.add(piece)
                yield piece

    async def text(self, index: int) -> Choice:
        """One complete choice."""
        return Choice.of([piece async for piece in self.pieces(index)])

    async def texts(self) -> list[Choice]:
        """All choices; one that the filter blocks is an empty text with `content_filter`."""
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self.text(index)) for index in range(self.choices)]
        choices = [task.result() for task in tasks]
        return await passed(choices, self.moderation)

    def head(self, kind: str) -> dict[str, Any]:
        """The first keys of the response and of each chunk."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.target.name}


async def passed(choices: Sequence[Choice], moderation: ChatModeration) -> list[Choice]:
    """The choices with BLOCKED for those that the filter blocks."""
    verdicts = await moderation.passes([choice.text for choice in choices])
    return [choice if passes else BLOCKED for choice, passes in zip(choices, verdicts, strict=True)]


def router(stores: Stores, model: ChatModel) -> APIRouter:
    """The chat route."""
    routes = APIRouter(tags=["chat"])

    @routes.post("/chat/completions", response_model=None, responses=STREAMED)
    async def create_completion(body: ChatRequest, request: Request, caller: Caller) -> Response:
        """Continue a conversation."""
        body.refuse_unsupported()
        target = await asyncio.to_thread(resolve, stores, caller, body.model)
        sampling = body.sampling(stores.settings.max_completion_tokens)
        # What may come, not what is likely: a byte is a token at most, and a completion may have its whole limit.
        read = sum(len(part.text.encode()) for part in parts(body.conversation))
        charged = await charge_tokens(stores, request, caller, read + sampling.max_tokens * (body.n or 1))
        completion = Completion(
            model,
            target,
            body,
            sampling,
            ChatModeration(request.app.state.moderator, moderation_of(stores, caller, body.moderation)),
        )
        try:
            admitted = await completion.moderation.admit(body.conversation)
        except BaseException:
            await settle_tokens(stores, caller, charged, completion.usage)
            raise
        if body.stream:
            events = settled(stores, caller, charged, completion.usage, _stream(completion, admitted))
            return await streaming(events)
        try:
            choices = await _choices(completion, admitted)
        except* ChatError as group:
            raise failure_of(group.exceptions[0]) from None
        finally:
            await settle_tokens(stores, caller, charged, completion.usage)
        return JSONResponse(_whole(completion, choices))

    return routes


def moderation_of(stores: Stores, caller: Principal, wanted: InlineModeration | None) -> InlineModeration | None:
    """The moderation that the caller wants, in the operator's modes for its project at least."""
    settings = stores.settings.chat_moderation
    required = settings and settings.modes(caller.project_id)
    if required is None or required.input == required.output == "none":
        return wanted
    asked = (wanted or InlineModeration()).sides
    sides = {
        name: Side(mode="block" if "block" in (getattr(required, name), getattr(asked, name).mode) else "score")
        for name in ("input", "output")
    }
    return InlineModeration(policy=ModerationPolicy(**sides))


def resolve(stores: Stores, caller: Principal, name: str) -> Target:
    """Look up a model that this caller may use. Raises ApiError 404 when there is none."""
    bases = stores.settings.base_models
    if name in bases:
        return Target(name, name, bases[name].uri)
    try:
        if ":ckpt-step-" in name:
            student, uri = stores.models.checkpoint_uri(name, caller.project_id)
            if not stores.settings.serve_checkpoints:
                raise ApiError(
                    403,
                    "Checkpoints have not passed the release gate, and this service does not allow chat with them.",
                    param="model",
                    code="checkpoint_not_released",
                )
        else:
            student = stores.models.get(name, caller.project_id)
            uri = student.uri
    except NotFoundError:
        raise unknown_model(name) from None
    if student.base_model not in bases:
        raise unknown_model(name)
    return Target(name, student.base_model, bases[student.base_model].uri, uri)


async def _choices(completion: Completion, admitted: bool) -> list[Choice]:
    return await completion.texts() if admitted else [BLOCKED] * completion.choices


def _logprobs(completion: Completion, found: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    """The `logprobs` of a choice or chunk."""
    if completion.sampling.logprobs is None or not found:
        return None

    def entry(token: str, logprob: float | None) -> dict[str, Any]:
        return {"token": token, "logprob": logprob, "bytes": list(token.encode())}

    content = [
        entry(item.token, item.logprob) | {"top_logprobs": [entry(*other) for other in item.top]} for item in found
    ]
    return {"content": content, "refusal": None}


def _whole(completion: Completion, choices: list[Choice]) -> dict[str, Any]:
    shown = [
        {
            "index": index,
            "finish_reason": choice.reason,
            "message": {
                "role": "assistant",
                "content": None if choice is BLOCKED else choice.text,
                "refusal": REFUSAL if choice is BLOCKED else None,
            },
            "logprobs": _logprobs(completion, choice.logprobs),
        }
        for index, choice in enumerate(choices)
    ]
    body = {**completion.head("chat.completion"), "choices": shown, "usage": completion.usage.body()}
    if completion.moderation.body is not None:
        body["moderation"] = completion.moderation.body
    return body


async def _stream(completion: Completion, admitted: bool) -> AsyncIterator[bytes]:
    head = completion.head("chat.completion.chunk")
    usage: dict[str, Any] = {"usage": None} if completion.request.counts_usage else {}

    def chunk(
        index: int, delta: dict[str, Any], reason: str | None = None, logprobs: Sequence[TokenLogprob] = ()
    ) -> bytes:
        found = _logprobs(completion, logprobs)
        choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": found}
        return event_bytes({**head, "choices": [choice], **usage})

    if not admitted or completion.moderation.holds_output:
        for index, choice in enumerate(await _choices(completion, admitted)):
            delta = {"refusal": REFUSAL} if choice is BLOCKED else {"content": choice.text}
            yield chunk(index, {"role": "assistant", **delta}, logprobs=choice.logprobs)
            yield chunk(index, {}, choice.reason)
    else:
        texts = []
        for index in range(completion.choices):
            said: list[str] = []
            started = False
            async for piece in completion.pieces(index):
                if not started:
                    # Only once the model has answered: before that a failure still gets its own status.
                    yield chunk(index, {"role": "assistant", "content": ""})
                    started = True
                if piece.text or piece.logprobs:
                    said.append(piece.text)
                    yield chunk(index, {"content": piece.text}, logprobs=piece.logprobs)
                if piece.finish_reason:
                    yield chunk(index, {}, piece.finish_reason)
            texts.append("".join(said))
        await completion.moderation.passes(texts)
    if completion.moderation.body is not None:
        yield event_bytes({**head, "choices": [], **usage, "moderation": completion.moderation.body})
    if usage:
        yield event_bytes({**head, "choices": [], "usage": completion.usage.body()})
    yield DONE


async def streaming(events: AsyncIterator[bytes], param: str = "messages") -> Response:
    """Start the stream; a failure before its first event still gets its own status. `param` holds the prompt."""
    try:
        first = await anext(events)
    except* ChatError as group:
        raise failure_of(group.exceptions[0], param) from None

    async def rest() -> AsyncIterator[bytes]:
        try:
            async with aclosing(events) as stream:  # type: ignore[type-var]
                yield first
                async for event in stream:
                    yield event
        except (ChatError, ExceptionGroup, ApiError):
            # The status was already sent; the client raises an APIError for an event with an `error`.
            yield event_bytes({"error": ApiError(500, "The model failed during the stream.").body()["error"]})

    return StreamingResponse(rest(), media_type=EVENT_STREAM, headers={"cache-control": "no-store"})


async def settled(
    stores: Stores, caller: Principal, charged: float, usage: Usage, events: AsyncIterator[bytes]
) -> AsyncIterator[bytes]:
    """The events; at their end, or the client's, the tokens are settled."""
    try:
        async with aclosing(events) as stream:  # type: ignore[type-var]
            async for event in stream:
                yield event
    finally:
        await settle_tokens(stores, caller, charged, usage)


async def charge_tokens(stores: Stores, request: Request, caller: Principal, cost: float) -> float:
    """Take the tokens that a request may use before it runs; `settle_tokens` returns the unused ones."""
    if caller.key_id is None:
        return 0.0
    await asyncio.to_thread(take, stores.rate_limits, request, "tokens", cost, caller, request.app.state.recorder)
    return cost


async def settle_tokens(stores: Stores, caller: Principal, charged: float, usage: Usage) -> None:
    """Return tokens that were taken and not used, or take those that were used beyond."""
    if caller.key_id is not None:
        unused = charged - usage.prompt - usage.completion
        settle = asyncio.to_thread(stores.rate_limits.settle, caller.project_id, "tokens", unused)
        # Also after the client disconnected: its tokens were used.
        await asyncio.shield(settle)


def failure_of(error: BaseException, param: str = "messages") -> ApiError:
    """The response to a ChatError; `param` holds the prompt."""
    match error:
        case ChatOverloadedError():
            return busy("The model is at capacity; try again later.", error.retry_after, status=503)
        case ContextLengthError():
            return invalid(str(error), param, "context_length_exceeded")
        case ConversationError():
            return invalid(str(error), param)
        case _:
            return ApiError(500, "The model failed on this request.", code="model_failed")


def event_bytes(body: dict[str, Any]) -> bytes:
    """An event of a stream."""
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"
