"""A Ref-Teacher as a callable for `ray.data.Dataset.map_batches`, in the actor or against a running service."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa

from reft_ray.core.cache import CachedScorer
from reft_ray.core.conversation import Conversation, chat
from reft_ray.core.errors import UsageError
from reft_ray.core.scoring import Scorer
from reft_ray.core.verdict import Thresholds, Verdict
from reft_ray.rows.text import full_conversation
from reft_ray.screening.guards import GuardEnsemble, Teacher

VERDICT = pa.schema(
    [
        pa.field("decision", pa.string(), nullable=False),
        pa.field("score", pa.float64()),
        pa.field("probability", pa.float64()),
        pa.field("part", pa.string()),
        pa.field("encoding", pa.string()),
        pa.field("teacher", pa.string(), nullable=False),
    ]
)
"""The columns that are added: `decision` is allow, review, block, or invalid for a row without text to judge."""

_CACHED_TEXTS = 100_000


class Moderate:
    """Adds a verdict to every row of a batch.

        rows.map_batches(Moderate, fn_constructor_kwargs={"teacher": "teacher/"}, batch_format="pyarrow",
                         compute=ActorPoolStrategy(min_size=1, max_size=8), num_gpus=0.25)

    Name one judge: `teacher`, a Ref-Teacher's directory (`base` its base model, if it has moved); `url` of a running
    service (with `key`); `application`, a Serve application on this cluster; or `factory`, which makes a scorer. Each
    actor loads it once. `column` holds texts, lists of messages, or messages in JSON (as of `read_rows`). Give
    `num_gpus` to `map_batches` as a fraction where several actors share a GPU.

    Raises UsageError for no judge or several.
    """

    def __init__(
        self,
        teacher: str | Path | None = None,
        base: str | None = None,
        *,
        url: str | None = None,
        key: str = "none",
        application: str | None = None,
        factory: Callable[[], Scorer | Teacher] | None = None,
        column: str = "judged",
        thresholds: Thresholds | None = None,
        batch_rows: int = 256,
    ) -> None:
        named = {"teacher": teacher, "url": url, "application": application, "factory": factory}
        if sum(value is not None for value in named.values()) != 1:
            raise UsageError(f"name one of {', '.join(named)}")
        self._column, self._batch_rows = column, batch_rows
        judge_of = factory or _judge_factory(teacher, base, url, key, application)
        found = judge_of()
        cached = CachedScorer(found, _CACHED_TEXTS) if isinstance(found, Scorer) else found
        self._judge = GuardEnsemble(cached, thresholds=thresholds)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """The batch with the columns of VERDICT; rows keep their order."""
        texts = [self._conversation(value) for value in batch.column(self._column).to_pylist()]
        known = [(index, turns) for index, turns in enumerate(texts) if turns]
        verdicts: dict[int, Verdict] = {}
        for start in range(0, len(known), self._batch_rows):
            part = known[start : start + self._batch_rows]
            found = self._judge.judge([turns for _, turns in part])
            verdicts.update(zip((index for index, _ in part), found, strict=True))
        teacher = self._judge.rules.teacher
        rows = [_columns(verdicts.get(index), teacher) for index in range(len(texts))]
        added = pa.Table.from_pylist(rows, schema=VERDICT)
        for field in VERDICT:
            batch = batch.append_column(field, added[field.name])
        return batch

    @staticmethod
    def _conversation(value: Any) -> Conversation:
        """The turns to judge in a cell; none in a null."""
        if value is None:
            return ()
        if isinstance(value, str):
            if not value.startswith("[{"):
                return chat(value) if value.strip() else ()
            value = orjson.loads(value)
        return full_conversation([{key: item for key, item in turn.items() if item is not None} for turn in value])


def _columns(verdict: Verdict | None, teacher: str) -> dict[str, Any]:
    if verdict is None:
        return {"decision": "invalid", "teacher": teacher}
    return {
        "decision": str(verdict.decision),
        "score": None if math.isnan(verdict.score) else verdict.score,
        "probability": verdict.probability,
        "part": verdict.part,
        "encoding": verdict.encoding,
        "teacher": teacher,
    }


def _judge_factory(
    teacher: str | Path | None, base: str | None, url: str | None, key: str, application: str | None
) -> Callable[[], Scorer | Teacher]:
    def make() -> Scorer | Teacher:
        if teacher is not None:
            from reft_ray.hf.ref_teacher import load_scorer

            return load_scorer(teacher, base)
        if url is not None:
            from reft_ray.screening.remote import RemoteTeacher

            return RemoteTeacher(url, key)
        from reft_ray.data.serve_teacher import ServeTeacher

        return ServeTeacher(str(application))

    return make
