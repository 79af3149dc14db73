"""The stores and settings that the routes of the finetuning service use, opened once per gateway."""

from __future__ import annotations

from dataclasses import dataclass

from reft_ray.api.settings import ServiceSettings
from reft_ray.jobs.appeals import Appeals
from reft_ray.jobs.audit import AuditLog
from reft_ray.jobs.audit_heads import AuditHeads
from reft_ray.jobs.content import ContentStore
from reft_ray.jobs.database import Database
from reft_ray.jobs.estimate import Counter, FirstSpeeds, count_bytes
from reft_ray.jobs.files import FileStore
from reft_ray.jobs.job_store import JobStore
from reft_ray.jobs.models import ModelStore
from reft_ray.jobs.rate_limits import RateLimits
from reft_ray.jobs.releases import Releases
from reft_ray.jobs.review_queue import ReviewQueue
from reft_ray.jobs.tenants import Tenants
from reft_ray.jobs.training import TrainingStore
from reft_ray.jobs.training_queue import TrainingQueue
from reft_ray.jobs.uploads import UploadStore
from reft_ray.jobs.webhooks import Webhooks
from reft_ray.telemetry.recorder import Recorder


@dataclass(frozen=True, slots=True)
class Stores:
    """The stores of one gateway."""

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
    reviews: ReviewQueue
    appeals: Appeals
    releases: Releases
    counter: Counter
    first_speeds: FirstSpeeds
    heads: AuditHeads | None = None
    training: TrainingQueue | None = None

    @property
    def require_keys(self) -> bool:
        """Whether every caller needs a key, also before any exists."""
        return self.settings.require_keys

    @classmethod
    def open(
        cls,
        database: Database,
        files_uri: str,
        settings: ServiceSettings,
        counter: Counter = count_bytes,
        recorder: Recorder | None = None,
    ) -> Stores:
        """Open all stores over one database and one content URI."""
        jobs = JobStore(database, recorder)
        reviews = ReviewQueue(jobs, settings.second_person)
        files = FileStore(database, ContentStore(files_uri), settings.max_file_bytes, settings.max_project_bytes)
        training = None
        if settings.training is not None:
            records = TrainingStore(database, settings.max_project_bytes, settings.training.max_models)
            training = TrainingQueue(records)
        return cls(
            database=database,
            settings=settings,
            jobs=jobs,
            files=files,
            uploads=UploadStore(files, settings.max_upload_bytes),
            models=ModelStore(database),
            tenants=Tenants(database),
            audit=AuditLog(database),
            rate_limits=RateLimits(database),
            webhooks=Webhooks(database, settings.private_webhooks),
            reviews=reviews,
            appeals=Appeals(reviews),
            releases=Releases(jobs),
            counter=counter,
            first_speeds=FirstSpeeds(files.content),
            training=training,
            heads=AuditHeads(settings.audit_heads_uri, settings.audit_key or "") if settings.audit_heads_uri else None,
        )
