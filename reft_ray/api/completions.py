"""`POST /completions`: raw prompts with log probabilities and echo, as evaluation tools ask for them."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import ConfigDict, Field, field_validator

from reft_ray.api.auth import Caller
from reft_ray.api.chat import (
    BLOCKED,
    STREAMED,
    Choice,
    Usage,
    charge_tokens,
    failure_of,
    moderation_of,
    passed,
    resolve,
    settle_tokens,
)
from reft_ray.api.chat_model import ChatError, ChatModel, Target
from reft_ray.api.chat_moderation import ChatModeration
from reft_ray.api.chat_schema import InlineModeration, Sampled, refuse_others
from reft_ray.api.errors import invalid
from reft_ray.api.stores import Stores
from reft_ray.core.completion import RawPrompt, Sampling, TokenLogprob
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
        moderation = ChatModeration(request.app.state.moderator, moderation_of(stores, body.moderation))
        if moderation.asked is not None and any(prompt.ids for prompt in prompts):
            raise invalid("prompt: token ids cannot be judged; send texts.", "prompt")
        read = sum(len(prompt.text.encode()) + len(prompt.ids) for prompt in prompts)
        cost = read + sampling.max_tokens * len(prompts) * (body.n or 1)
        charged = await charge_tokens(stores, request, caller, cost)
        usage = Usage()
        try:
            judged = tuple(Message("user", prompt.text) for prompt in prompts if prompt.text)
            admitted = await moderation.admit(judged)
            asked = [prompt for prompt in prompts for _ in range(body.n or 1)]
            if admitted:
                answers = await passed(await _answers(model, target, asked, sampling, usage), moderation)
            else:
                answers = [BLOCKED] * len(asked)
        except* ChatError as group:
            raise failure_of(group.exceptions[0], "prompt") from None
        finally:
            await settle_tokens(stores, caller, charged - usage.prompt - usage.completion)
        choices = [_choice(index, answer, body) for index, answer in enumerate(answers)]
        found = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": target.name,
            "choices": choices,
            "usage": usage.body(),
        }
        return JSONResponse(found | ({"moderation": moderation.body} if moderation.body is not None else {}))

    return routes


async def _answers(
    model: ChatModel, target: Target, prompts: Sequence[RawPrompt], sampling: Sampling, usage: Usage
) -> list[Choice]:
    """One answer per prompt, in order; AT_ONCE at a time, so that one request does not fill the model's queue."""
    places = asyncio.Semaphore(AT_ONCE)

    async def one(index: int, prompt: RawPrompt) -> Choice:
        pieces, own = [], Usage()
        seed = None if sampling.seed is None else sampling.seed + index
        async with places:
            generated = model.generate(target, prompt, replace(sampling, seed=seed))
            async with aclosing(generated) as stream:  # type: ignore[type-var]
                async for piece in stream:
                    own.add(piece)
                    pieces.append(piece)
        usage.prompt += own.prompt
        usage.completion += own.completion
        return Choice.of(pieces)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(index, prompt)) for index, prompt in enumerate(prompts)]
    return [task.result() for task in tasks]


def _choice(index: int, answer: Choice, body: CompletionRequest) -> dict[str, Any]:
    logprobs = None if body.logprobs is None or answer is BLOCKED else _logprobs(answer.logprobs)
    return {"index": index, "text": answer.text, "finish_reason": answer.reason, "logprobs": logprobs}


def _logprobs(found: Sequence[TokenLogprob]) -> dict[str, list[Any]]:
    offsets, at = [], 0
    for item in found:
        offsets.append(at)
        at += len(item.token)
    return {
        "tokens": [item.token for item in found],
        "token_logprobs": [item.logprob for item in found],
        "top_logprobs": [None if item.logprob is None else dict(item.top) for item in found],
        "text_offset": offsets,
    }
