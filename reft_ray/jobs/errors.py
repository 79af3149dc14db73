"""Errors of the records; the HTTP API maps each class to a status code."""

from __future__ import annotations

from typing import Literal

from reft_ray.core.errors import ReftError


class NotFoundError(ReftError):
    """No such object in this project; whether another project has it is not revealed."""

    def __init__(self, kind: str, object_id: str) -> None:
        super().__init__(f"No such {kind}: {object_id}")
        self.kind = kind
        self.object_id = object_id


class ConflictError(ReftError):
    """The object's state does not allow this."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class InvalidError(ReftError):
    """An invalid value; `param` names it."""

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class TooLargeError(ReftError):
    """More bytes than the operator allows."""


class QuotaError(ReftError):
    """The project's quota is exhausted; `limit` is its label in the metrics."""

    def __init__(self, message: str, limit: Literal["bytes", "jobs"]) -> None:
        super().__init__(message)
        self.limit = limit


class LeaseLostError(ReftError):
    """Another driver owns the job now; this one must stop without writing."""
