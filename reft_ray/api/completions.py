"""`POST /completions`: raw prompts with log probabilities and echo, as evaluation tools ask for them; streamed too."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ConfigDict, Field, field_validator

from reft_ray.api.auth import Caller
from reft_ray.api.chat import (
    BLOCKED,
    DONE,
    STREAMED,
    Choice,
    Usage,
    charge_tokens,
    event_bytes,
    failure_of,
    moderation_of,
    passed,
    resolve,
    settle_tokens,
    settled,
    streaming,
)
from reft_ray.api.chat_model import ChatError, ChatModel, Target
from reft_ray.api.chat_moderation import ChatModeration
from reft_ray.api.chat_schema import InlineModeration, Sampled, refuse_others
from reft_ray.api.errors import invalid
from reft_ray.api.stores import Stores
from reft_ray.core.completion import Piece, RawPrompt, Sampling, TokenLogprob
from reft_ray.core.conversation import Message
from reft_ray.rows.text import readable

MAX_PROMPTS = 256
AT_ONCE = 8
DEFAULT_TOKENS = 16
"""As at OpenAI."""

Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(Sampled):
    """The body. A prompt is a text or token ids of the base model's tokenizer; a list of them gets as many answers."""

    model_config = ConfigDict(extra="allow")

    model: str = Field(max_length=320)
    prompt: str | list[str] | Ids | list[Ids]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    moderation: InlineModeration | None = None

    @field_validator("prompt")
    @classmethod
    def _some(cls, value: Any) -> Any:
        """Raises ValueError."""
        if not value or (isinstance(value, list) and (len(value) > MAX_PROMPTS and not isinstance(value[0], int))):
            raise ValueError(f"give between one and {MAX_PROMPTS} prompts")
        if value == [""] or (isinstance(value, list) and "" in value):
            raise ValueError("is empty")
        return value

    @property
    def prompts(self) -> list[RawPrompt]:
        """The prompts, one or more."""
        value: Any = (
            self.prompt if isinstance(self.prompt, list) and not isinstance(self.prompt[0], int) else [self.prompt]
        )
        return [RawPrompt(readable(item)) if isinstance(item, str) else RawPrompt(ids=tuple(item)) for item in value]

    def sampling(self, most: int) -> Sampling:
        """Sampling parameters; `max_tokens` is at most `most`, by default DEFAULT_TOKENS."""
        found = self.sampled(self.max_tokens or DEFAULT_TOKENS, most)
        return replace(found, logprobs=self.logprobs, echo=bool(self.echo))


@dataclass(slots=True)
class _Run:
    """One request in progress. Answers are generated AT_ONCE at a time, so that one does not fill the model's queue."""

    model: ChatModel
    target: Target
    body: CompletionRequest
    sampling: Sampling
    moderation: ChatModeration
    usage: Usage = field(default_factory=Usage)
    places: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(AT_ONCE))
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def asked(self) -> list[RawPrompt]:
        """The prompt of each choice."""
        return [prompt for prompt in self.body.prompts for _ in range(self.body.n or 1)]

    def head(self) -> dict[str, Any]:
        """The first keys of the response and of each event."""
        return {"id": self.id, "object": "text_completion", "created": self.created, "model": self.target.name}

    def choice(self, index: int, found: Choice, reason: str | None, offset: int = 0) -> dict[str, Any]:
        """One entry of `choices`: a whole choice, or what an event adds to it after `offset` characters."""
        without = self.body.logprobs is None or found is BLOCKED
        logprobs = None if without else _logprobs(found.logprobs, offset)
        return {"index": index, "text": found.text, "finish_reason": reason, "logprobs": logprobs}

    async def pieces(self, index: int, prompt: RawPrompt) -> AsyncIterator[Piece]:
        """Generate one choice, and count its tokens."""
        seed = None if self.sampling.seed is None else self.sampling.seed + index
        async with self.places:
            generated = self.model.generate(self.target, prompt, replace(self.sampling, seed=seed))
            async with aclosing(generated) as stream:  # type: ignore[type-var]
                async for piece in stream:
                    self.usage.prompt += piece.prompt_tokens
                    self.usage.completion += piece.tokens
                    yield piece

    async def answers(self, admitted: bool) -> list[Choice]:
        """One answer per choice, in order."""
        if not admitted:
            return [BLOCKED] * len(self.asked)

        async def one(index: int, prompt: RawPrompt) -> Choice:
            return Choice.of([piece async for piece in self.pieces(index, prompt)])

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(index, prompt)) for index, prompt in enumerate(self.asked)]
        return await passed([task.result() for task in tasks], self.moderation)

    async def mixed(self) -> AsyncIterator[tuple[int, Piece]]:
        """The pieces of all choices as they are generated, each with its choice's index."""
        asked = self.asked
        queue: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue(AT_ONCE)

        async def feed(index: int, prompt: RawPrompt) -> None:
            try:
                async with aclosing(self.pieces(index, prompt)) as stream:  # type: ignore[type-var]
                    async for piece in stream:
                        await queue.put((index, piece))
                await queue.put((index, None))
            except Exception as error:
                await queue.put((index, error))

        # Not a TaskGroup: the stream is started by one task and read by another.
        tasks = [asyncio.create_task(feed(index, prompt)) for index, prompt in enumerate(asked)]
        try:
            open_choices = len(asked)
            while open_choices:
                index, item = await queue.get()
                match item:
                    case None:
                        open_choices -= 1
                    case Piece():
                        yield index, item
                    case _:
                        raise item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def events(self, admitted: bool) -> AsyncIterator[bytes]:
        """The response as events. Nothing is sent before it is judged where the filter may block it."""
        usage: dict[str, Any] = {"usage": None} if self.body.counts_usage else {}

        def event(*choices: dict[str, Any], **others: Any) -> bytes:
            return event_bytes({**self.head(), "choices": choices, **usage, **others})

        if not admitted or self.moderation.holds_output:
            for index, answer in enumerate(await self.answers(admitted)):
                yield event(self.choice(index, answer, answer.reason))
        else:
            texts = [""] * len(self.asked)
            async with aclosing(self.mixed()) as pieces:  # type: ignore[type-var]
                async for index, piece in pieces:
                    added = Choice(piece.text, "", piece.logprobs)
                    yield event(self.choice(index, added, piece.finish_reason, len(texts[index])))
                    texts[index] += piece.text
            await self.moderation.passes(texts)
        if self.moderation.body is not None:
            yield event(moderation=self.moderation.body)
        if usage:
            yield event(usage=self.usage.body())
        yield DONE


def router(stores: Stores, model: ChatModel) -> APIRouter:
    """The route of completions."""
    routes = APIRouter(tags=["chat"])

    @routes.post("/completions", response_model=None, responses=STREAMED)
    async def create_completion(body: CompletionRequest, request: Request, caller: Caller) -> Response:
        """Continue texts, without a chat template."""
        refuse_others(body)
        target = await asyncio.to_thread(resolve, stores, caller, body.model)
        sampling = body.sampling(stores.settings.max_completion_tokens)
        prompts = body.prompts
        moderation = ChatModeration(request.app.state.moderator, moderation_of(stores, caller, body.moderation))
        if moderation.asked is not None and any(prompt.ids for prompt in prompts):
            raise invalid("prompt: token ids cannot be judged; send texts.", "prompt")
        run = _Run(model, target, body, sampling, moderation)
        read = sum(len(prompt.text.encode()) + len(prompt.ids) for prompt in prompts)
        charged = await charge_tokens(stores, request, caller, read + sampling.max_tokens * len(run.asked))
        try:
            admitted = await moderation.admit(tuple(Message("user", prompt.text) for prompt in prompts if prompt.text))
        except BaseException:
            await settle_tokens(stores, caller, charged, run.usage)
            raise
        if body.stream:
            return await streaming(settled(stores, caller, charged, run.usage, run.events(admitted)), "prompt")
        try:
            answers = await run.answers(admitted)
        except* ChatError as group:
            raise failure_of(group.exceptions[0], "prompt") from None
        finally:
            await settle_tokens(stores, caller, charged, run.usage)
        choices = [run.choice(index, answer, answer.reason) for index, answer in enumerate(answers)]
        found = {**run.head(), "choices": choices, "usage": run.usage.body()}
        return JSONResponse(found | ({"moderation": moderation.body} if moderation.body is not None else {}))

    return routes


def _logprobs(found: Sequence[TokenLogprob], at: int) -> dict[str, list[Any]]:
    offsets = []
    for item in found:
        offsets.append(at)
        at += len(item.token)
    return {
        "tokens": [item.token for item in found],
        "token_logprobs": [item.logprob for item in found],
        "top_logprobs": [None if item.logprob is None else dict(item.top) for item in found],
        "text_offset": offsets,
    }
