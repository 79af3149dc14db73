"""The stored verdicts of judged units, without text: `.screen/judged/<unit>.arrow`.

Units of a few rows are common, and an Arrow file of them is read in a tenth of a Parquet file's time. The footer of one
says all that the dataset's threshold needs, so that nothing else of it is read for that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import pyarrow as pa

from reft_ray.core.cascade import GuardedVerdict
from reft_ray.core.errors import ReftError
from reft_ray.core.verdict import Decision
from reft_ray.screening.outputs import Output
from reft_ray.screening.screener import ScreenedUnit
from reft_ray.screening.signals import sampled

JUDGED = ".screen/judged"
SCORE_BINS = 64
_SUFFIX = ".arrow"
_SCORES, _SIGNALS = b"scores", b"signals"
_UNREADABLE = (KeyError, TypeError, pa.ArrowInvalid, orjson.JSONDecodeError)
"""What the reading of a damaged file raises."""
# Passing columns of a few rows to threads takes longer than packing them.
_WRITING = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
_READING = pa.ipc.IpcReadOptions(use_threads=False)
_VERDICT = pa.schema(
    [
        pa.field("decision", pa.string(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
        pa.field("probability", pa.float64(), nullable=False),
        pa.field("threshold", pa.float64(), nullable=False),
        pa.field("part", pa.string(), nullable=False),
        pa.field("encoding", pa.string()),
        pa.field("windows", pa.int32(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
        pa.field("teacher", pa.string(), nullable=False),
        pa.field("decided_by", pa.string(), nullable=False),
        pa.field("guard_score", pa.float64()),
        pa.field("offset", pa.float64(), nullable=False),
        pa.field("span", pa.list_(pa.int64())),
        pa.field("categories", pa.list_(pa.string()), nullable=False),
        pa.field("hazards", pa.list_(pa.string()), nullable=False),
        pa.field("policy", pa.string(), nullable=False),
        pa.field("asked", pa.float64()),
    ]
)
_ROWS = pa.schema([pa.field("row_number", pa.int64(), nullable=False), *_VERDICT])


@dataclass(frozen=True, slots=True)
class JudgedUnit:
    """The verdicts of one unit's valid rows, the models that made them, and the signals for the findings."""

    unit: str
    judges: Mapping[str, Any]
    signals: Mapping[str, Any]
    numbers: Sequence[int]
    verdicts: Sequence[GuardedVerdict]

    @classmethod
    def of(cls, result: ScreenedUnit, judges: Mapping[str, Any], signals: Mapping[str, Any]) -> JudgedUnit:
        """The verdicts of a screened unit."""
        rows = [(row.number, row.verdict) for row in result.rows if row.verdict is not None]
        numbers, verdicts = [number for number, _ in rows], [verdict for _, verdict in rows]
        return cls(result.unit.id, judges, signals, numbers, verdicts)


@dataclass(frozen=True, slots=True)
class UnitScores:
    """The models that judged a unit, and the teacher's scores of its prompts.

    `histogram` counts them in equal bins over [-1, 1], that of an answer less its offset; `sample` are those of a share
    of the rows.
    """

    judges: Mapping[str, Any]
    histogram: Sequence[int]
    sample: Sequence[float]

    @classmethod
    def of(cls, judged: JudgedUnit, share: float) -> UnitScores:
        """The scores of a judged unit; `share` is that of the sample, which the row numbers choose."""
        histogram, sample = [0] * SCORE_BINS, []
        for number, verdict in zip(judged.numbers, judged.verdicts, strict=True):
            if (score := verdict.prompt_score) is not None:
                histogram[min(SCORE_BINS - 1, max(0, int((score + 1) / 2 * SCORE_BINS)))] += 1
                if sampled(number, share):
                    sample.append(score)
        return cls(judged.judges, histogram, sample)


def write_judged(output: Output, judged: JudgedUnit, share: float) -> None:
    """Store the verdicts of a unit, with the scores of a share of its rows."""
    columns = [[getattr(verdict, name) for verdict in judged.verdicts] for name in _VERDICT.names]
    schema = _ROWS.with_metadata({_SCORES: _json(UnitScores.of(judged, share))})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, options=_WRITING) as file:
        batch = pa.record_batch([judged.numbers, *columns], schema=schema)
        file.write_batch(batch, custom_metadata={_SIGNALS: _json(judged.signals)})
    output.write(_name_of(judged.unit), sink.getvalue().to_pybytes())


def read_judged(output: Output, unit: str) -> JudgedUnit:
    """The stored verdicts of a unit. Raises ReftError where there are none."""
    with _damaged(output, unit):
        file = pa.ipc.open_file(output.read(_name_of(unit)), options=_READING)
        batch, metadata = file.get_batch_with_custom_metadata(0)
        columns = [map(_TYPES.get(field.name, _same), batch[field.name].to_pylist()) for field in _VERDICT]
        signals = orjson.loads(metadata[_SIGNALS])
    verdicts = [
        GuardedVerdict(**dict(zip(_VERDICT.names, values, strict=True))) for values in zip(*columns, strict=True)
    ]
    return JudgedUnit(unit, _scores(file).judges, signals, batch["row_number"].to_pylist(), verdicts)


def judged_units(output: Output) -> Iterator[str]:
    """Ids of the units whose verdicts are stored completely."""
    names = [name for name in output.sizes(JUDGED) if name.endswith(_SUFFIX)]
    for name, whole in zip(names, output.each(names, _is_whole), strict=True):
        if whole:
            yield name.rpartition("/")[2].removesuffix(_SUFFIX)


def stored_scores(output: Output, units: Sequence[str]) -> Iterator[UnitScores]:
    """The scores of units, in order, from the footers of their files. Raises ReftError where there are none."""
    found = output.each([_name_of(unit) for unit in units], _read_scores)
    for unit in units:
        with _damaged(output, unit):
            scores = next(found)
        yield scores


def _read_scores(stored: pa.NativeFile) -> UnitScores:
    return _scores(pa.ipc.open_file(stored))


def _scores(file: pa.ipc.RecordBatchFileReader) -> UnitScores:
    return UnitScores(**orjson.loads(file.schema.metadata[_SCORES]))


def _is_whole(stored: pa.NativeFile) -> bool:
    try:
        _read_scores(stored)
    except _UNREADABLE:
        return False
    return True


@contextlib.contextmanager
def _damaged(output: Output, unit: str) -> Iterator[None]:
    """Name the file of a unit that cannot be read."""
    try:
        yield
    except (OSError, *_UNREADABLE) as error:
        raise ReftError(
            f"{output.name}: the verdicts of unit {unit} are missing or damaged; delete {_name_of(unit)} and run again"
        ) from error


def _json(value: Any) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def _same(value: Any) -> Any:
    return value


def _tuple(value: list[Any] | None) -> tuple[Any, ...] | None:
    return None if value is None else tuple(value)


# Arrow has neither.
_TYPES: dict[str, Callable[[Any], Any]] = {
    "decision": Decision,
    **dict.fromkeys(("span", "categories", "hazards"), _tuple),
}


def _name_of(unit: str) -> str:
    return f"{JUDGED}/{unit}{_SUFFIX}"
