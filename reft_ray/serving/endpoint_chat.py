"""Students on another server: a ChatModel over any OpenAI-compatible endpoint, such as vLLM or `ray.serve.llm`."""

from __future__ import annotations

import asyncio
import hashlib
import json
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from typing import Any, Literal

import httpx

from reft_ray.api.chat_model import (
    ChatError,
    ChatOverloadedError,
    ContextLengthError,
    ConversationError,
    Target,
)
from reft_ray.api.settings import EndpointSettings
from reft_ray.core.completion import Piece, RawPrompt, Sampling, TokenLogprob
from reft_ray.core.conversation import Conversation
from reft_ray.serving.args import from_environment

_CONTROL = re.compile(r"<\|[^\s|<>]{1,40}\|>|</?(?:s|bos|eos|start_of_turn|end_of_turn|think)>|\[/?INST\]|<<?/?SYS>>?")
"""Control tokens of the usual templates: another server's tokenizer reads them in content as its own."""


class EndpointChat:
    """See `EndpointSettings`. Raises UsageError when the API key's variable is empty."""

    def __init__(self, args: EndpointSettings) -> None:
        self._args = args
        key = from_environment(args.key_variable) or "none"
        self._client = httpx.AsyncClient(
            headers={"authorization": f"Bearer {key}"}, timeout=httpx.Timeout(args.seconds, connect=10.0)
        )
        self._loaded: set[str] = set()
        self._loading = asyncio.Lock()

    async def close(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def generate(
        self, target: Target, prompt: Conversation | RawPrompt, sampling: Sampling
    ) -> AsyncIterator[Piece]:
        if isinstance(prompt, RawPrompt):
            yield await self._completed(target, prompt, sampling)
            return
        _check(prompt)
        try:
            body = _body(await self._model(target), prompt, sampling)
            for last in (False, False, True):
                async with self._client.stream("POST", self._path("chat/completions"), json=body) as answer:
                    if last or not answer.is_error:
                        async with aclosing(_pieces(answer)) as pieces:
                            async for piece in pieces:
                                yield piece
                        return
                    await answer.aread()
                    failure = _failure(answer)
                if answer.status_code == 404 and body["model"] in self._loaded:
                    # The server has restarted without the adapter.
                    self._loaded.discard(body["model"])
                    await self._model(target)
                elif isinstance(failure, ContextLengthError) and not sampling.must_fit and "max_tokens" in body:
                    # `max_tokens` is the service's limit, not the user's: let the server's context limit it.
                    del body["max_tokens"]
                else:
                    raise failure
        except httpx.HTTPError as error:
            raise ChatError(f"{self._args.url}: {type(error).__name__}") from None

    async def _completed(self, target: Target, prompt: RawPrompt, sampling: Sampling) -> Piece:
        """A completion of a raw prompt, in one piece."""
        body = _sampling(await self._model(target), sampling) | {
            "prompt": list(prompt.ids) or prompt.text,
            "echo": sampling.echo,
            "logprobs": sampling.logprobs,
        }
        try:
            answer = await self._client.post(self._path("completions"), json=body)
        except httpx.HTTPError as error:
            raise ChatError(f"{self._args.url}: {type(error).__name__}") from None
        if answer.is_error:
            raise _failure(answer)
        try:
            document = answer.json()
            choice, usage = document["choices"][0], document["usage"]
            logprobs = _token_logprobs(choice.get("logprobs") or {})
            reason = _reason(choice["finish_reason"]) or "stop"
            return Piece(choice["text"], usage["completion_tokens"], usage["prompt_tokens"], reason, logprobs)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            raise ChatError("the server's completion cannot be read") from None

    async def _model(self, target: Target) -> str:
        """The server's name for the target; loads its adapter first where the server needs that."""
        uri, args = target.adapter_uri, self._args
        if uri is None:
            return args.model
        if args.adapters == "path":
            root = str(args.adapters_root).rstrip("/") + "/"
            if not uri.startswith(root):
                raise ChatError(f"the adapter is not below {root}, where {args.url} looks for adapters")
            return f"{args.model}:{uri.removeprefix(root)}"
        if args.adapters == "none":
            raise ChatError(f"{args.url} serves no adapters")
        name = "reft-" + hashlib.sha256(uri.encode()).hexdigest()[:16]
        async with self._loading:
            if name not in self._loaded:
                await self._load(name, uri)
                self._loaded.add(name)
        return name

    async def _load(self, name: str, uri: str) -> None:
        body = {"lora_name": name, "lora_path": uri.removeprefix("file://")}
        answer = await self._client.post(self._path("load_lora_adapter"), json=body)
        # Another gateway may have loaded it.
        if answer.is_error and "already" not in answer.text:
            raise ChatError(f"{self._args.url} did not load the adapter: HTTP {answer.status_code}")

    def _path(self, name: str) -> str:
        return f"{self._args.url.rstrip('/')}/{name}"


def _check(conversation: Conversation) -> None:
    for index, turn in enumerate(conversation):
        for name, text in (("content", turn.content), *((call.name, call.text) for call in turn.calls)):
            found = _CONTROL.search(text)
            # Models that think do so in their answers, which clients send back.
            if found and not (name == "content" and turn.role == "assistant" and "think" in found[0]):
                raise ConversationError(f"messages[{index}].{name} has the control token {found[0]}: remove it")


def _body(model: str, conversation: Conversation, sampling: Sampling) -> dict[str, Any]:
    body = _sampling(model, sampling) | {
        # With its tool calls, which the server's template renders.
        "messages": [{"role": turn.role, "content": turn.content, **turn.values} for turn in conversation],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if sampling.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": sampling.logprobs}
    return body


def _sampling(model: str, sampling: Sampling) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
    }
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.seed is not None:
        body["seed"] = sampling.seed
    return body


async def _pieces(answer: httpx.Response) -> AsyncGenerator[Piece, None]:
    if answer.is_error:
        await answer.aread()
        raise _failure(answer)
    sent = 0
    reason: Literal["stop", "length"] | None = None
    usage: dict[str, int] = {}
    async for line in answer.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            break
        try:
            event = json.loads(data)
        except ValueError:
            raise ChatError("the server sent an event that is not JSON") from None
        if "error" in event:
            raise ChatError("the server failed during the completion")
        usage = event.get("usage") or usage
        for choice in event.get("choices") or ():
            reason = _reason(choice.get("finish_reason")) or reason
            text = choice.get("delta", {}).get("content")
            logprobs = _chat_logprobs(choice.get("logprobs") or {})
            if text or logprobs:
                sent += 1
                yield Piece(text or "", logprobs=logprobs)
    if reason is None:
        raise ChatError("the server's stream ended early")
    # The server's count, because an event may hold several tokens or none.
    tokens = max(0, usage.get("completion_tokens", sent) - sent)
    yield Piece("", tokens, usage.get("prompt_tokens", 0), reason)


def _chat_logprobs(found: dict[str, Any]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(
            item["token"],
            item["logprob"],
            tuple((other["token"], other["logprob"]) for other in item.get("top_logprobs") or ()),
        )
        for item in found.get("content") or ()
    )


def _token_logprobs(found: dict[str, Any]) -> tuple[TokenLogprob, ...]:
    tops = found.get("top_logprobs") or [None] * len(found.get("tokens", ()))
    items = zip(found.get("tokens", ()), found.get("token_logprobs", ()), tops, strict=True)
    return tuple(TokenLogprob(token, logprob, tuple((top or {}).items())) for token, logprob, top in items)


def _reason(name: str | None) -> Literal["stop", "length"] | None:
    if name is None:
        return None
    return "length" if name == "length" else "stop"


def _failure(answer: httpx.Response) -> ChatError:
    error: Any = {}
    with suppress(ValueError, AttributeError):
        document = answer.json()
        error = document.get("error") or document
    message = str(error.get("message", ""))[:500] if isinstance(error, dict) else ""
    code = error.get("code") if isinstance(error, dict) else None
    if answer.status_code in (429, 503):
        try:
            after = float(answer.headers.get("retry-after", "1"))
        except ValueError:
            after = 1.0
        return ChatOverloadedError("the server is at its capacity", after)
    if answer.status_code == 400 and (code == "context_length_exceeded" or "context length" in message):
        return ContextLengthError(message)
    if answer.status_code == 400:
        return ConversationError(message or "the server rejects this conversation")
    return ChatError(f"the server answered HTTP {answer.status_code}")
