"""The rows of a job, decided through a running service, for `reft-ray review`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import TYPE_CHECKING, Any

from reft_ray.cli.common import print_json, user_errors
from reft_ray.core.errors import UsageError

if TYPE_CHECKING:
    from reft_ray.api.review_client import ReviewClient

JOB_PREFIX = "ftjob-"
_STATES = {"pending": "pending", "decided": "all", "all": "all"}
_DECIDED = ("approved", "rejected")


def is_job(target: str) -> bool:
    """Whether a command's target is a job of a service, not a directory."""
    return target.startswith(JOB_PREFIX)


@contextmanager
def review_client(url: str, key: str) -> Iterator[ReviewClient]:
    """A client, for a command's body; includes `user_errors`."""
    with user_errors():
        from reft_ray.api.review_client import ReviewClient

        with ReviewClient(url, key) as client:
            yield client


def list_job(client: ReviewClient, job: str, show: str, limit: int, as_json: bool) -> None:
    """Print a job's rows, without their text."""
    found = client.reviews(job=job, kind="withheld", state=_STATES[show], order="age")
    rows = list(islice((row for row in found if show != "decided" or row["state"] in _DECIDED), limit))
    states = client.summary(job=job, kind="withheld")["states"]
    if as_json:
        print_json({"states": states, "rows": rows})
        return
    for row in rows:
        score = "none" if row["score"] is None else f"{row['score']:.3f}"
        who = f" by {row['reviewer']}: {row['code']}" if row.get("reviewer") else ""
        evidence = f"{row['decision']:<6}  {score:>6}  {row['part']:<24}  {row['reason']}"
        print(f"{row['row']:>7}  {evidence}  {row['state']}{who}")
    print("; ".join(f"{count} {state}" for state, count in states.items() if count) or "nothing was withheld")


def text_of(client: ReviewClient, job: str, row: int) -> dict[str, Any]:
    """A row with its `text`."""
    found = _row(client, job, row)
    return {**found, "text": client.review(found["id"], text=True)}


def decide(
    client: ReviewClient, job: str, rows: Sequence[int], action: str, code: str, comment: str, duplicates: bool
) -> list[dict[str, Any]]:
    """Decide about rows by their numbers."""
    return client.decide([_row(client, job, row)["id"] for row in rows], action, code, comment, duplicates)


def _row(client: ReviewClient, job: str, row: int) -> dict[str, Any]:
    found = list(client.reviews(job=job, row=row, state="all"))
    if not found:
        raise UsageError(f"row {row} of {job} is not withheld")
    return found[0]
