"""The body of a chat completion. Unsupported parameters are rejected; those without effect are ignored."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from reft_ray.api.errors import ApiError, invalid
from reft_ray.api.schema import refuse_media
from reft_ray.core.completion import Sampling
from reft_ray.core.conversation import ROLES, Conversation
from reft_ray.rows.text import full_conversation
from reft_ray.settings import nearest

Mode = Literal["score", "block"]
STOP_CHARACTERS = 256
"""Limits the work per token: the decoding thread compares each one with the start of every stop sequence."""


class TextContent(BaseModel):
    """A text part of a turn."""

    type: Literal["text"]
    text: str


class FunctionCall(BaseModel):
    """The function of a tool call; `arguments` is JSON."""

    model_config = ConfigDict(extra="forbid")

    name: str
    arguments: str = "{}"


class ToolCall(BaseModel):
    """A call in an assistant's turn."""

    model_config = ConfigDict(extra="forbid")

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Turn(BaseModel):
    """One message. Its tool calls are judged with its text, and the model's chat template must render them."""

    model_config = ConfigDict(extra="forbid")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextContent] | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    function_call: FunctionCall | None = None

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""

    def read(self) -> dict[str, Any]:
        """The message with a refusal as content: templates know no refusals."""
        values = self.model_dump(exclude_none=True)
        if (refusal := values.pop("refusal", None)) is not None:
            values["content"] = "\n".join(filter(None, (self.text, str(refusal))))
        return values


class StreamOptions(BaseModel):
    """Options of a streamed response. Events are not padded, so obfuscation is refused."""

    model_config = ConfigDict(extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


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


class Sampled(BaseModel):
    """The sampling parameters of a completion, and whether it is streamed."""

    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    seed: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stop")
    @classmethod
    def _short(cls, value: str | list[str] | None) -> str | list[str] | None:
        """Raises ValueError."""
        texts = [value] if isinstance(value, str) else value or []
        if any(len(text) > STOP_CHARACTERS for text in texts):
            raise ValueError(f"a stop sequence may have up to {STOP_CHARACTERS} characters")
        return value

    def sampled(self, asked: int | None, most: int) -> Sampling:
        """Sampling of `asked` tokens, at most `most`, which is also the default."""
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

    @property
    def counts_usage(self) -> bool:
        """Whether the stream ends with the usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatRequest(Sampled):
    """The body of `POST /chat/completions`. Other parameters: see `refuse_others`."""

    model_config = ConfigDict(extra="allow")

    model: str = Field(max_length=320)
    messages: list[Turn] = Field(min_length=1, max_length=10_000)
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=8)] | None = None
    moderation: InlineModeration | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    @field_validator("messages", mode="before")
    @classmethod
    def _roles(cls, value: Any) -> Any:
        """Give one message instead of one per role or kind of content. Raises ValueError."""
        for index, turn in enumerate(value if isinstance(value, list) else ()):
            if not isinstance(turn, dict):
                continue
            if turn.get("role") not in ROLES:
                raise ValueError(f"messages[{index}].role must be one of {', '.join(ROLES)}")
            refuse_media(turn.get("content"), f"messages[{index}].content")
        return value

    @property
    def conversation(self) -> Conversation:
        """The turns, as the scorer and the model read them."""
        return full_conversation([turn.read() for turn in self.messages])

    def sampling(self, most: int) -> Sampling:
        """Sampling parameters; `max_tokens` is at most `most`, which is also the default."""
        found = self.sampled(self.max_completion_tokens or self.max_tokens, most)
        return replace(found, logprobs=(self.top_logprobs or 0) if self.logprobs else None)

    def refuse_unsupported(self) -> None:
        """Raise ApiError 400 for what would silently give a different result."""
        refuse_others(self)
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs is only allowed when logprobs is true.", "top_logprobs")


def refuse_others(body: Sampled) -> None:
    """Raise ApiError 400 for parameters that cannot be honoured, and for unknown ones."""
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options is only allowed when stream is true.", "stream_options")
    for name, asked in (body.model_extra or {}).items():
        if asked is None or name in _WITHOUT_EFFECT or asked in _DEFAULTS.get(name, ()):
            continue
        raise _unsupported(name) if name in _DEFAULTS else _unknown(name, type(body).model_fields)


_WITHOUT_EFFECT = frozenset(
    {
        "metadata",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "user",
    }
)
"""Parameters that a completion is the same without."""

_DEFAULTS: Mapping[str, tuple[object, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("auto", "none"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("auto", "none"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""OpenAI's parameters that are not supported, with the values that ask for nothing."""


def _unknown(name: str, known: Iterable[str]) -> ApiError:
    near = nearest(name, known)
    meant = f" Did you mean {near}?" if near else ""
    return invalid(f"Unrecognized request argument supplied: {name[:64]}.{meant}", name[:64], "unknown_parameter")


def _unsupported(name: str) -> ApiError:
    return invalid(f"Unsupported parameter: '{name}' is not supported with this model.", name, "unsupported_parameter")
