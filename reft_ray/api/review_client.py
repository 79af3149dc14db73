"""A Python client of reviews, appeals, releases and the audit log; it works on any machine with a key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from reft_ray.api.remote import Remote


class ReviewClient:
    """The calls of a service at `url` (with `/v1`), for a `with` block. They return the objects of the API as dicts.

    All raise ReftError with the service's message.
    """

    def __init__(self, url: str, key: str = "none") -> None:
        self._remote = Remote(url, key)

    def __enter__(self) -> ReviewClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._remote.__exit__()

    def reviews(self, limit: int = 100, **query: Any) -> Iterator[dict[str, Any]]:
        """Rows without their text: `job`, `file`, `reason`, `kind`, `state`, `row`, `order` (nearness or age)."""
        yield from self._remote.pages("/reviews", limit=limit, **query)

    def summary(self, **query: Any) -> Any:
        """Counts by state and reason, and what the decisions say about each teacher."""
        return self._remote.get("/reviews/summary", **query)

    def review(self, review_id: str, text: bool = False) -> Any:
        """One row, or with `text` its messages and parts."""
        return self._remote.get(f"/reviews/{review_id}{'/text' if text else ''}")

    def claim(self, review_id: str | None = None, **wanted: Any) -> Any:
        """Reserve this row, or the nearest free one, for ten minutes; None when none is free."""
        if review_id is not None:
            return self._remote.post(f"/reviews/{review_id}/claim")
        return self._remote.post("/reviews/claim", json=wanted)["review"]

    def decide(
        self, review_ids: Sequence[str], action: str, code: str, comment: str = "", duplicates: bool = False
    ) -> list[dict[str, Any]]:
        """Approve or reject rows: all, or none. Returns them as they are now."""
        body = {"ids": list(review_ids), "action": action, "code": code, "comment": comment, "duplicates": duplicates}
        found: list[dict[str, Any]] = self._remote.post("/reviews/decisions", json=body)["data"]
        return found

    def appeals(self, **query: Any) -> Iterator[dict[str, Any]]:
        """Appeals, newest first: `state`, `job`."""
        yield from self._remote.pages("/appeals", **query)

    def appeal(self, note: str, review: str | None = None, job: str | None = None) -> Any:
        """Appeal a withheld row, or the release gate of a job."""
        about = {"review": review} if review is not None else {"job": job}
        return self._remote.post("/appeals", json={**about, "note": note})

    def answer(self, appeal_id: str, granted: bool, answer: str) -> Any:
        """Answer an appeal."""
        return self._remote.post(f"/appeals/{appeal_id}/answer", json={"granted": granted, "answer": answer})

    def releases(self, state: str | None = None) -> Any:
        """Models that failed the gate and were put before people."""
        return self._remote.get("/releases", state=state)["data"]

    def sign(self, job_id: str, note: str) -> Any:
        """Sign the release of a job's model."""
        return self._remote.post(f"/releases/{job_id}/sign", json={"note": note})

    def refuse(self, job_id: str, note: str) -> Any:
        """Refuse the release of a job's model."""
        return self._remote.post(f"/releases/{job_id}/refuse", json={"note": note})

    def audit(self, after: int = 0, limit: int = 100, **query: Any) -> Any:
        """Entries of the audit log after a number, oldest first: `type`, `project`."""
        return self._remote.get("/audit", after=after, limit=limit, **query)["data"]

    def verify_audit(self, head: str | None = None) -> Any:
        """Recompute the chain on the service."""
        return self._remote.get("/audit/verify", head=head)
