"""What the jobs of one base model share: its teacher, alignment rows and gate prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from reft_ray.core.conversation import Example, Label, chat
from reft_ray.finetuning.prompts import read_labelled
from reft_ray.hf.ref_teacher import RefTeacher
from reft_ray.pipeline.config import AlignmentArgs, BaseArgs
from reft_ray.teachers import BUILTIN, teacher_folder
from reft_ray.testbed.english import EVERYDAY, HARMFUL, LOOK_ALIKES
from reft_ray.testbed.synthetic import SyntheticRows


@dataclass(frozen=True)
class ModelContext:
    """A base model's configuration with what it names, loaded on first use."""

    args: BaseArgs

    @cached_property
    def teacher(self) -> RefTeacher:
        """The Ref-Teacher, verified."""
        return RefTeacher.load(teacher_folder(self.args.teacher))

    @property
    def base(self) -> str:
        """The base model's directory or hub id."""
        named = self.args.base
        return self.teacher.manifest.base_name if named is None or named == BUILTIN else named

    def alignment(self, name: str | None) -> Sequence[Example]:
        """The rows of an alignment set."""
        return _alignment(self.args.alignment[name or self.args.default_alignment])

    def harmful(self) -> list[Example]:
        """Prompts that a safe model refuses, with their categories."""
        return self._prompts(self.args.gate.harmful, Label.HARMFUL)

    def harmless(self) -> list[Example]:
        """Prompts that a useful model answers."""
        return self._prompts(self.args.gate.harmless, Label.HARMLESS)

    def _prompts(self, source: str, label: Label) -> list[Example]:
        if source == BUILTIN:
            texts = HARMFUL if label is Label.HARMFUL else (*EVERYDAY, *LOOK_ALIKES)
            rows: Sequence[Example] = [Example(chat(text), label, BUILTIN) for text in texts]
        else:
            rows = read_labelled(source, label)
        return list(rows[: self.args.gate.prompts])


def _alignment(args: AlignmentArgs) -> Sequence[Example]:
    rows = list(_synthetic_rows().alignment) if args.builtin else []
    for path in args.labelled:
        rows += read_labelled(path)
    for path in args.refusals:
        rows += read_labelled(path, Label.HARMFUL)
    for path in args.helpful:
        rows += read_labelled(path, Label.HARMLESS)
    return rows


@cache
def _synthetic_rows() -> SyntheticRows:
    return SyntheticRows.make(0)
