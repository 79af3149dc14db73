"""Row text for a page: controls and direction marks made visible, long text cut. Templates escape the rest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import orjson

from reft_ray.api.stores import Stores
from reft_ray.core.conversation import parts
from reft_ray.core.decoding import readings
from reft_ray.core.folding import hides
from reft_ray.jobs.errors import NotFoundError
from reft_ray.jobs.review import Review
from reft_ray.rows.text import full_conversation

SHOWN = 6_000
"""Characters of a part that a page shows; a link leads to the rest as plain text."""

DECODED = 50_000
"""Characters of a part that are decoded for a page."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of text; `mark` is the name of a control character that is shown instead of it."""

    text: str
    mark: bool = False


@dataclass(frozen=True, slots=True)
class ShownPart:
    """One part of a row. `decided`: the part with the highest score; `cut` counts the characters not shown."""

    name: str
    decided: bool
    pieces: tuple[Piece, ...]
    cut: int
    decoded: tuple[tuple[str, tuple[Piece, ...]], ...]


def pieces(text: str, shown: int = SHOWN) -> tuple[Piece, ...]:
    """The start of a text, in which nothing can reorder, hide or restyle what follows."""
    return tuple(_pieces(text[:shown]))


def row_parts(stores: Stores, review: Review) -> list[ShownPart] | None:
    """The parts of a row's text; None where the text was deleted."""
    try:
        content = stores.files.read_range(review.text_file, review.project_id, review.text_offset, review.text_bytes)
    except NotFoundError:
        return None
    row: dict[str, Any] = orjson.loads(content)
    found = []
    for part in parts(full_conversation(row.get("judged", row["messages"]))):
        decoded = [(name, pieces(text)) for name, text in readings(part.text[:DECODED]) if name]
        cut = max(0, len(part.text) - SHOWN)
        found.append(ShownPart(part.name, part.name == review.part, pieces(part.text), cut, tuple(decoded)))
    return found


def plain_text(stores: Stores, review: Review) -> str:
    """A row's whole text, for a browser that shows it as plain text."""
    content = stores.files.read_range(review.text_file, review.project_id, review.text_offset, review.text_bytes)
    row: dict[str, Any] = orjson.loads(content)
    found = parts(full_conversation(row.get("judged", row["messages"])))
    return "\n\n".join(f"{part.name}\n{part.text}" for part in found)


def _pieces(text: str) -> Iterator[Piece]:
    run: list[str] = []
    for char in text:
        if char in "\n\t" or not hides(char):
            run.append(char)
            continue
        if run:
            yield Piece("".join(run))
            run = []
        yield Piece(f"U+{ord(char):04X}", mark=True)
    if run:
        yield Piece("".join(run))
