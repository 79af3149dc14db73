"""Periodic background work: deliver webhooks, remove expired files, verify the audit log."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx

from reft_ray.jobs.audit import AuditLog
from reft_ray.jobs.audit_heads import AuditHeads
from reft_ray.jobs.files import FileStore, job_key, scratch_key
from reft_ray.jobs.job import Status
from reft_ray.jobs.job_store import JobStore
from reft_ray.jobs.models import ModelStore
from reft_ray.jobs.uploads import UploadStore
from reft_ray.jobs.webhooks import Webhooks
from reft_ray.telemetry import catalog

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 300.0
PARTIAL_SECONDS = 3600.0
"""Age since its last write at which the copy of a killed writer is removed."""

POST_SECONDS = 10.0
"""Time limit of a whole delivery after the DNS lookup: a tenant's endpoint may be arbitrarily slow."""


def post(url: str, body: bytes, headers: Mapping[str, str], address: str | None = None) -> int:
    """Send a webhook, to `address` where it is given, without following redirects. Raises OSError."""
    try:
        return asyncio.run(_post(url, body, headers, address))
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError) as error:
        raise ConnectionError(type(error).__name__) from None


async def _post(url: str, body: bytes, headers: Mapping[str, str], address: str | None) -> int:
    target, extensions = httpx.URL(url), {}
    if address is not None:
        # The certificate is still checked for the name.
        headers = {**headers, "host": target.netloc.decode()}
        extensions = {"sni_hostname": target.host}
        target = target.copy_with(host=address)
    # httpx's own timeout restarts with every read. Only the status is needed: the body stays unread.
    async with (
        asyncio.timeout(POST_SECONDS),
        httpx.AsyncClient(timeout=POST_SECONDS, follow_redirects=False, trust_env=False) as client,
        client.stream("POST", target, content=body, headers=dict(headers), extensions=extensions) as response,
    ):
        return response.status_code


@dataclass(slots=True)
class Housekeeping:
    """A `tick` sweeps at most once in SWEEP_SECONDS."""

    store: JobStore
    uploads: UploadStore
    models: ModelStore
    webhooks: Webhooks
    audit: AuditLog
    heads: AuditHeads | None = None
    _swept: float = field(default=0.0)

    @property
    def files(self) -> FileStore:
        """The files of the uploads' store."""
        return self.uploads.files

    def tick(self) -> None:
        """Sweep if it is due."""
        if self.store.database.now() >= self._swept + SWEEP_SECONDS:
            self.sweep()
            self._swept = self.store.database.now()

    def deliver(self) -> None:
        """Send the webhooks that are due."""
        self.webhooks.deliver(post)

    def sweep(self) -> None:
        """Remove expired and deleted data; verify the audit log."""
        self.uploads.sweep()
        self.files.sweep()
        self.files.content.sweep(time.time() - PARTIAL_SECONDS)
        for job in self.store.to_clean():
            # A withheld or unfinished student is removed like the rows.
            key = scratch_key if job.status is Status.SUCCEEDED else job_key
            self.files.content.delete_tree(key(job.project_id, job.id))
            self.store.cleaned(job.id)
        for student in self.models.deleted():
            self.files.content.delete_tree(job_key(student.project_id, student.job_id))
            self.models.forget(student.id)
        verification = self.audit.verify() if self.heads is None else self.heads.verify(self.audit)
        self.store.recorder.set(catalog.AUDIT_BREAKS, 0 if verification.fault is None else 1)
        if verification.fault is not None:
            logger.error("the audit log is broken: %s", verification.fault)
        elif self.heads is not None:
            self.heads.publish(verification, self.store.database.now())

    @contextmanager
    def background(self, seconds: float = 5.0) -> Iterator[None]:
        """Tick in a thread while the block runs, and deliver in another one, so that slow endpoints delay nothing."""
        with (
            periodic(self.tick, "housekeeping", seconds, logger),
            periodic(self.deliver, "delivering webhooks", seconds, logger),
        ):
            yield


@contextmanager
def periodic(tick: Callable[[], None], name: str, seconds: float, logger: logging.Logger) -> Iterator[None]:
    """Call `tick` every `seconds` in a thread while the block runs. A failure is logged, the next call retries."""
    ended = threading.Event()

    def loop() -> None:
        while not ended.is_set():
            try:
                tick()
            except Exception:
                logger.exception("%s failed; trying again in %.0f s", name, seconds)
            ended.wait(seconds)

    thread = threading.Thread(target=loop, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
