"""Requests of the training API, as the public client sends them. What is not supported is refused by its name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

Id = Annotated[str, Field(min_length=1, max_length=80)]
Path = Annotated[str, Field(min_length=1, max_length=320)]
Number = Annotated[int, Field(ge=0, lt=1 << 62)]
Ttl = Annotated[int, Field(ge=60, le=10 * 365 * 86400)]
Metadata = Mapping[str, Any]
_MAX_METADATA = 64


class Request(BaseModel):
    """A request; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    type: str | None = Field(None, max_length=64)

    @field_validator("user_metadata", "metadata", mode="before", check_fields=False)
    @classmethod
    def _small(cls, value: Any) -> Any:
        if isinstance(value, dict) and (len(value) > _MAX_METADATA or len(str(value)) > 16_384):
            raise PydanticCustomError("too_large", "is too large: 64 entries and 16,384 characters are kept")
        return value


def unsupported(name: str, only: str = "") -> PydanticCustomError:
    """The validation error for something that the client may ask and this server has not."""
    return PydanticCustomError("unsupported", f"{name} is not supported by this server{only}")


class ClientVersion(Request):
    """Asked for the client's configuration."""

    sdk_version: str = Field(max_length=64)


class SessionCreate(Request):
    """Open a session."""

    tags: list[Annotated[str, Field(max_length=128)]] = Field(default_factory=list, max_length=64)
    user_metadata: Metadata | None = None
    sdk_version: str = Field("", max_length=64)
    project_id: str | None = Field(None, max_length=64)
    display_name: str | None = Field(None, max_length=256)


class SessionRef(Request):
    """A session that is still used."""

    session_id: Id


class Finish(BaseModel):
    """Why a session ends."""

    model_config = ConfigDict(extra="ignore")

    reason: Mapping[str, Any] = Field(default_factory=dict)


class Lora(BaseModel):
    """The adapter of a new model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rank: int = Field(ge=1)
    seed: int | None = Field(None, ge=0, lt=1 << 48)
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True

    @model_validator(mode="after")
    def _some(self) -> Lora:
        if not (self.train_unembed or self.train_mlp or self.train_attn):
            raise PydanticCustomError("no_layers", "trains no layer")
        return self


class Optimizer(BaseModel):
    """The optimiser of a model."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    type: str = "adamw"

    @field_validator("type")
    @classmethod
    def _adam(cls, value: str) -> str:
        if value != "adamw":
            raise unsupported(f"the optimizer {value[:32]!r}", ": use adamw")
        return value


class ModelCreate(Request):
    """A new model: a LoRA adapter on a base model."""

    session_id: Id
    model_seq_id: Annotated[int, Field(ge=0, lt=1 << 30)]
    base_model: str = Field(min_length=1, max_length=256)
    user_metadata: Metadata | None = None
    lora_config: Lora | None = None
    optimizer_config: Optimizer = Optimizer()

    @field_validator("lora_config")
    @classmethod
    def _adapter(cls, value: Lora | None) -> Lora:
        if value is None:
            raise unsupported("training without lora_config", ": full weights are not trained here")
        return value


class ModelRef(Request):
    """A model."""

    model_id: Id


class AdamParams(BaseModel):
    """One step of AdamW, with the client's defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    learning_rate: float = Field(1e-4, ge=0, allow_inf_nan=False)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-12, ge=0, allow_inf_nan=False)
    weight_decay: float = Field(0.0, ge=0, le=1)
    grad_clip_norm: float = Field(0.0, ge=0, allow_inf_nan=False)


class OptimStep(Request):
    """An optimiser step."""

    model_id: Id
    seq_id: Number
    adam_params: AdamParams | None = None
    optimizer_params: Mapping[str, Any] | None = None

    @model_validator(mode="after")
    def _adam(self) -> OptimStep:
        if self.optimizer_params is not None or self.adam_params is None:
            raise unsupported("another optimizer than adamw", ": send adam_params")
        return self


class Save(Request):
    """Save weights and optimiser."""

    model_id: Id
    seq_id: Number
    path: str | None = Field(None, max_length=128)
    ttl_seconds: Ttl | None = None
    overwrite: bool = False
    user_metadata: Metadata | None = None


class SaveForSampler(Request):
    """Save weights to sample from: under a name, or for a sampler of this session alone."""

    model_id: Id
    seq_id: Number
    path: str | None = Field(None, max_length=128)
    sampling_session_seq_id: Annotated[int, Field(ge=0, lt=1 << 30)] | None = None
    kind: str = Field("snapshot", max_length=32)
    ttl_seconds: Ttl | None = None
    user_metadata: Metadata | None = None

    @model_validator(mode="after")
    def _one(self) -> SaveForSampler:
        if self.kind != "snapshot":
            raise unsupported(f"kind={self.kind!r}", ": use snapshot")
        if (self.path is None) == (self.sampling_session_seq_id is None):
            raise PydanticCustomError("one_of", "needs either path or sampling_session_seq_id")
        return self


class SaveExternal(Request):
    """Save weights for download, as a PEFT directory."""

    model_id: Id
    seq_id: Number
    path: str = Field(max_length=128)
    ttl_seconds: Ttl | None = None
    age_encryption_recipients: list[str] | None = None

    @field_validator("age_encryption_recipients")
    @classmethod
    def _plain(cls, value: list[str] | None) -> None:
        if value:
            raise unsupported("age_encryption_recipients")


class Load(Request):
    """Load weights into a model, or into a new one of a session."""

    model_id: Id | None = None
    seq_id: Number | None = None
    session_id: Id | None = None
    model_seq_id: Annotated[int, Field(ge=0, lt=1 << 30)] | None = None
    base_model: str | None = Field(None, max_length=256)
    user_metadata: Metadata | None = None
    path: Path
    optimizer: bool
    optimizer_config: Optimizer | None = None
    weights_access_token: str | None = Field(None, max_length=4096)

    @model_validator(mode="after")
    def _one(self) -> Load:
        if self.weights_access_token is not None:
            raise unsupported("weights_access_token", ": weights of another project are not loaded")
        known, new = (self.model_id, self.seq_id), (self.session_id, self.model_seq_id)
        if (None in known) == (None in new) or any((None in pair) and pair != (None, None) for pair in (known, new)):
            raise PydanticCustomError("one_of", "needs either model_id and seq_id or session_id and model_seq_id")
        return self


class SamplerCreate(Request):
    """A sampler of saved weights, or of the base model."""

    session_id: Id
    sampling_session_seq_id: Annotated[int, Field(ge=0, lt=1 << 30)]
    base_model: str | None = Field(None, max_length=256)
    model_path: Path | None = None


class SamplerRef(Request):
    """A sampler."""

    sampling_session_id: Id


class Chunk(BaseModel):
    """A part of a prompt: tokens."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    type: str = Field("encoded_text", max_length=64)
    tokens: list[Annotated[int, Field(ge=0, lt=1 << 31)]] = Field(default_factory=list)

    @field_validator("type")
    @classmethod
    def _text(cls, value: str) -> str:
        if value != "encoded_text":
            raise unsupported(f"a chunk of type {value[:32]!r}", ": only tokens of text are read")
        return value


class Prompt(BaseModel):
    """A prompt."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    chunks: list[Chunk] = Field(min_length=1)

    @property
    def tokens(self) -> list[int]:
        """Its tokens."""
        return [token for chunk in self.chunks for token in chunk.tokens]


class SampleParams(BaseModel):
    """How to sample."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_tokens: int | None = Field(None, ge=1)
    seed: int | None = None
    stop: str | list[str] | list[int] | None = None
    temperature: float = Field(1.0, ge=0, le=100)
    top_k: int = -1
    top_p: float = Field(1.0, gt=0, le=1)

    @field_validator("top_k")
    @classmethod
    def _all(cls, value: int) -> int:
        if value != -1:
            raise unsupported("top_k", ": leave it at -1")
        return value


_OFF: Mapping[str, Any] = {
    "topk_prompt_logprobs": 0,
    "topk_sample_logprobs": 0,
    "prompt_alt_tokens_k": 0,
    "target_prompt_logprobs": None,
    "prompt_logprobs_last_n": None,
    "record_stability_info": False,
}


class SampleRequest(Request):
    """Samples of a prompt."""

    num_samples: int = Field(1, ge=1)
    prompt: Prompt
    sampling_params: SampleParams
    sampling_session_id: Id | None = None
    seq_id: Number | None = None
    base_model: str | None = None
    model_path: str | None = None
    prompt_logprobs: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _known(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for name, off in _OFF.items():
            if values.get(name) not in (None, off):
                raise unsupported(name)
        if values.get("sampling_session_id") is None or values.get("seq_id") is None:
            raise unsupported("sampling without sampling_session_id and seq_id")
        return {key: value for key, value in values.items() if key not in _OFF}


class Retrieve(Request):
    """Ask for a result."""

    request_id: Id
    allow_metadata_only: bool = False


class PathRef(Request):
    """A checkpoint."""

    tinker_path: Path


class TtlUpdate(BaseModel):
    """When a checkpoint expires; None for never."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    ttl_seconds: Ttl | None = None


UNSUPPORTED: Mapping[str, tuple[Literal["GET", "POST", "PUT", "DELETE"], ...]] = {
    "/create_custom_loss": ("POST",),
    "/copy_weights": ("POST",),
    "/retrieve_futures": ("POST",),
    "/auth/token": ("POST",),
    "/audit": ("GET",),
    "/billing/usage/events": ("GET",),
    "/billing/usage/checkpoints/current": ("GET",),
    "/sessions/search": ("POST", "GET"),
    "/sessions/{session_id}/project": ("PUT", "POST"),
    "/sessions/{session_id}/trace_export": ("GET", "POST"),
    "/training_runs/{model_id}/checkpoints/{kind}/{name}/publish": ("POST", "DELETE"),
}
"""Paths of the client that this server refuses by name."""
