"""Everything that the routes of the finetuning service work with, opened once per gateway."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from reft_ray.jobs.audit import AuditLog
from reft_ray.jobs.content import ContentStore
from reft_ray.jobs.database import Database
from reft_ray.jobs.estimate import Counter, Defaults, Speed, count_bytes
from reft_ray.jobs.files import MAX_FILE_BYTES, MAX_PROJECT_BYTES, FileStore
from reft_ray.jobs.job_store import JobStore
from reft_ray.jobs.models import ModelStore
from reft_ray.jobs.rate_limits import RateLimits
from reft_ray.jobs.tenants import Tenants
from reft_ray.jobs.uploads import UploadStore
from reft_ray.jobs.webhooks import Webhooks
from reft_ray.telemetry.recorder import Recorder


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A model that users may chat with and finetune. `uri` is the directory that it is loaded from.

    Estimates use the speed of the model's finished jobs, and `speed` while there are none. `devices` are those of one
    job: accelerators, or processors where it has none.
    """

    uri: str
    created_at: int = 0
    defaults: Defaults = field(default_factory=Defaults)
    speed: Speed | None = None
    devices: int = 1
    preset: str | None = None
    trainable: bool = True


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """The operator's choices. Sizes in bytes.

    Checkpoints have not passed the release gate, so that chatting with one must be allowed explicitly.
    `gate` names the release gate's limits; a user may ask for lower ones, never for higher ones.
    Without a key in the database loopback is let in, unless `require_keys`.
    """

    base_models: Mapping[str, BaseModel]
    alignment_datasets: frozenset[str] = frozenset()
    gate: Mapping[str, float] = field(default_factory=dict)
    max_reject_ratio: float = 0.5
    max_file_bytes: int = MAX_FILE_BYTES
    max_project_bytes: int = MAX_PROJECT_BYTES
    max_upload_bytes: int = 8 << 30
    serve_checkpoints: bool = False
    private_webhooks: bool = False
    require_keys: bool = False
    max_completion_tokens: int = 4096


@dataclass(frozen=True, slots=True)
class Services:
    """The stores behind one gateway."""

    database: Database
    settings: ServiceSettings
    jobs: JobStore
    files: FileStore
    uploads: UploadStore
    models: ModelStore
    tenants: Tenants
    audit: AuditLog
    rate_limits: RateLimits
    webhooks: Webhooks
    counter: Counter

    @classmethod
    def open(
        cls,
        database: Database,
        files_uri: str,
        settings: ServiceSettings,
        counter: Counter = count_bytes,
        recorder: Recorder | None = None,
    ) -> Services:
        """All stores over one database and one content URI."""
        files = FileStore(database, ContentStore(files_uri), settings.max_file_bytes, settings.max_project_bytes)
        return cls(
            database=database,
            settings=settings,
            jobs=JobStore(database, recorder),
            files=files,
            uploads=UploadStore(files, settings.max_upload_bytes),
            models=ModelStore(database),
            tenants=Tenants(database),
            audit=AuditLog(database),
            rate_limits=RateLimits(database),
            webhooks=Webhooks(database, settings.private_webhooks),
            counter=counter,
        )
