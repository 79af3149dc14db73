"""What runs beside the routes of a gateway: the reconciler and the housekeeping."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from fastapi import FastAPI

from reft_ray.api.stores import Services
from reft_ray.jobs.housekeeping import Housekeeping
from reft_ray.jobs.launcher import Launcher
from reft_ray.jobs.lease import Leases, Slots
from reft_ray.jobs.reconciler import Reconciler, RetryPolicy


def working(
    services: Services,
    launcher: Launcher,
    slots: Slots | None = None,
    patience: RetryPolicy | None = None,
    seconds: float = 1.0,
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """A lifespan for `create_service`. Every gateway may have one: what they do is compare-and-set."""
    reconciler = Reconciler(services.jobs, Leases(services.jobs), launcher, slots or Slots(), patience or RetryPolicy())
    housekeeping = Housekeeping(services.jobs, services.uploads, services.models, services.webhooks, services.audit)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with reconciler.background(seconds), housekeeping.background(5 * seconds):
            yield

    return lifespan
