"""What can go wrong in the records; the HTTP face maps each class to one status code."""

from __future__ import annotations

from typing import Literal

from reft_ray.core.errors import ReftError


class NotFoundError(ReftError):
    """No such object, or it belongs to somebody else: the two look the same from outside."""

    def __init__(self, kind: str, object_id: str) -> None:
        super().__init__(f"No such {kind}: {object_id}")
        self.kind = kind
        self.object_id = object_id


class ConflictError(ReftError):
    """The object is in a state that does not allow this."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


class InvalidError(ReftError):
    """A value that cannot be accepted; `param` names it."""

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class TooLargeError(ReftError):
    """More bytes than the operator allows."""


class QuotaError(ReftError):
    """The project has used what it was given; `limit` names it as metrics do."""

    def __init__(self, message: str, limit: Literal["bytes", "jobs"]) -> None:
        super().__init__(message)
        self.limit = limit


class LeaseLostError(ReftError):
    """Another driver owns the job now; whoever sees this must stop without writing."""
