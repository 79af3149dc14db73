"""The student replica: a base model with adapters. A plain class; `app` makes it a deployment."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from functools import partial

from reft_ray.api.chat_model import ChatError, ContextLengthError, ConversationError, Target
from reft_ray.core.completion import Piece, RawPrompt, Sampling
from reft_ray.core.conversation import Conversation
from reft_ray.core.errors import ReftError
from reft_ray.hf.turns import check_rendered
from reft_ray.serving.adapter_cache import AdapterCache
from reft_ray.serving.args import ChatArgs
from reft_ray.telemetry import catalog
from reft_ray.telemetry.recorder import NullRecorder, Recorder

MAX_FAILED_STEPS = 3
"""One failure may be a batch that was too large; a broken device fails every time."""


class StudentReplica:
    """A local `api.chat_model.ChatModel`: adapters are loaded on demand, completions share a running batch.

    Raises ReftError when the base model cannot be loaded.
    """

    def __init__(self, uri: str, args: ChatArgs, recorder: Recorder | None = None) -> None:
        # Imported here, because `app` configures OpenMP before torch is loaded.
        from reft_ray.hf.adapter_files import fetch_adapter
        from reft_ray.hf.compute import default_device, resolve_dtype
        from reft_ray.hf.loading import load_base
        from reft_ray.hf.shared_base import SharedBase
        from reft_ray.serving.engine import ChatEngine

        self._args = args
        self._recorder = recorder or NullRecorder()
        device = args.device or default_device()
        base = load_base(uri, resolve_dtype(args.precision, device), device)
        self.engine = ChatEngine(SharedBase(base, args.max_adapters), args)
        fetch = partial(fetch_adapter, max_bytes=args.max_adapter_bytes)
        self._adapters = AdapterCache(fetch, max_idle=2 * args.max_adapters)

    async def generate(
        self, target: Target, prompt: Conversation | RawPrompt, sampling: Sampling
    ) -> AsyncIterator[Piece]:
        raw = prompt if isinstance(prompt, RawPrompt) else None
        ids = await asyncio.to_thread(self._ids, prompt)
        echoed = self._echoed(raw, ids) if raw and sampling.echo else None
        self._recorder.set(catalog.CHAT_WAITING, self.engine.waiting_requests)
        sampling = replace(sampling, max_tokens=self._max_tokens(len(ids), sampling))
        async with AsyncExitStack() as stack:
            folder = None
            if target.adapter_uri is not None:
                result = "hit" if target.adapter_uri in self._adapters else "miss"
                self._recorder.count(catalog.CHAT_ADAPTER_LOOKUPS, result=result)
                try:
                    folder = await stack.enter_async_context(self._adapters.use(target.adapter_uri))
                except ReftError as error:
                    raise ChatError(str(error)) from None
            self._recorder.set(catalog.CHAT_ADAPTERS, len(self._adapters))
            pieces = self.engine.complete(ids, target.adapter_uri, folder, sampling, echoed)
            async for piece in await stack.enter_async_context(aclosing(pieces)):  # type: ignore[type-var]
                yield piece

    def ongoing_requests(self) -> int:
        """Completions that run or wait."""
        return self.engine.ongoing_requests

    def close(self) -> None:
        """Stop the engine and remove the fetched adapters."""
        self.engine.close()
        self._adapters.close()

    def check(self) -> None:
        """Raises ReftError when the replica must be replaced: its thread has ended, or every step fails.

        Such a replica answers faster than the others, so the router would send it all requests.
        """
        if not self.engine.is_alive:
            raise ReftError("the engine's thread has ended")
        if self.engine.failed_steps >= MAX_FAILED_STEPS:
            raise ReftError(f"the model failed {self.engine.failed_steps} times in a row")

    def _ids(self, prompt: Conversation | RawPrompt) -> list[int]:
        return self._raw(prompt) if isinstance(prompt, RawPrompt) else self._prompt(prompt)

    def _prompt(self, conversation: Conversation) -> list[int]:
        try:
            chat = self.engine.base.chat
            prompt = chat.prompt(conversation)
            if any(turn.extra for turn in conversation):
                # Tool calls that the template leaves out would be a dialogue that the user did not write.
                check_rendered(conversation, chat.render(conversation, generation=True), chat.control.cut)
        except ReftError as error:
            raise ConversationError(str(error)) from None
        if not prompt:
            raise ConversationError("the chat template renders this conversation to no tokens")
        return prompt

    def _raw(self, prompt: RawPrompt) -> list[int]:
        """The ids of a prompt without a template; a text gets what its tokenizer puts in front of every text."""
        tokenizer = self.engine.base.chat.tokenizer
        ids = list(prompt.ids) or tokenizer(prompt.text)["input_ids"]
        if not ids or max(ids) >= len(tokenizer):
            raise ConversationError(f"prompt: token ids are at least one, and below {len(tokenizer)}")
        return [int(token) for token in ids]

    def _echoed(self, prompt: RawPrompt, ids: list[int]) -> str:
        return prompt.text or str(self.engine.base.chat.tokenizer.decode(ids))

    def _max_tokens(self, prompt: int, sampling: Sampling) -> int:
        """The completion's limit within the context. Raises ContextLengthError."""
        context = min(self.engine.base.context, self._args.cache_tokens)
        asked = sampling.max_tokens if sampling.must_fit else 1
        if prompt + asked > context:
            raise ContextLengthError(
                f"This model's maximum context length is {context} tokens. However, you requested {prompt + asked} "
                f"tokens ({prompt} in the messages, {asked} in the completion). Please reduce either."
            )
        return min(sampling.max_tokens, context - prompt)
