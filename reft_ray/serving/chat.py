"""Chat models of the gateway: a deployment handle or an endpoint per base model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from reft_ray.api.chat_model import ChatError, ChatModel, ChatOverloadedError, Target
from reft_ray.core.completion import Piece, RawPrompt, Sampling
from reft_ray.core.conversation import Conversation
from reft_ray.serving.args import ServiceArgs
from reft_ray.serving.endpoint_chat import EndpointChat
from reft_ray.serving.handle import LOST

_ATTEMPTS = 5
_BACKOFF_SECONDS = 0.2


class HandleChat:
    """`api.chat_model.ChatModel` over a Serve deployment of students.

    A request whose replica is lost before the first piece is sent to another one; later it is a ChatError, because a
    second completion would differ from the pieces already sent.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def generate(
        self, target: Target, prompt: Conversation | RawPrompt, sampling: Sampling
    ) -> AsyncIterator[Piece]:
        for attempt in range(_ATTEMPTS):
            started = False
            # Serve prefers replicas that have loaded the adapter.
            handle = self._handle.options(stream=True, multiplexed_model_id=target.adapter_uri or "")
            stream: Any = handle.stream.remote(target, prompt, sampling)
            try:
                async for item in stream:
                    if isinstance(item, ChatError):
                        raise item
                    started = True
                    yield item
                    if item.finish_reason is not None:
                        return
            except ChatError:
                raise
            except BackPressureError:
                raise ChatOverloadedError("the model's queue is full") from None
            except LOST:
                if started:
                    raise ChatError("the model's replica was lost during the completion") from None
            except DeploymentUnavailableError as error:
                raise ChatError(f"the model is unavailable: {error}") from None
            except Exception as error:  # over gRPC a replica's error has its own type, not RayError
                raise ChatError(f"the model failed: {type(error).__name__}") from None
            else:
                raise ChatError("the model's stream ended early")
            finally:
                # Removes the row of a client that disconnected; no effect once the stream has ended.
                stream.cancel()
            await asyncio.sleep(_BACKOFF_SECONDS * 2**attempt)
        raise ChatOverloadedError("the model's replica was lost and is not replaced yet", retry_after=5.0)


class ChatByBase:
    """Routes each request to the ChatModel of its base model."""

    def __init__(self, models: Mapping[str, ChatModel]) -> None:
        self._models = dict(models)

    def generate(self, target: Target, prompt: Conversation | RawPrompt, sampling: Sampling) -> AsyncIterator[Piece]:
        model = self._models.get(target.base_model)
        if model is None:
            raise ChatError(f"the base model {target.base_model} is not served")
        return model.generate(target, prompt, sampling)


def chat_of(service: ServiceArgs, students: Mapping[str, DeploymentHandle]) -> ChatByBase:
    """Each base model's ChatModel: the students of its URI, or its configured endpoint."""
    return ChatByBase(
        {
            name: HandleChat(students[base.uri]) if base.endpoint is None else EndpointChat(base.endpoint)
            for name, base in service.base_models.items()
        }
    )
