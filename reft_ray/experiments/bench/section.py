"""A section of the report: it computes a JSON value once and renders Markdown tables from it.

To add one: write a module with `run(workspace, settings)`, `render(result, pictures)` and, where it has settings, their
`Settings` class, and add its SECTION to `experiments/sections.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reft_ray.experiments.bench.workspace import Workspace
from reft_ray.settings import Settings

Run = Callable[[Workspace, Mapping[str, Any]], dict[str, Any]]
"""(workspace, the section's settings) -> a JSON value; cached by `Section.key`."""

Render = Callable[[Mapping[str, Any], Path], str]
"""(result, folder for pictures) -> Markdown below the section's title. Pictures are linked as `FOLDER.name/file`."""

_NOT_IN_KEY = {"name", "rows", "base", "teacher", "teacher_settings", "builtin_sizes", "recipe", "blocks", "sections"}
"""Keys of a comparison that are in a section's key by content, or that its result does not depend on."""


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the report. `version` is raised when a change of the code makes older results wrong.

    A section with `gather` caches its own parts (cells): `run` makes the missing ones, `gather` reads those in the
    cache. `settings` validates the section's part of the configuration.
    """

    name: str
    title: str
    run: Run
    render: Render
    version: int = 1
    gather: Run | None = None
    settings: type[Settings] = Settings

    def key(self, workspace: Workspace) -> dict[str, Any]:
        """What its result depends on: rows, base and teacher by content, its own settings, the comparison's."""
        return {
            **workspace.identity(),
            "version": self.version,
            "settings": workspace.settings(self.name),
            "config": workspace.config.model_dump(mode="json", exclude=_NOT_IN_KEY),
        }

    def make(self, workspace: Workspace) -> None:
        """Compute the result unless it is cached."""
        settings = workspace.settings(self.name)
        if self.gather:
            self.run(workspace, settings)
        else:
            workspace.cached("sections", self.name, self.key(workspace), lambda: self.run(workspace, settings))

    def result(self, workspace: Workspace) -> dict[str, Any] | None:
        """The cached result, or None."""
        if self.gather:
            return self.gather(workspace, workspace.settings(self.name)) or None
        return workspace.stored("sections", self.name, self.key(workspace))
