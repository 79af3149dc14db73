"""The rows of `reft-ray teacher train` and `build`: prompts, answers, validation rows and licences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from reft_ray.core.conversation import Example, Label
    from reft_ray.finetuning.teacher_loop import TeacherData

BaseOption = Annotated[str, typer.Option(help="Base model: a name, a directory or a hub id.")]
PromptsOption = Annotated[
    list[Path], typer.Option(help="Labelled prompts, JSONL (prompt, label, source, licence?, response?).")
]
OutOption = Annotated[Path, typer.Option(help="Directory of the artefact.")]
ValidationOption = Annotated[
    list[Path] | None,
    typer.Option(help="Labelled prompts of other sources; they choose layers, thresholds and early stop."),
]
HoldoutOption = Annotated[list[str] | None, typer.Option(help="Sources of --prompts to use for validation instead.")]
LicenceOption = Annotated[
    list[str] | None, typer.Option(help="Use only rows whose `licence` is one of these; default: all rows.")
]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Any TeacherConfig key, e.g. epochs=2.")]


@dataclass
class RowFiles:
    """What the options name."""

    prompts: Sequence[Path]
    validation: Sequence[Path] | None = None
    holdout: Sequence[str] | None = None
    licences: Sequence[str] | None = None
    refusals: Sequence[Path] | None = None
    helpful: Sequence[Path] | None = None
    left_out: Counter[str] = field(default_factory=Counter)

    def read(self, seed: int) -> TeacherData:
        """The rows of a teacher; notes on stderr say what is left out. Raises ReftError."""
        from reft_ray.core.conversation import Label
        from reft_ray.core.errors import ReftError
        from reft_ray.finetuning.prompts import (
            hold_out_rows,
            hold_out_sources,
            join_answers,
            sources_of,
            without_prompts_of,
        )
        from reft_ray.finetuning.teacher_loop import TeacherData

        rows = self._rows(self.prompts)
        answers = [*self._rows(self.refusals, Label.HARMFUL), *self._rows(self.helpful, Label.HARMLESS)]
        held = self._rows(self.validation)
        if self.left_out:
            counts = ", ".join(f"{name or 'not stated'} {count}" for name, count in sorted(self.left_out.items()))
            _note(f"{self.left_out.total()} rows are left out for their licence: {counts}")
        if not rows:
            raise ReftError(f"no row of --prompts has the licence {' or '.join(self.licences or ())}")
        if self.holdout and not self.validation:
            rows, held = hold_out_sources(rows, self.holdout)
            answers = [row for row in answers if row.source not in self.holdout]
        elif not self.validation:
            _note("no --validation and no --holdout-source: a tenth of the rows is used for validation")
            rows, held = hold_out_rows(rows, seed=seed)
        train, answers = without_prompts_of(rows, held), without_prompts_of(answers, held)
        if len(train) < len(rows):
            _note(f"{len(rows) - len(train)} rows are skipped, because their prompts are validation prompts")
        uses = {"training": train, "validation": held, "answers": answers}
        sources = [source for use, found in uses.items() for source in sources_of(found, use)]
        train, answers = join_answers(train, answers)
        return TeacherData(train, held, answers, sources)

    def _rows(self, files: Sequence[Path] | None, label: Label | None = None) -> list[Example]:
        from reft_ray.finetuning.prompts import read_labelled, under_licences

        read = [row for path in files or () for row in read_labelled(path, label)]
        kept, left_out = under_licences(read, self.licences or ())
        self.left_out.update(left_out)
        return kept


def _note(message: str) -> None:
    typer.echo(f"note: {message}", err=True)
