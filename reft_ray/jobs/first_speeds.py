"""Speeds that were measured without a job, in the content store, where all gateways and drivers find them."""

from __future__ import annotations

import hashlib
import json

from pydantic import ValidationError

from reft_ray.jobs.content import ContentStore
from reft_ray.jobs.estimate import Speed


class FirstSpeeds:
    """One JSON file per base model, below `speeds/`; no project has that name."""

    def __init__(self, content: ContentStore) -> None:
        self._content = content

    def of(self, model: str) -> Speed | None:
        """The speed of a model; None where none is kept, or it cannot be read."""
        try:
            return Speed.model_validate(json.loads(b"".join(self._content.read(_key(model)))))
        except (OSError, ValueError, ValidationError):
            return None

    def put(self, model: str, speed: Speed) -> None:
        """Keep a speed, instead of an earlier one."""
        self._content.write(_key(model), [json.dumps(speed.model_dump()).encode()])


def _key(model: str) -> str:
    # A model's name may have any characters.
    return f"speeds/{hashlib.sha256(model.encode()).hexdigest()[:32]}.json"
