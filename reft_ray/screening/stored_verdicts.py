"""The stored verdicts of judged units, without text: `.screen/judged/<unit>.parquet`, and a JSON file written last."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
import pyarrow as pa

from reft_ray.core.cascade import GuardedVerdict
from reft_ray.core.errors import ReftError
from reft_ray.core.verdict import Decision
from reft_ray.screening.outputs import Output, parquet_bytes
from reft_ray.screening.screener import ScreenedUnit

JUDGED = ".screen/judged"
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


def write_judged(output: Output, judged: JudgedUnit) -> None:
    """Store the verdicts of a unit."""
    columns = [[getattr(verdict, name) for verdict in judged.verdicts] for name in _VERDICT.names]
    content = parquet_bytes(pa.table([judged.numbers, *columns], schema=_ROWS))
    state = {"unit": judged.unit, "judges": judged.judges, "signals": judged.signals, "size": len(content)}
    output.write(_rows_of(judged.unit), content)
    output.write(_state_of(judged.unit), orjson.dumps(state, option=orjson.OPT_SORT_KEYS))


def read_judged(output: Output, unit: str) -> JudgedUnit:
    """The stored verdicts of a unit. Raises ReftError where there are none."""
    try:
        state = orjson.loads(output.read(_state_of(unit)))
        table = output.table(_rows_of(unit)).select(_ROWS.names)
    except (OSError, KeyError, pa.ArrowInvalid, orjson.JSONDecodeError) as error:
        raise ReftError(
            f"{output.name}: the verdicts of unit {unit} are missing or damaged; delete {_state_of(unit)} and run again"
        ) from error
    columns = (map(_TYPES.get(field.name, _same), table[field.name].to_pylist()) for field in _VERDICT)
    verdicts = [
        GuardedVerdict(**dict(zip(_VERDICT.names, values, strict=True))) for values in zip(*columns, strict=True)
    ]
    return JudgedUnit(unit, state["judges"], state["signals"], table.column("row_number").to_pylist(), verdicts)


def _same(value: Any) -> Any:
    return value


def _tuple(value: list[Any] | None) -> tuple[Any, ...] | None:
    return None if value is None else tuple(value)


# Parquet has neither.
_TYPES: dict[str, Callable[[Any], Any]] = {
    "decision": Decision,
    **dict.fromkeys(("span", "categories", "hazards"), _tuple),
}


def judged_units(output: Output) -> Iterator[str]:
    """Ids of the units whose verdicts are stored completely."""
    sizes = output.sizes(JUDGED)
    for content in output.read_all([name for name in sizes if name.endswith(".json")]):
        state = orjson.loads(content)
        if sizes.get(_rows_of(state["unit"])) == state["size"]:
            yield state["unit"]


def _rows_of(unit: str) -> str:
    return f"{JUDGED}/{unit}.parquet"


def _state_of(unit: str) -> str:
    return f"{JUDGED}/{unit}.json"
