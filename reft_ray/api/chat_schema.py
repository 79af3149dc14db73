"""The body of a chat completion. Unsupported parameters are rejected; those without effect are ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from reft_ray.api.errors import ApiError, invalid
from reft_ray.core.completion import Sampling
from reft_ray.core.conversation import ROLES, Conversation
from reft_ray.rows.text import conversation_from

Mode = Literal["score", "block"]
STOP_CHARACTERS = 256
"""Limits the work per token: the decoding thread compares each one with the start of every stop sequence."""


class TextContent(BaseModel):
    """A text part of a turn."""

    type: Literal["text"]
    text: str


class Turn(BaseModel):
    """One message."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextContent] | None = None


class StreamOptions(BaseModel):
    """Options of a streamed response."""

    include_usage: bool = False


class Side(BaseModel):
    """One side of the conversation: `score` only reports, `block` withholds flagged text."""

    mode: Mode = "score"


class ModerationPolicy(BaseModel):
    """The modes of input and output."""

    model_config = ConfigDict(extra="forbid")

    input: Side = Field(default_factory=Side)
    output: Side = Field(default_factory=Side)


class InlineModeration(BaseModel):
    """Moderate the conversation and the completion."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    policy: ModerationPolicy | None = None

    @property
    def sides(self) -> ModerationPolicy:
        """The policy; `score` by default."""
        return self.policy or ModerationPolicy()


class ChatRequest(BaseModel):
    """The body of `POST /chat/completions`."""

    model: str = Field(max_length=320)
    messages: list[Turn] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    moderation: InlineModeration | None = None
    logprobs: bool | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    response_format: dict[str, Any] | None = None

    @field_validator("messages", mode="before")
    @classmethod
    def _roles(cls, value: Any) -> Any:
        """Give one message instead of one per role. Raises ValueError."""
        for index, turn in enumerate(value if isinstance(value, list) else ()):
            if isinstance(turn, dict) and turn.get("role") not in ROLES:
                raise ValueError(f"messages[{index}].role must be one of {', '.join(ROLES)}")
        return value

    @field_validator("stop")
    @classmethod
    def _short(cls, value: str | list[str] | None) -> str | list[str] | None:
        """Raises ValueError."""
        texts = [value] if isinstance(value, str) else value or []
        if any(len(text) > STOP_CHARACTERS for text in texts):
            raise ValueError(f"a stop sequence may have up to {STOP_CHARACTERS} characters")
        return value

    @property
    def conversation(self) -> Conversation:
        """The turns, as the scorer and the model read them."""
        return conversation_from([turn.model_dump() for turn in self.messages])

    def sampling(self, most: int) -> Sampling:
        """Sampling parameters; `max_tokens` is at most `most`, which is also the default."""
        asked = self.max_completion_tokens or self.max_tokens
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Sampling(
            max_tokens=most if asked is None else min(asked, most),
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            stop=tuple(text for text in stop if text),
            seed=self.seed,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            must_fit=asked is not None,
        )

    def refuse_unsupported(self) -> None:
        """Raise ApiError 400 for parameters that would silently give a different result."""
        for name, asked in (
            ("tools", self.tools),
            ("functions", self.functions),
            ("logprobs", self.logprobs),
            ("response_format", (self.response_format or {}).get("type", "text") != "text"),
        ):
            if asked:
                raise _unsupported(name)
        if self.stream_options is not None and not self.stream:
            raise invalid("stream_options is only allowed when stream is true.", "stream_options")


def _unsupported(name: str) -> ApiError:
    return invalid(f"Unsupported parameter: '{name}' is not supported with this model.", name, "unsupported_parameter")
