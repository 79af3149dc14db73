"""What an operator may set, checked strictly: an unknown key is an error that names the nearest known one."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from reft_ray.api.settings import MIB, Bounds, FilterSettings
from reft_ray.core.errors import UsageError
from reft_ray.jobs.files import MAX_FILE_BYTES, MAX_PROJECT_BYTES
from reft_ray.telemetry.metric_types import DEFAULT_APPLICATION

BUILTIN = "builtin"
_DEFAULTS = FilterSettings()


class Strict(BaseModel):
    """Frozen, without room for typing errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class CanaryArgs(Strict):
    """Two prompts on which the teacher must be right, whenever it is loaded and at every health check."""

    harmful: str = Field(min_length=1)
    harmless: str = Field(min_length=1)


class TeacherArgs(Strict):
    """The teacher and how it runs; as `user_config` of the deployment it may change while the service answers."""

    teacher: str = Field(default=BUILTIN, min_length=1, description="A directory, or `builtin`.")
    scorer: Literal["teacher", "words"] = Field(default="teacher", description="`words` is for tests alone.")
    base: str | None = Field(default=None, description="The base model, where it is not the one the teacher names.")
    device: str | None = Field(default=None, description="`cpu`, `cuda`, ...; by default the best one present.")
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    window_tokens: int | None = Field(default=None, ge=16, description="By default the teacher's own.")
    batch_tokens: int = Field(default=4096, ge=16)
    cache_texts: int = Field(default=100_000, ge=0, description="Texts whose scores are remembered; 0 for none.")
    canary: CanaryArgs | None = None


class BoundsArgs(Strict):
    """What a request may ask for."""

    lowest: float = Field(ge=-1, le=1)
    highest: float = Field(ge=-1, le=1)

    @model_validator(mode="after")
    def _ordered(self) -> BoundsArgs:
        if self.lowest > self.highest:
            raise ValueError("lowest must not exceed highest")
        return self


class FilterArgs(Strict):
    """The limits of the HTTP face; the defaults are those of `api.settings`."""

    review_bounds: BoundsArgs | None = None
    block_bounds: BoundsArgs | None = None
    moderation_seconds: float = Field(default=_DEFAULTS.moderation_seconds, gt=0)
    max_inputs: int = Field(default=_DEFAULTS.max_inputs, ge=1)
    max_body_bytes: int = Field(default=_DEFAULTS.max_body_bytes, ge=1024)
    max_upload_bytes: int = Field(default=_DEFAULTS.max_upload_bytes, ge=1024)
    max_row_bytes: int = Field(default=_DEFAULTS.max_row_bytes, ge=1024)
    max_chunk_bytes: int = Field(default=_DEFAULTS.max_chunk_bytes, ge=1024, le=8 * MIB)
    max_streams: int = Field(default=_DEFAULTS.max_streams, ge=1)
    batch_rows: int = Field(default=_DEFAULTS.batch_rows, ge=1)
    batch_bytes: int = Field(default=_DEFAULTS.batch_bytes, ge=1024)
    window: int = Field(default=_DEFAULTS.window, ge=1, le=64)
    idle_seconds: float = Field(default=_DEFAULTS.idle_seconds, gt=0)
    stall_seconds: float = Field(default=_DEFAULTS.stall_seconds, gt=0)
    max_screenings: int = Field(default=_DEFAULTS.max_screenings, ge=1)
    max_screenings_in_all: int = Field(default=_DEFAULTS.max_screenings_in_all, ge=1)
    max_chunks: int = Field(default=_DEFAULTS.max_chunks, ge=1)
    screening_seconds: float = Field(default=_DEFAULTS.screening_seconds, ge=60)

    def settings(self) -> FilterSettings:
        """The same for the API, which knows no pydantic settings."""
        values = self.model_dump(exclude={"review_bounds", "block_bounds"})
        review, block = self.review_bounds, self.block_bounds
        return FilterSettings(
            review_bounds=Bounds(review.lowest, review.highest) if review else None,
            block_bounds=Bounds(block.lowest, block.highest) if block else None,
            **values,
        )


class DeploymentArgs(Strict):
    """Size of a deployment; `deployments:` in a Serve config overrides every value, and adds autoscaling."""

    replicas: int = Field(default=1, ge=1)
    cpus: float = Field(default=1.0, ge=0)
    gpus: float = Field(default=0.0, ge=0)
    max_ongoing: int = Field(ge=1)
    max_queued: int = Field(ge=1)


class ChatArgs(Strict):
    """How students talk: a replica completes up to `max_rows` conversations together, whatever adapters they are on."""

    device: str | None = Field(default=None, description="`cpu`, `cuda`, ...; by default the best one present.")
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    max_adapters: int = Field(default=8, ge=1, description="Adapters in memory; the least recently used goes first.")
    max_adapter_bytes: int = Field(default=4 << 30, ge=1024)
    max_rows: int = Field(default=32, ge=1, description="Completions at once, per replica.")
    max_waiting: int = Field(default=64, ge=1, description="Completions that may wait; others are refused with 503.")
    cache_tokens: int = Field(default=65_536, ge=256, description="Rows times the longest that one may become.")
    prompt_tokens: int = Field(default=8192, ge=256, description="Prompt tokens that are read between two steps.")


class EndpointArgs(Strict):
    """A server that speaks OpenAI's API, such as vLLM's or an application of `ray.serve.llm`.

    `adapters` says how it takes them: `load` asks vLLM to load one from its path (`/v1/load_lora_adapter`), `path`
    appends its place below `adapters_root` to the model's name, as `ray.serve.llm` has it, `none` serves the base
    alone.
    """

    url: str = Field(min_length=1, description="With /v1.")
    model: str = Field(min_length=1, description="What the server calls the base model.")
    key_variable: str | None = Field(default=None, description="The environment variable that holds its API key.")
    adapters: Literal["none", "load", "path"] = "none"
    adapters_root: str | None = None
    seconds: float = Field(default=600.0, gt=0, description="The longest silence of the server.")

    @model_validator(mode="after")
    def _rooted(self) -> EndpointArgs:
        if (self.adapters == "path") != (self.adapters_root is not None):
            raise ValueError("adapters_root belongs to `adapters: path`")
        if self.adapters == "path" and ":" in self.model:
            raise ValueError("ray.serve.llm takes what follows a colon for an adapter: name the base without one")
        return self


class SpeedArgs(Strict):
    """What was measured on the devices of a base's jobs; see `jobs.estimate.Speed`."""

    training_tokens: float = Field(gt=0, description="Tokens per second over all devices of a job.")
    screening_rows: float = Field(gt=0, description="Rows per second.")
    start_seconds: float = Field(default=30.0, ge=0)
    devices: int = Field(default=1, ge=1)
    overhead: float = Field(default=0.1, ge=0)
    step_seconds: float = Field(default=0.0, ge=0, description="For files too small for the preset's least steps.")


class BaseModelArgs(Strict):
    """A model that users chat with and finetune. `uri` is the directory, or hub id, that it is loaded from."""

    uri: str = Field(min_length=1)
    created_at: int = 0
    trainable: bool = True
    n_epochs: int = Field(default=3, ge=1, description="What `auto` means, for estimates.")
    batch_size: int = Field(default=16, ge=1)
    min_steps: int = Field(default=0, ge=0, description="The preset's, for estimates.")
    speed: SpeedArgs | None = Field(default=None, description="For estimates, until jobs have ended here.")
    devices: int = Field(default=1, ge=1, description="Accelerators of one job, or processors where it has none.")
    endpoint: EndpointArgs | None = Field(default=None, description="Who answers, where it is not our own students.")


class SlotsArgs(Strict):
    """How many jobs may be at work at once."""

    training: int = Field(default=1, ge=1)
    validating: int = Field(default=2, ge=1)
    training_per_project: int = Field(default=1, ge=1)


class ServiceArgs(Strict):
    """Finetuning jobs, files and chat beside the filter. Without this section there is only the filter.

    `options` go to the steps' factory (`service.config.StepsConfig` for ours); other keys are those of
    `api.services.ServiceSettings`.
    """

    database_url: str = Field(min_length=1, description="sqlite:///PATH, or postgresql+psycopg:// for several gateways")
    files_uri: str = Field(min_length=1, description="A directory or pyarrow.fs URI for files and artefacts.")
    base_models: dict[str, BaseModelArgs] = Field(min_length=1)
    steps: str = Field(default="reft_ray.pipeline.steps:make", pattern=r"^[\w.]+:\w+$")
    options: dict[str, Any] = Field(default_factory=dict)
    job_server: str | None = Field(
        default=None,
        pattern=r"^https?://",
        description="Drivers run as Ray jobs of the cluster with this dashboard; by default as processes beside the "
        "gateway.",
    )
    driver_cpus: float = Field(
        default=0, ge=0, description="What a driver asks for as a Ray job; one that asks for nothing runs on the head."
    )
    counter: str = Field(default="reft_ray.pipeline.token_count:TokenizerCounter", pattern=r"^[\w.]+:\w+$")
    logs: str | None = Field(default=None, description="A directory for the logs of drivers that are processes.")
    slots: SlotsArgs = SlotsArgs()
    alignment_datasets: tuple[str, ...] = ()
    gate: dict[str, float] = Field(default_factory=dict)
    max_reject_ratio: float = Field(default=0.5, ge=0, le=1)
    max_file_bytes: int = Field(default=MAX_FILE_BYTES, ge=1024)
    max_project_bytes: int = Field(default=MAX_PROJECT_BYTES, ge=1024)
    max_upload_bytes: int = Field(default=8 << 30, ge=1024)
    serve_checkpoints: bool = False
    private_webhooks: bool = False
    require_keys: bool = Field(
        default=False,
        description="Nobody comes in without an API key, not even from loopback, where a proxy may pass others on.",
    )
    max_completion_tokens: int = Field(default=4096, ge=1)
    chat: ChatArgs = ChatArgs()


class ServeArgs(Strict):
    """`args:` of the application in a Serve config."""

    teacher: TeacherArgs = TeacherArgs()
    filter: FilterArgs = FilterArgs()
    screenings_uri: str | None = Field(
        default=None, description="A directory or pyarrow.fs URI that all gateways reach; for resumable screenings."
    )
    application: str = Field(default=DEFAULT_APPLICATION, description="The label `application` of every metric.")
    metrics_token_variable: str | None = Field(
        default=None, description="The environment variable that holds the bearer token of `/metrics`."
    )
    # A teacher call carries a list of rows, so a few calls in flight keep it busy and more would only wait there.
    teachers: DeploymentArgs = DeploymentArgs(max_ongoing=32, max_queued=64)
    gateways: DeploymentArgs = DeploymentArgs(cpus=0.5, max_ongoing=256, max_queued=256)
    service: ServiceArgs | None = None
    students: DeploymentArgs = DeploymentArgs(max_ongoing=128, max_queued=128)


def from_environment(variable: str | None) -> str | None:
    """A secret that the arguments name. Raises UsageError where it is empty: a typo leaves nothing open."""
    if variable is None:
        return None
    secret = os.environ.get(variable)
    if not secret:
        raise UsageError(f"the environment variable {variable} is empty")
    return secret


def parse_args(values: Mapping[str, Any] | ServeArgs) -> ServeArgs:
    """The arguments from YAML. Raises UsageError, one line per mistake."""
    if isinstance(values, ServeArgs):
        return values
    mistakes = problems(ServeArgs, values, "args")
    if mistakes:
        raise UsageError("\n".join(mistakes))
    return ServeArgs.model_validate(values)


def problems(model: type[BaseModel], values: Any, where: str) -> list[str]:
    """What is wrong with values for a model, one line each; unknown keys get a suggestion."""
    try:
        model.model_validate(values)
    except ValidationError as error:
        return [_line(model, item, where) for item in error.errors()]
    return []


def _line(model: type[BaseModel], item: Any, where: str) -> str:
    path = ".".join((where, *map(str, item["loc"])))
    if item["type"] != "extra_forbidden":
        return f"{path}: {item['msg']}"
    return f"{path}: unknown key{suggestion(str(item['loc'][-1]), _names(model, item['loc'][:-1]))}"


def suggestion(name: str, known: list[str]) -> str:
    """`; did you mean ...?`, or nothing."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _names(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    for name in location:
        field = model.model_fields.get(str(name))
        annotation = field.annotation if field else None
        inner = [kind for kind in (annotation, *getattr(annotation, "__args__", ())) if isinstance(kind, type)]
        models = [kind for kind in inner if issubclass(kind, BaseModel)]
        if not models:
            return []
        model = models[0]
    return list(model.model_fields)
