"""Errors shown to the user: one line that names the thing, the value and the remedy."""

from __future__ import annotations


class ReftError(Exception):
    """An error that the user can fix; the command line prints its message without a traceback."""

    exit_code = 1


class UsageError(ReftError):
    """Wrong arguments or configuration."""

    exit_code = 2


class PromptTooLongError(ReftError):
    """A prompt after which no answer fits into the model's context."""


class BlockedByPolicyError(ReftError):
    """The work ran, and the operator's policy refuses its outcome."""

    exit_code = 3


class GateFailedError(ReftError):
    """A finetuned model did not pass the safety gate."""

    exit_code = 4


class StoppedError(ReftError):
    """The work was asked to stop and saved its state, e.g. because a job was cancelled or paused; not a failure."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message: libraries often write many."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
