"""Markdown from cached results: nothing in it is written by hand."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from reft_ray.experiments.bench.sections import Section
from reft_ray.experiments.bench.workspace import Workspace


def write_results(workspace: Workspace, parts: Sequence[Section], path: Path, command: str) -> list[str]:
    """Write the report of every section that has a result; returns the names of those that have none.

    Pictures go to a folder beside the report that is named after it.
    """
    pictures = path.parent / path.stem
    scratch = path.parent / f".{path.stem}.writing"
    shutil.rmtree(scratch, ignore_errors=True)
    # Pictures are linked by their folder's name, so that it is final already while they are drawn.
    drawn = scratch / path.stem
    drawn.mkdir(parents=True)
    lines = [
        "# Results",
        "",
        f"Made by `{command}` from cached cells; no figure is written by hand. {workspace.title()}",
    ]
    missing = []
    for section in parts:
        result = section.result(workspace)
        if result is None:
            missing.append(section.name)
        else:
            lines += ["", f"## {section.title}", "", section.render(result, drawn).strip()]
    if missing:
        lines += ["", f"Not run: {', '.join(missing)}."]
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(pictures, ignore_errors=True)
    drawn.rename(pictures)
    shutil.rmtree(scratch)
    (path.parent / f".{path.name}.writing").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (path.parent / f".{path.name}.writing").replace(path)
    return missing
