"""The replica that talks: a base model with adapters on it. Plain, and a ChatModel; made a deployment in `app`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from functools import partial

from reft_ray.api.chat_model import ChatError, ContextLengthError, ConversationError, Target
from reft_ray.core.completion import Piece, Sampling
from reft_ray.core.conversation import Conversation
from reft_ray.core.errors import ReftError
from reft_ray.serving.adapter_cache import AdapterCache
from reft_ray.serving.args import ChatArgs

MOST_FAILED_TURNS = 3
"""Once may be a batch that was too large; a device that has failed for good fails every time."""


class StudentReplica:
    """`api.chat_model.ChatModel` on this machine: adapters on demand, completions in one running batch.

    Raises ReftError when the base model cannot be had.
    """

    def __init__(self, uri: str, args: ChatArgs) -> None:
        # Here, not above: torch must not be loaded before the process has told its threads how to wait.
        from reft_ray.hf.adapter_files import fetch_adapter
        from reft_ray.hf.compute import default_device, resolve_dtype
        from reft_ray.hf.loading import load_base
        from reft_ray.hf.shared_base import SharedBase
        from reft_ray.serving.engine import Bounds, ChatEngine

        self._args = args
        device = args.device or default_device()
        base = load_base(uri, resolve_dtype(args.precision, device), device)
        bounds = Bounds(args.max_rows, args.max_waiting, args.cache_tokens, args.prompt_tokens)
        self.engine = ChatEngine(SharedBase(base, args.max_adapters), bounds)
        fetch = partial(fetch_adapter, max_bytes=args.max_adapter_bytes)
        self._files = AdapterCache(fetch, most_idle=2 * args.max_adapters)

    async def generate(self, target: Target, conversation: Conversation, sampling: Sampling) -> AsyncIterator[Piece]:
        """See ChatModel."""
        prompt = await asyncio.to_thread(self._prompt, conversation)
        most = self._room(len(prompt), sampling)
        async with AsyncExitStack() as stack:
            folder = None
            if target.adapter_uri is not None:
                try:
                    folder = await stack.enter_async_context(self._files.use(target.adapter_uri))
                except ReftError as error:
                    raise ChatError(str(error)) from None
            pieces = self.engine.complete(prompt, target.adapter_uri, folder, sampling, most)
            async for piece in await stack.enter_async_context(aclosing(pieces)):  # type: ignore[type-var]
                yield piece

    def under_way(self) -> int:
        """Completions that are being written or wait."""
        return self.engine.under_way

    def close(self) -> None:
        """End the thread and remove what was fetched."""
        self.engine.close()
        self._files.close()

    def check(self) -> None:
        """Raises ReftError when the replica must be replaced: its thread has ended, or its device fails at every turn.

        Such a replica answers faster than any other, and would draw all requests.
        """
        if not self.engine.is_alive:
            raise ReftError("the thread that completes has ended")
        if self.engine.failed_turns >= MOST_FAILED_TURNS:
            raise ReftError(f"the model failed {self.engine.failed_turns} times in a row")

    def _prompt(self, conversation: Conversation) -> list[int]:
        try:
            prompt = self.engine.base.chat.prompt(conversation)
        except ReftError as error:
            raise ConversationError(str(error)) from None
        if not prompt:
            raise ConversationError("the chat template renders this conversation to no tokens")
        return prompt

    def _room(self, prompt: int, sampling: Sampling) -> int:
        """How many tokens the completion may have."""
        context = min(self.engine.base.context, self._args.cache_tokens)
        asked = sampling.max_tokens if sampling.must_fit else 1
        if prompt + asked > context:
            raise ContextLengthError(
                f"This model's maximum context length is {context} tokens. However, you requested {prompt + asked} "
                f"tokens ({prompt} in the messages, {asked} in the completion). Please reduce either."
            )
        return min(sampling.max_tokens, context - prompt)
