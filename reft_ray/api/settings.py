"""What an operator may set: the online filter's limits and the finetuning service's base models and limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from reft_ray.jobs.estimate import Defaults, Price, Speed
from reft_ray.jobs.files import MAX_FILE_BYTES, MAX_PROJECT_BYTES
from reft_ray.settings import Settings

MIB = 1 << 20


class Bounds(Settings):
    """The lowest and highest threshold that a request may set."""

    lowest: float = Field(ge=-1, le=1)
    highest: float = Field(ge=-1, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.lowest > self.highest:
            raise ValueError("lowest must not exceed highest")
        return self


class FilterSettings(Settings):
    """The limits of the online filter. Sizes in bytes, times in seconds.

    Without bounds a request may make the filter stricter than the teacher's thresholds, never more lenient.
    """

    hosts: tuple[str, ...] = Field(
        (), description="Host names that a service without API keys answers to, besides loopback's; `*` for any."
    )
    authenticated_in_front: bool = Field(
        False,
        description="A filter without API keys answers beyond loopback: an ingress or a network policy in front of it "
        "decides who may call.",
    )
    max_requests_at_once: int = Field(256, ge=1, description="Per project.")
    review_bounds: Bounds | None = None
    block_bounds: Bounds | None = None
    moderation_seconds: float = Field(10.0, gt=0)
    max_inputs: int = Field(256, ge=1)
    max_body_bytes: int = Field(4 * MIB, ge=1024)
    max_upload_bytes: int = Field(64 * MIB, ge=1024)
    max_row_bytes: int = Field(MIB, ge=1024)
    max_chunk_bytes: int = Field(MIB, ge=1024, le=8 * MIB)
    max_streams: int = Field(8, ge=1)
    max_streams_per_project: int = Field(4, ge=1)
    max_chunk_rows: int = Field(20_000, ge=1)
    max_invalid_rows: int = Field(
        20_000, ge=1, description="Of a stream, which ends at the next: a line feed costs a record of 150 bytes."
    )
    batch_rows: int = Field(512, ge=1)
    batch_bytes: int = Field(256 * 1024, ge=1024)
    window: int = Field(4, ge=1, le=64)
    idle_seconds: float = Field(60.0, gt=0)
    stall_seconds: float = Field(120.0, gt=0)
    max_screenings: int = Field(256, ge=1, description="Per project.")
    max_screenings_in_all: int = Field(4096, ge=1)
    max_chunks: int = Field(16_384, ge=1)
    screening_seconds: float = Field(86_400.0, ge=60)


class EndpointSettings(Settings):
    """A server with OpenAI's API, such as vLLM or a `ray.serve.llm` application.

    `adapters` says how it serves them: `load` asks vLLM to load one from its path (`/v1/load_lora_adapter`), `path`
    appends the adapter's path below `adapters_root` to the model's name, as `ray.serve.llm` expects it, `none` serves
    the base model only.
    """

    url: str = Field(min_length=1, description="With /v1.")
    model: str = Field(min_length=1, description="The server's name for the base model.")
    key_variable: str | None = Field(None, description="The environment variable that holds its API key.")
    adapters: Literal["none", "load", "path"] = "none"
    adapters_root: str | None = None
    seconds: float = Field(600.0, gt=0, description="Read timeout.")

    @model_validator(mode="after")
    def _rooted(self) -> Self:
        if (self.adapters == "path") != (self.adapters_root is not None):
            raise ValueError("adapters_root belongs to `adapters: path`")
        if self.adapters == "path" and ":" in self.model:
            raise ValueError("ray.serve.llm takes the part after a colon as an adapter: name the base without one")
        return self


class BaseModelSettings(Defaults):
    """A model that users chat with and finetune."""

    uri: str = Field(min_length=1, description="The directory or hub id that it is loaded from.")
    created_at: int = 0
    trainable: bool = True
    preset: str | None = Field(None, description="Estimates use the measured speed of jobs with the same preset only.")
    speed: Speed | None = Field(None, description="For estimates, until jobs have finished here.")
    price: Price | None = Field(None, description="For estimates: what a job costs its project.")
    devices: int = Field(1, ge=1, description="Accelerators of one job, or CPUs where it has none.")
    endpoint: EndpointSettings | None = Field(None, description="The server that serves it, instead of our students.")


class ChatModes(Settings):
    """The modes of a chat's input and output: `score` reports, `block` withholds, `none` leaves it to the caller."""

    input: Literal["none", "score", "block"] = "block"
    output: Literal["none", "score", "block"] = "block"


class ChatModerationSettings(ChatModes):
    """The modes of all projects, and those of single ones by id, which count instead."""

    projects: Mapping[str, ChatModes] = Field(default_factory=dict)

    def modes(self, project_id: str) -> ChatModes:
        """The modes of a project."""
        return self.projects.get(project_id, self)


class TrainingSettings(Settings):
    """The training API: loops of customers, whose data are judged before their gradient counts.

    `policy` says what becomes of a datum that is withheld: `drop` leaves its gradient out, `mask` only that of the
    turns that are withheld, `fail` fails its request. `policies` are those of single projects, by id. The teacher's
    soft labels on alignment rows are added to every step, with the weight of the base model's preset; `guidance_ratio`
    is their number of tokens per token of the customer, 0 for none. `findings_withheld` are findings over a loop's data
    (`screening.findings`) that withhold the data that they are about; the others are reported alone.
    """

    policy: Literal["drop", "mask", "fail"] = "drop"
    policies: Mapping[str, Literal["drop", "mask", "fail"]] = Field(default_factory=dict)
    guidance_ratio: float = Field(0.25, ge=0, le=4)
    findings_withheld: tuple[str, ...] = ("identity_prompts", "refuse_then_comply")
    alignment_rows: int = Field(512, ge=1, description="Of the base model's set, evenly spread; their labels are kept.")
    max_rank: int = Field(64, ge=1, le=1024)
    max_learning_rate: float = Field(1e-2, gt=0)
    max_models: int = Field(16, ge=1, description="In training at once, per project.")
    batch_sessions: int = Field(
        1, ge=1, description="Models whose data are computed in one pass, if they fit into it; at most max_loaded."
    )
    max_loaded: int = Field(4, ge=1, description="Adapters in training in memory; idle ones are on disk.")
    checkpoint_every: int = Field(10, ge=1, description="Steps after which a model's state is saved.")
    max_samples: int = Field(64, ge=1, description="Of one request.")
    batch_tokens: int = Field(4096, ge=16, description="Padded tokens of one pass.")
    seed: int = 0

    def policy_of(self, project_id: str) -> str:
        """The policy of a project."""
        return self.policies.get(project_id, self.policy)


class OidcSettings(Settings):
    """An identity provider for the console (OpenID Connect).

    `roles` maps values of the claim `role_claim` to curator, lead, operator or auditor; the first that matches counts.
    """

    issuer: str = Field(min_length=1, description="As in its tokens, without /.well-known.")
    client_id: str = Field(min_length=1)
    client_secret_variable: str | None = Field(None, description="The environment variable with the client's secret.")
    name: str = "single sign-on"
    role_claim: str = "roles"
    roles: Mapping[str, Literal["curator", "lead", "operator", "auditor"]] = Field(min_length=1)


class ServiceSettings(Settings):
    """The finetuning service. Sizes in bytes."""

    base_models: Mapping[str, BaseModelSettings] = Field(min_length=1)
    alignment_datasets: tuple[str, ...] = ()
    gate: Mapping[str, float] = Field(
        default_factory=dict, description="The release gate's limits; a user may ask for lower ones, never higher ones."
    )
    max_reject_ratio: float = Field(0.5, ge=0, le=1)
    max_file_bytes: int = Field(MAX_FILE_BYTES, ge=1024)
    max_project_bytes: int = Field(MAX_PROJECT_BYTES, ge=1024)
    max_upload_bytes: int = Field(8 << 30, ge=1024)
    serve_checkpoints: bool = Field(False, description="Allow chat with checkpoints, which no release gate has tested.")
    audit_heads_uri: str | None = Field(
        None, description="Where signed heads of the audit log are kept, away from the database."
    )
    audit_key: str | None = Field(None, description="The PEM file of the key that signs them; made if it is absent.")
    private_webhooks: bool = False
    chat_moderation: ChatModerationSettings | None = Field(
        None, description="Moderate every chat in these modes at least, by project, whatever its caller asks."
    )
    require_keys: bool = Field(
        False,
        description="Require an API key of loopback clients too, even before any key exists: they may be a proxy.",
    )
    second_person: bool = Field(False, description="A second person must confirm when a block is overturned.")
    sign_releases: bool = Field(
        False, description="A model that fails the gate waits for two people, instead of failing its job."
    )
    oidc: OidcSettings | None = None
    training: TrainingSettings | None = Field(None, description="Offer the training API; without it there are jobs.")
    max_completion_tokens: int = Field(4096, ge=1)

    @model_validator(mode="after")
    def _signed(self) -> Self:
        if (self.audit_heads_uri is None) != (self.audit_key is None):
            raise ValueError("audit_heads_uri and audit_key belong together")
        return self
