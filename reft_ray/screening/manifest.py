"""The manifest of an output directory: its input, its units in row order and the shapes of its files."""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import orjson

from reft_ray.core.errors import ReftError, UsageError
from reft_ray.rows.format import Format
from reft_ray.screening.config import ScreenConfig
from reft_ray.screening.file_parsing import FileShape
from reft_ray.screening.outputs import Output
from reft_ray.screening.reading import FilePlan
from reft_ray.screening.sources import Container, Source

MANIFEST = ".screen/manifest.json"


@dataclass(frozen=True, slots=True)
class Manifest:
    """`fingerprint` identifies input and configuration; `spans` are the first and last row number of each unit."""

    fingerprint: str
    columns: Mapping[str, str]
    speakers: Mapping[str, str]
    shapes: tuple[FileShape, ...]
    units: tuple[str, ...]
    spans: tuple[tuple[int, int], ...]

    def unit_of(self, row_number: int) -> str:
        """The unit of a row. Raises UsageError for an unknown row number."""
        index = bisect.bisect_right([first for first, _ in self.spans], row_number) - 1
        if index < 0 or row_number > self.spans[index][1]:
            raise UsageError(f"there is no row {row_number}; rows are numbered from 1")
        return self.units[index]

    def shape_of(self, unit_id: str) -> FileShape:
        """The shape of the file of a unit."""
        return self.shapes[int(unit_id.partition("-")[0])]


def manifest_of(
    config: ScreenConfig, sources: Sequence[Source], plans: Sequence[FilePlan], shapes: Sequence[FileShape]
) -> Manifest:
    """The manifest of a planned screening."""
    units, spans = [], []
    for plan in plans:
        starts = [plan.first_row + unit.first_row for unit in plan.cuts.ranges]
        ends = [start - 1 for start in starts[1:]] + [plan.first_row + plan.cuts.rows]
        units += [plan.unit_id(unit) for unit in plan.cuts.ranges]
        spans += list(zip(starts, ends, strict=False))
    fingerprint, columns, speakers = config.fingerprint(sources), dict(config.columns), dict(config.speakers)
    return Manifest(fingerprint, columns, speakers, tuple(shapes), tuple(units), tuple(spans))


def open_output(output: Output, manifest: Manifest) -> None:
    """Create an output directory for this screening, or resume in it.

    Raises UsageError when the directory belongs to another screening or has other files.
    """
    try:
        present = load_manifest(output)
    except ReftError:
        if output.sizes():
            raise UsageError(f"{output.name}: the directory is not empty; name a new one") from None
        values = asdict(manifest)
        for shape in values["shapes"]:
            shape["header"] = shape["header"].decode("latin-1")
        output.write(MANIFEST, orjson.dumps(values, option=orjson.OPT_INDENT_2))
        return
    if present.fingerprint != manifest.fingerprint:
        raise UsageError(f"{output.name}: has a screening of other input or with other settings; name a new directory")


def load_manifest(output: Output) -> Manifest:
    """The manifest in an output directory. Raises ReftError when there is none."""
    try:
        values = orjson.loads(output.read(MANIFEST))
    except FileNotFoundError:
        raise ReftError(f"{output.name}: no screening here") from None
    shapes = tuple(
        FileShape(
            **shape
            | {
                "container": Container(shape["container"]),
                "format": Format(shape["format"]),
                "header": shape["header"].encode("latin-1"),
            }
        )
        for shape in values["shapes"]
    )
    spans = tuple((first, last) for first, last in values["spans"])
    names = values["columns"], values.get("speakers", {})
    return Manifest(values["fingerprint"], *names, shapes, tuple(values["units"]), spans)
