"""The teacher of a running service, over HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import httpx

from reft_ray.api.client import ScreeningClient
from reft_ray.core.conversation import Conversation
from reft_ray.core.errors import ReftError
from reft_ray.core.verdict import Decision, ScoreError, Thresholds, Verdict
from reft_ray.rows.text import messages_json

PARALLEL_CHUNKS = 2


class RemoteTeacher:
    """A `guards.Teacher` over the screening resource of a service at `url`; lost responses are requested again.

    All verdicts of one object are by the same teacher. Raises ReftError when the service changes its teacher, refuses
    a request or cannot be reached.
    """

    def __init__(self, url: str, key: str | None = None, transport: httpx.BaseTransport | None = None) -> None:
        self._connect = partial(ScreeningClient, url, key, parallel=PARALLEL_CHUNKS, transport=transport)
        with self._connect() as client:
            about = client.teacher()
        self.teacher_id = str(about["id"])
        self.thresholds = Thresholds(**about["thresholds"])

    def judge(self, conversations: Sequence[Conversation], thresholds: Thresholds | None) -> list[Verdict]:
        """One verdict per conversation, in order; `thresholds` default to those of the service."""
        review, block = (thresholds.review, thresholds.block) if thresholds else (None, None)
        lines = (f'{{"messages":{messages_json(turns)}}}'.encode() for turns in conversations)
        with self._connect() as client:
            return [self._verdict(record, thresholds) for record in client.screen(lines, review=review, block=block)]

    def _verdict(self, record: dict[str, Any], thresholds: Thresholds | None) -> Verdict:
        if record["decision"] == "invalid":
            # Valid here and invalid there (empty, or too large to send): it was not judged.
            block = (thresholds or self.thresholds).block
            return Verdict(Decision.BLOCK, 1.0, 1.0, block, part="", windows=0, truncated=True)
        if record["teacher"] != self.teacher_id:
            raise ReftError(
                f"the service changed its teacher from {self.teacher_id} to {record['teacher']}; "
                "screen the dataset again into another output directory"
            )
        score, probability = record["score"], record["probability"]
        if score is None or probability is None:
            raise ScoreError(f"the service's teacher {self.teacher_id} gave a score that is not a number: replace it")
        return Verdict(
            Decision(record["decision"]),
            score,
            probability,
            record["threshold"],
            record["part"],
            record["encoding"],
            record["windows"],
            record["truncated"],
            tuple(record["span"]) if record.get("span") else None,
            tuple(record.get("categories", ())),
            tuple(record.get("hazards", ())),
        )
