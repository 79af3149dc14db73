"""The gateway's side of the students: a handle per base model, and an error rather than a cut-off answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from reft_ray.api.chat_model import ChatError, ChatModel, ChatOverloadedError, Target
from reft_ray.core.completion import Piece, Sampling
from reft_ray.core.conversation import Conversation
from reft_ray.serving.args import ServiceArgs
from reft_ray.serving.endpoint_chat import EndpointChat
from reft_ray.serving.handle import LOST

_TRIES = 5
_PAUSE = 0.2


class HandleChat:
    """`api.chat_model.ChatModel` over a Serve deployment of students.

    A request whose replica is lost before its first piece goes to another one; later it is a ChatError, because what
    was said cannot be taken back and would be said differently the second time.
    """

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle

    async def generate(self, target: Target, conversation: Conversation, sampling: Sampling) -> AsyncIterator[Piece]:
        """See ChatModel."""
        for attempt in range(_TRIES):
            said = False
            # Requests for an adapter go where it is loaded.
            handle = self._handle.options(stream=True, multiplexed_model_id=target.adapter_uri or "")
            stream: Any = handle.stream.remote(target, conversation, sampling)
            try:
                async for item in stream:
                    if isinstance(item, ChatError):
                        raise item
                    said = True
                    yield item
                    if item.finish_reason is not None:
                        return
            except ChatError:
                raise
            except BackPressureError:
                raise ChatOverloadedError("the model's queue is full") from None
            except LOST:
                if said:
                    raise ChatError("the model was lost in mid-answer") from None
            except DeploymentUnavailableError as error:
                raise ChatError(f"the model is not there: {error}") from None
            except Exception as error:  # by gRPC a replica's error comes as its own type, not as a RayError
                raise ChatError(f"the model failed: {type(error).__name__}") from None
            else:
                raise ChatError("the model's answer broke off")
            finally:
                # Frees the place of a client that has left; nothing once the stream has ended.
                stream.cancel()
            await asyncio.sleep(_PAUSE * 2**attempt)
        raise ChatOverloadedError("the model was lost and is not back yet", retry_after=5.0)


class ChatByBase:
    """Several ChatModels behind one: each base model has its own."""

    def __init__(self, models: Mapping[str, ChatModel]) -> None:
        self._models = dict(models)

    def generate(self, target: Target, conversation: Conversation, sampling: Sampling) -> AsyncIterator[Piece]:
        """See ChatModel."""
        model = self._models.get(target.base_model)
        if model is None:
            raise ChatError(f"nothing serves the base model {target.base_model}")
        return model.generate(target, conversation, sampling)


def chat_of(service: ServiceArgs, students: Mapping[str, DeploymentHandle]) -> ChatByBase:
    """Who answers for each base model: the students that serve its URI, or the endpoint that it names."""
    return ChatByBase(
        {
            name: HandleChat(students[base.uri]) if base.endpoint is None else EndpointChat(base.endpoint)
            for name, base in service.base_models.items()
        }
    )
