"""Students behind the ChatModel seam: in this process, and as replicas that Serve finds by their loaded adapters."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle

from reft_ray.api.chat_model import ChatError, ChatOverloadedError, ContextLengthError, Target
from reft_ray.core.completion import Piece, Sampling
from reft_ray.core.conversation import Conversation
from reft_ray.core.errors import PromptTooLongError
from reft_ray.hf.loading import load_base
from reft_ray.hf.precision import resolve_dtype
from reft_ray.hf.students import FullError, Students
from reft_ray.jobs.artefacts import local_folder
from reft_ray.serving.args import ChatArgs

MAX_ADAPTERS = 8
"""Adapters that a replica holds at a time; the least recently used makes room."""


def load_students(uri: str, args: ChatArgs) -> Students:
    """The base at a local path or hub id, ready to answer."""
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    base = load_base(uri, resolve_dtype(args.precision, device), device)
    return Students(base, local_folder, MAX_ADAPTERS, args.max_batch, args.max_rows, args.max_waiting)


async def pieces_of(
    students: Students, adapter: str | None, conversation: Conversation, sampling: Sampling
) -> AsyncIterator[Piece]:
    """An answer as an iterator of this event loop; closing it frees its place. Raises ChatError and nothing else."""
    loop = asyncio.get_running_loop()
    heard: asyncio.Queue[Piece | Exception] = asyncio.Queue()

    def listen(item: Piece | Exception) -> None:
        with suppress(RuntimeError):  # the loop is gone: nobody listens
            loop.call_soon_threadsafe(heard.put_nowait, item)

    try:
        request = students.answer(adapter, conversation, sampling, listen)
    except PromptTooLongError as error:
        raise ContextLengthError(str(error)) from None
    except FullError as error:
        raise ChatOverloadedError(str(error)) from None
    try:
        while True:
            item = await heard.get()
            if isinstance(item, Exception):
                raise ChatError(f"the model failed: {type(item).__name__}") from item
            yield item
            if item.finish_reason is not None:
                return
    finally:
        request.cancel()


class LocalChat:
    """`api.chat_model.ChatModel` over students in this process, by the URI of their base."""

    def __init__(self, students: Mapping[str, Students]) -> None:
        self._students = students

    def generate(self, target: Target, conversation: Conversation, sampling: Sampling) -> AsyncIterator[Piece]:
        """See ChatModel."""
        return pieces_of(self._students[target.base_uri], target.adapter_uri, conversation, sampling)


class StudentReplica:
    """One base on one device; made a deployment in `app`. Serve sends an adapter's requests where it is loaded."""

    def __init__(self, uri: str, args: dict[str, Any]) -> None:
        self._students = load_students(uri, ChatArgs.model_validate(args))

    async def generate(
        self, adapter: str | None, conversation: Conversation, sampling: Sampling
    ) -> AsyncIterator[Piece | ChatError]:
        """Pieces, or the error that ended them: as an item, because Serve wraps what is raised."""
        if adapter is not None:
            await self.held(adapter)
        try:
            async for piece in pieces_of(self._students, adapter, conversation, sampling):
                yield piece
        except ChatError as error:
            yield error

    @serve.multiplexed(max_num_models_per_replica=MAX_ADAPTERS)
    async def held(self, adapter: str) -> str:
        """What Serve routes by. The adapters themselves are loaded, and let go, by the students, in the same order."""
        return adapter


class HandleChat:
    """`api.chat_model.ChatModel` over Serve deployments, one for each base, by its URI."""

    def __init__(self, handles: Mapping[str, DeploymentHandle]) -> None:
        self._handles = handles

    async def generate(self, target: Target, conversation: Conversation, sampling: Sampling) -> AsyncIterator[Piece]:
        """See ChatModel."""
        handle = self._handles[target.base_uri].options(stream=True, multiplexed_model_id=target.adapter_uri or "")
        answer: Any = handle.generate.remote(target.adapter_uri, conversation, sampling)
        try:
            async for item in answer:
                if isinstance(item, ChatError):
                    raise item
                yield item
        except BackPressureError:
            raise ChatOverloadedError("the model's queue is full") from None
        except (RayError, DeploymentUnavailableError, ReplicaUnavailableError) as error:
            raise ChatError(f"the model was lost: {type(error).__name__}") from error
        finally:
            answer.cancel()
