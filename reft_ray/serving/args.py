"""The arguments of the Serve application: `args:` in a Serve config, and the Teacher's `user_config`."""

from __future__ import annotations

import os
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from reft_ray.api.auth import check_bind
from reft_ray.api.settings import FilterSettings, ServiceSettings
from reft_ray.core.errors import UsageError
from reft_ray.guards.settings import CascadeSettings
from reft_ray.jobs.lease import Slots
from reft_ray.settings import Factory, Settings
from reft_ray.teachers import BUILTIN
from reft_ray.telemetry.metric_types import DEFAULT_APPLICATION

PIPELINE = "reft_ray.pipeline.steps:make"
"""The steps of jobs on our own models."""


class CanaryArgs(Settings):
    """Two prompts that the teacher must judge correctly, at loading and at every health check."""

    harmful: str = Field(min_length=1)
    harmless: str = Field(min_length=1)


class TeacherArgs(Settings):
    """The teacher and how it runs; as `user_config` of the deployment it may change without a restart."""

    teacher: str = Field(BUILTIN, min_length=1, description="A directory, or `builtin`.")
    scorer: Literal["teacher", "words"] = Field("teacher", description="`words` is for tests only.")
    base: str | None = Field(None, description="The base model, if it is not the one that the teacher names.")
    device: str | None = Field(None, description="`cpu`, `cuda`, ...; by default the best available.")
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    window_tokens: int | None = Field(None, ge=16, description="By default the teacher's.")
    batch_tokens: int = Field(4096, ge=16)
    cache_texts: int = Field(100_000, ge=0, description="Texts whose scores are cached; 0 for none.")
    canary: CanaryArgs | None = None


class DeploymentArgs(Settings):
    """Size of a deployment; `deployments:` in a Serve config overrides every value, and adds autoscaling."""

    replicas: int = Field(1, ge=1)
    cpus: float = Field(1.0, ge=0)
    gpus: float = Field(0.0, ge=0)
    max_ongoing: int = Field(ge=1)
    max_queued: int = Field(ge=1)


class ChatArgs(Settings):
    """A student replica: it batches up to `max_rows` completions, on any adapters of its base model."""

    device: str | None = Field(None, description="`cpu`, `cuda`, ...; by default the best available.")
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    max_adapters: int = Field(8, ge=1, description="Adapters in memory; the least recently used is evicted.")
    max_adapter_bytes: int = Field(4 << 30, ge=1024)
    max_rows: int = Field(32, ge=1, description="Running completions per replica.")
    max_waiting: int = Field(64, ge=1, description="Queued completions per replica; further ones get 503.")
    cache_tokens: int = Field(65_536, ge=256, description="KV cache: rows times the longest final length of a row.")
    prompt_tokens: int = Field(8192, ge=256, description="Prompt tokens processed between two decoding steps.")


class ServiceArgs(ServiceSettings):
    """The finetuning service: jobs, files and chat. Without this section there is only the filter."""

    database_url: str = Field(min_length=1, description="sqlite:///PATH, or postgresql+psycopg:// for several gateways")
    files_uri: str = Field(min_length=1, description="A directory or pyarrow.fs URI for files and artefacts.")
    steps: Factory = PIPELINE
    options: dict[str, Any] = Field(default_factory=dict, description="For `steps`: `pipeline.steps.StepsConfig`.")
    trainer: Factory = "reft_ray.pipeline.training_worker:make"
    counter: Factory = "reft_ray.pipeline.token_count:TokenizerCounter"
    job_server: str | None = Field(
        None,
        pattern=r"^https?://",
        description="Run drivers as Ray jobs of the cluster with this dashboard; by default they are processes of the "
        "gateway's machine.",
    )
    job_template: str | None = Field(
        None,
        description="Run each job in its own cluster: a file with a RayJob (cluster/components/jobs), which the "
        "gateway fills and creates through the Kubernetes API.",
    )
    measure_speed: bool = Field(
        True, description="Where drivers are processes: measure models without a speed at the start, for estimates."
    )
    driver_cpus: float = Field(0, ge=0, description="CPUs of a driver as a Ray job; with 0 it runs on the head.")
    logs: str | None = Field(None, description="A directory for the logs of drivers that are processes.")
    slots: Slots = Slots()
    chat: ChatArgs = ChatArgs()


class KeysArgs(Settings):
    """API keys for the filter alone. `reft-ray keys` makes them, once the filter has made the database."""

    database_url: str = Field(min_length=1, description="sqlite:///PATH, or postgresql+psycopg:// for several gateways")


class ServeArgs(Settings):
    """`args:` of the application in a Serve config."""

    teacher: TeacherArgs = TeacherArgs()
    filter: FilterSettings = FilterSettings()
    screenings_uri: str | None = Field(
        None, description="A directory or pyarrow.fs URI that all gateways reach; for resumable screenings."
    )
    application: str = Field(DEFAULT_APPLICATION, description="The label `application` of every metric.")
    metrics_token_variable: str | None = Field(
        None, description="The environment variable that holds the bearer token of `/metrics`."
    )
    # A call carries a list of rows, so a few calls keep the teacher busy; more would only queue in the replica.
    teachers: DeploymentArgs = DeploymentArgs(max_ongoing=32, max_queued=64)
    cascade: CascadeSettings = Field(CascadeSettings(), description="Guards next to the teacher, a deployment each.")
    guards: DeploymentArgs = DeploymentArgs(cpus=0.5, max_ongoing=16, max_queued=64)
    gateways: DeploymentArgs = DeploymentArgs(cpus=0.5, max_ongoing=256, max_queued=256)
    keys: KeysArgs | None = Field(None, description="For a filter without `service:`, which has keys of its own.")
    service: ServiceArgs | None = None
    students: DeploymentArgs = DeploymentArgs(max_ongoing=128, max_queued=128)
    trainers: DeploymentArgs = Field(
        DeploymentArgs(max_ongoing=8, max_queued=8),
        description="Of the training API; always one replica per base model.",
    )

    @model_validator(mode="after")
    def _one_database_of_keys(self) -> Self:
        if self.keys is not None and self.service is not None:
            raise ValueError("`service:` has keys of its own; leave `keys:` out")
        return self

    def check_bind(self, host: str) -> None:
        """Raise UsageError for a public address where callers need no key. `service.require_keys` says that they do:
        whether its database has keys is known too late."""
        keys = self.keys is not None or (self.service is not None and self.service.require_keys)
        if self.service is None and self.filter.authenticated_in_front:
            return
        wanted = "service.require_keys: true" if self.service else "keys:, or filter.authenticated_in_front: true"
        check_bind(host, keys, f"set {wanted}")


def from_environment(variable: str | None) -> str | None:
    """The secret in an environment variable. Raises UsageError if it is empty: a misspelt name must not disable it."""
    if variable is None:
        return None
    secret = os.environ.get(variable)
    if not secret:
        raise UsageError(f"the environment variable {variable} is empty")
    return secret
