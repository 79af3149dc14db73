"""The report of `reft-ray bench`: its sections, and the Markdown of their cached results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from reft_ray.atomic import atomic_directory, atomic_write
from reft_ray.core.errors import UsageError
from reft_ray.experiments.ablations import conflict
from reft_ray.experiments.ablations import section as ablations
from reft_ray.experiments.attacks import section as attacks
from reft_ray.experiments.bench import costs, grid
from reft_ray.experiments.bench.section import Section
from reft_ray.experiments.bench.workspace import Workspace
from reft_ray.experiments.filters import section as filters

SECTIONS = {
    section.name: section
    for section in (
        grid.SECTION,
        filters.SECTION,
        ablations.SECTION,
        conflict.SECTION,
        attacks.SECTION,
        costs.SECTION,
    )
}
"""By name, in the order of the report."""


def check_settings(settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UsageError for an unknown section, or for settings that its section does not accept."""
    for name, values in settings.items():
        if name not in SECTIONS:
            raise UsageError(f"sections.{name}: no such section; there are {', '.join(SECTIONS)}")
        try:
            SECTIONS[name].settings.of(values)
        except UsageError as error:
            raise UsageError(f"sections.{name}: {error}") from None


def write_results(workspace: Workspace, parts: Sequence[Section], path: Path, command: str) -> list[str]:
    """Write the report of all sections that have a result; returns the names of the others.

    Pictures go to a folder next to the report, with the report's name.
    """
    lines = ["# Results", "", f"Made by `{command}`. {workspace.title()}"]
    missing = []
    # Links to pictures contain the folder's name, so pictures are drawn in a folder of the final name.
    with atomic_directory(path.parent / path.stem, replace=True) as pictures:
        for section in parts:
            result = section.result(workspace)
            if result is None:
                missing.append(section.name)
            else:
                lines += ["", f"## {section.title}", "", section.render(result, pictures).strip()]
    if missing:
        lines += ["", f"Not run: {', '.join(missing)}."]
    with atomic_write(path) as scratch:
        scratch.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return missing
