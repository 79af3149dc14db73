"""The parts of a report. A section computes a JSON value once and writes Markdown from it, as often as one likes.

To add one: write a module with `run(workspace, settings)`, `render(result, pictures)` and, where it has settings, their
`Config`, and name its SECTION in `sections`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reft_ray.core.errors import UsageError
from reft_ray.experiments.bench.workspace import Workspace
from reft_ray.finetuning.config import Config

Run = Callable[[Workspace, Mapping[str, Any]], dict[str, Any]]
"""(workspace, the section's settings) -> a JSON value; cached by `Section.key`."""

Render = Callable[[Mapping[str, Any], Path], str]
"""(result, folder for pictures) -> Markdown below the section's title. Pictures are linked as `FOLDER.name/file`."""

_APART = {"name", "rows", "base", "teacher", "teacher_settings", "world", "recipe", "blocks", "sections"}
"""Keys of a comparison that a section's result hangs on by content, or not at all."""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the report. `version` is raised when a change of the code makes older results wrong.

    A section with `gather` caches its own parts (cells): `run` makes what is missing, `gather` reads what is there.
    `settings` validates what the configuration says about it.
    """

    name: str
    title: str
    run: Run
    render: Render
    version: int = 1
    gather: Run | None = None
    settings: type[Config] = Config

    def key(self, workspace: Workspace) -> dict[str, Any]:
        """What its result depends on: rows, base and teacher by content, its own settings, the comparison's."""
        return {
            **workspace.identity(),
            "version": self.version,
            "settings": workspace.settings(self.name),
            "config": workspace.config.model_dump(mode="json", exclude=_APART),
        }

    def make(self, workspace: Workspace) -> None:
        """Compute what was not computed before."""
        settings = workspace.settings(self.name)
        if self.gather:
            self.run(workspace, settings)
        else:
            workspace.cached("sections", self.name, self.key(workspace), lambda: self.run(workspace, settings))

    def result(self, workspace: Workspace) -> dict[str, Any] | None:
        """What was computed before; None where nothing was."""
        if self.gather:
            return self.gather(workspace, workspace.settings(self.name)) or None
        return workspace.known("sections", self.name, self.key(workspace))


def check_settings(settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UsageError for settings of an unknown section, or such as a section would stumble over later."""
    known = {section.name: section for section in sections()}
    for name, values in settings.items():
        if name not in known:
            raise UsageError(f"sections.{name}: no such section; there are {', '.join(known)}")
        try:
            known[name].settings.of(values)
        except UsageError as error:
            raise UsageError(f"sections.{name}: {error}") from None


def sections() -> tuple[Section, ...]:
    """All sections, in the order of the report."""
    from reft_ray.experiments.ablations import conflict
    from reft_ray.experiments.ablations import section as ablations
    from reft_ray.experiments.attacks import section as attacks
    from reft_ray.experiments.bench import costs, grid_report
    from reft_ray.experiments.filters import section as filters

    return (
        grid_report.SECTION,
        filters.SECTION,
        ablations.SECTION,
        conflict.SECTION,
        attacks.SECTION,
        costs.SECTION,
    )
