"""What a request's body may cost, declared per route: bytes, JSON values, and who reads it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from reft_ray.api.settings import MIB, FilterSettings, ServiceSettings
from reft_ray.jobs.uploads import PART_BYTES

FORM_BYTES = MIB
"""Allowance for what a multipart form adds to its file."""

Kind = Literal["json", "form", "stream"]
_TRAINING = "/v1/training/api/v1"


@dataclass(frozen=True, slots=True)
class Limit:
    """The limit of a route.

    - `json`: read and checked before the route runs; `values` bounds its strings, numbers and brackets.
    - `form`: passed on as it arrives.
    - `stream`: the route itself counts it, and answers while it arrives.

    A `threaded` route works in a thread, of which each project has a share.
    """

    bytes: int = MIB // 4
    values: int = 20_000
    kind: Kind = "json"
    threaded: bool = True


DEFAULT = Limit()
Limits = Mapping[str, Limit]
"""By method and path, e.g. `POST /v1/uploads/{id}/parts`; every other route has the DEFAULT."""


def filter_limits(settings: FilterSettings) -> Limits:
    """The limits of the online filter's routes."""
    return {
        **dict.fromkeys(("GET /healthz", "GET /readyz", "GET /metrics"), Limit(threaded=False)),
        "POST /v1/moderations": Limit(settings.max_body_bytes, threaded=False),
        "POST /v1/screenings": Limit(settings.max_upload_bytes, kind="stream"),
        "PUT /v1/screenings/{id}/chunks/{sequence}": Limit(settings.max_chunk_bytes, kind="stream"),
    }


def service_limits(settings: ServiceSettings, body_bytes: int) -> Limits:
    """The limits of the finetuning service's routes; `body_bytes` is the filter's for a conversation."""
    return {
        "POST /v1/chat/completions": conversation_limit(body_bytes),
        "POST /v1/completions": conversation_limit(body_bytes),
        "POST /v1/files": Limit(settings.max_file_bytes + FORM_BYTES, kind="form"),
        "POST /v1/uploads/{id}/parts": Limit(PART_BYTES + FORM_BYTES, kind="form"),
        "POST /v1/uploads/{id}/complete": Limit(MIB, 25_000),
        "POST /console(/[^/]+)*": Limit(kind="form"),
        f"POST {_TRAINING}/forward_backward": Limit(8 * MIB, kind="form", threaded=False),
        f"POST {_TRAINING}/telemetry": Limit(8 * MIB, kind="form", threaded=False),
        f"POST {_TRAINING}/retrieve_future": Limit(threaded=False),
        f"POST {_TRAINING}/asample": Limit(4 * MIB, 200_000),
    }


def conversation_limit(body_bytes: int) -> Limit:
    """The limit of a conversation of up to `body_bytes`."""
    # A turn has ten: braces, commas, and two names with their values.
    return Limit(body_bytes, 150_000, threaded=False)


class LimitTable:
    """Finds the limit of a request."""

    def __init__(self, limits: Iterable[tuple[str, Limit]]) -> None:
        self._limits = [(re.compile(re.sub(r"\{\w+\}", "[^/]+", route)), limit) for route, limit in limits]

    def of(self, method: str, path: str) -> Limit:
        """The limit of a route; the DEFAULT for one that is not declared."""
        request = f"{method} {path}"
        return next((limit for pattern, limit in self._limits if pattern.fullmatch(request)), DEFAULT)
