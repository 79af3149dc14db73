"""Human review of withheld rows: an append-only log of decisions with reviewer, time and reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

import orjson
import pyarrow as pa

from reft_ray.core.conversation import Conversation
from reft_ray.core.errors import UsageError
from reft_ray.rows.text import conversation_from
from reft_ray.screening.manifest import Manifest, load_manifest
from reft_ray.screening.outputs import Output, approved_name, encode_raws, encode_table
from reft_ray.screening.report import REPORT, load_report
from reft_ray.telemetry import catalog
from reft_ray.telemetry.recorder import NullRecorder, Recorder

LOG = "reviews.jsonl"
APPROVED = "approved.jsonl"
_LISTED = (
    "row_number", "source", "line", "id", "decision", "reason", "part", "encoding", "score", "probability",
    "threshold", "teacher", "decided_by", "guard_score",
)  # fmt: skip


class Action(StrEnum):
    """A reviewer's decision about a withheld row."""

    APPROVE = "approve"
    REJECT = "reject"


@dataclass(frozen=True, slots=True)
class Review:
    """One decision; the last one about a row counts. `id` is the content id of the row."""

    time: str
    row_number: int
    id: str
    action: Action
    reviewer: str
    reason: str


@dataclass(frozen=True, slots=True)
class Summary:
    """Counts of a review. `overturn_rate` is the approved share of the decided rows, an estimate of the teacher's
    false-positive share among withheld rows; None before the first decision."""

    withheld: int
    pending: int
    approved: int
    rejected: int
    overturn_rate: float | None


class Reviews:
    """The review of one screening's quarantine."""

    def __init__(self, out: str, recorder: Recorder | None = None) -> None:
        self._recorder = recorder or NullRecorder()
        self._output = Output(out)

    def latest(self) -> dict[int, Review]:
        """The decision that counts for each decided row."""
        try:
            log = self._output.read(LOG)
        except FileNotFoundError:
            return {}
        entries = (orjson.loads(line) for line in log.splitlines() if line.strip())
        return {entry["row_number"]: Review(**entry | {"action": Action(entry["action"])}) for entry in entries}

    def counts(self) -> tuple[int, int]:
        """Numbers of approved and of rejected rows."""
        latest = self.latest()
        approved = sum(review.action is Action.APPROVE for review in latest.values())
        return approved, len(latest) - approved

    def summary(self) -> Summary:
        """Counts over the whole quarantine."""
        withheld = load_report(self._output.uri).counts.withheld
        approved, rejected = self.counts()
        rate = approved / (approved + rejected) if approved + rejected else None
        return Summary(withheld, withheld - approved - rejected, approved, rejected, rate)

    def items(self, decided: bool | None = None) -> Iterator[dict[str, Any]]:
        """Withheld rows in order, without text, each with its `review` (None while pending)."""
        latest = self.latest()
        for unit in load_manifest(self._output).units:
            for row in self._unit(unit, _LISTED):
                review = latest.get(row["row_number"])
                if decided is None or decided == (review is not None):
                    yield row | {"review": asdict(review) if review else None}

    def item(self, row_number: int) -> dict[str, Any]:
        """One withheld row with its judged `messages`. Raises UsageError when the row is not withheld."""
        (row,) = self._rows([row_number])
        row.pop("raw")
        review = self.latest().get(row_number)
        row |= {"messages": orjson.loads(row["messages"]), "conversation": orjson.loads(row["conversation"])}
        return row | {"review": asdict(review) if review else None}

    def decide(self, row_numbers: Sequence[int], action: Action, reviewer: str, reason: str) -> list[Review]:
        """Record a decision about rows and update the kept rows.

        Raises UsageError for a row that is not withheld, a missing reviewer or a missing reason.
        """
        if not reviewer.strip() or not reason.strip():
            raise UsageError("a decision needs a reviewer and a reason")
        rows = self._rows(sorted(set(row_numbers)))
        time = datetime.now(UTC).isoformat(timespec="seconds")
        made = [Review(time, row["row_number"], row["id"], action, reviewer.strip(), reason.strip()) for row in rows]
        with self._output.appending(LOG, _log(made)):
            self._write_approved_units(made)
        self.count(made)
        return made

    def record(self, reviews: Iterable[Review]) -> None:
        """Replace the log by decisions that were made elsewhere, in the queue of a service, and write the approved
        rows."""
        made = list(reviews)
        self._output.write(LOG, _log(made))
        self._write_approved_units(made)

    def count(self, reviews: Iterable[Review]) -> None:
        """Record metrics of decisions: their number, and the time since the screening ended."""
        screened = self._output.written_at(REPORT)
        for review in reviews:
            outcome = "approved" if review.action is Action.APPROVE else "rejected"
            self._recorder.count(catalog.REVIEW_DECISIONS, outcome=outcome)
            if screened is not None:
                age = datetime.fromisoformat(review.time).timestamp() - screened
                self._recorder.observe(catalog.REVIEW_AGE, max(0.0, age))

    def approved(self) -> Iterator[tuple[dict[str, Any], Review]]:
        """Approved rows, in order, with the decision that approved them."""
        latest = self.latest()
        numbers = sorted(number for number, review in latest.items() if review.action is Action.APPROVE)
        if numbers:
            for row in self._rows(numbers):
                yield row, latest[row["row_number"]]

    def export(self) -> Iterator[dict[str, Any]]:
        """Decided rows with their text and the reviewer's label: labelled prompts for the next teacher."""
        latest = self.latest()
        for row in self._rows(sorted(latest)) if latest else ():
            review = latest[row["row_number"]]
            yield {
                "row_number": row["row_number"],
                "id": row["id"],
                "label": "harmless" if review.action is Action.APPROVE else "harmful",
                "score": row["score"],
                "part": row["part"],
                "teacher": row["teacher"],
                "messages": orjson.loads(row["messages"]),
                "review": asdict(review),
            }

    def _write_approved_units(self, made: Iterable[Review]) -> None:
        """Write the approved rows of the units of these decisions next to the kept ones, and the origin of every
        approved row."""
        manifest = load_manifest(self._output)
        by_unit: dict[str, list[dict[str, Any]]] = {manifest.unit_of(review.row_number): [] for review in made}
        origin = []
        for row, review in self.approved():
            if (unit := manifest.unit_of(row["row_number"])) in by_unit:
                by_unit[unit].append(row)
            origin.append({name: row[name] for name in _LISTED} | {"review": asdict(review)})
        for unit, rows in by_unit.items():
            self._write_approved(manifest, unit, [row["raw"] for row in rows])
        self._output.write(APPROVED, b"".join(orjson.dumps(entry) + b"\n" for entry in origin))

    def _write_approved(self, manifest: Manifest, unit: str, raws: list[bytes]) -> None:
        shape = manifest.shape_of(unit)
        name = approved_name(shape, unit)
        if not raws:
            self._output.remove(name)
        elif shape.container.columnar:
            tables = [pa.ipc.open_stream(raw).read_all() for raw in raws]
            self._output.write(name, encode_table(pa.concat_tables(tables), shape))
        else:
            self._output.write(name, encode_raws(raws, shape))

    def _rows(self, numbers: Sequence[int]) -> list[dict[str, Any]]:
        manifest = load_manifest(self._output)
        wanted: dict[str, set[int]] = {}
        for number in numbers:
            wanted.setdefault(manifest.unit_of(number), set()).add(number)
        found = [row for unit, rows in wanted.items() for row in self._unit(unit) if row["row_number"] in rows]
        if missing := set(numbers) - {row["row_number"] for row in found}:
            raise UsageError(f"row {min(missing)} is not in the quarantine of {self._output.name}")
        return sorted(found, key=lambda row: row["row_number"])

    def _unit(self, unit: str, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        try:
            table = self._output.table(f"quarantine/part-{unit}.parquet", columns)
        except FileNotFoundError:
            return []
        return list(table.to_pylist())


def _log(made: Iterable[Review]) -> bytes:
    return b"".join(orjson.dumps(asdict(review)) + b"\n" for review in made)


def approved_conversations(out: str) -> list[tuple[int, Conversation]]:
    """Approved rows as training reads them, in row order."""
    return [
        (row["row_number"], conversation_from(orjson.loads(row["conversation"]))) for row, _ in Reviews(out).approved()
    ]
