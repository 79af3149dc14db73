"""What the documents name exists: linked files and headings, modules, paths, commands and their options."""

import ast
import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from reft_ray.cli.main import app

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "cluster/README.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
# A CHANGELOG also names what no longer exists.
CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md"]
IDS = {"ids": lambda page: str(page.relative_to(ROOT))}
ROOTS = (ROOT, ROOT / "reft_ray", ROOT / "cluster")
PACKAGES = sorted(path.name for path in (ROOT / "reft_ray").iterdir() if (path / "__init__.py").is_file())


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, **IDS)
def test_links_resolve(page: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        if "://" in target:
            continue
        linked = (page.parent / name).resolve() if name else page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", CURRENT, **IDS)
def test_named_tests_exist(page: Path) -> None:
    """`tests/jobs/test_kill.py::test_name`: a promise names the test that shows it."""
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", page.read_text(encoding="utf-8"))
    assert bool(named) == (page.name in ("threat-model.md", "aisvs.md"))
    missing = [name for path, name in named if f"def {name}(" not in (ROOT / path).read_text(encoding="utf-8")]
    assert missing == []


@pytest.mark.parametrize("page", CURRENT, **IDS)
def test_paths_and_modules_exist(page: Path) -> None:
    """`pipeline/steps.py`, `tests/jobs/test_kill.py`, `evaluation.gate.Gate`, `reft_ray.pipeline.steps:make`."""
    missing = []
    for name in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8")):
        if path := re.match(r"[\w./-]+\.(?:py|yaml|toml|sh|svg)(?=$|:)", name):
            if "/" in path[0] and not any((root / path[0]).exists() for root in ROOTS):
                missing.append(name)
        elif re.fullmatch(rf"(?:reft_ray\.)?(?:{'|'.join(PACKAGES)})(?:[.:]\w+)+(?:\(.*\))?", name):
            dotted = "reft_ray." + name.partition("(")[0].replace(":", ".").removeprefix("reft_ray.")
            if not defined(dotted):
                missing.append(name)
    assert missing == []


def defined(dotted: str) -> bool:
    """Whether a dotted name is a module, or a name at the top of one; nothing is imported."""
    path = ROOT.joinpath(*dotted.split("."))
    if path.with_suffix(".py").is_file() or path.is_dir():
        return True
    module = path.parent.with_suffix(".py")
    if not module.is_file():
        module = path.parent / "__init__.py"
    if not module.is_file():
        return False
    return any(path.name in names_of(node) for node in ast.parse(module.read_text(encoding="utf-8")).body)


def names_of(node: ast.stmt) -> set[str]:
    """The names that a statement at the top of a module defines, or offers in `__all__`."""
    match node:
        case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
            return {node.name}
        case ast.Assign(targets=[ast.Name(id="__all__")]):
            return set(ast.literal_eval(node.value))
        case ast.Assign():
            return {name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        case ast.AnnAssign(target=ast.Name(id=name)):
            return {name}
    return set()


@functools.cache
def reft_ray() -> Any:
    """The command tree of `reft-ray`."""
    return typer.main.get_command(app)


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each `reft-ray` command in a code block or between backticks."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    blocks = re.findall(r"^```\w*\n(.*?)^```|^((?: {4}.*\n)+)", text, re.M | re.S)
    lines = [line for pair in blocks for block in pair for line in block.splitlines()]
    inline = re.findall(r"`((?:\.venv/bin/)?reft-ray [^`]+)`", text)
    for line in (*lines, *inline):
        line = " ".join(line.split()).removeprefix(".venv/bin/")
        if line.startswith("reft-ray "):
            try:
                yield shlex.split(line, comments=True)[1:]
            except ValueError:
                continue  # a quotation that ends on a later line


@pytest.mark.parametrize("page", CURRENT, **IDS)
def test_commands_and_options_exist(page: Path) -> None:
    unknown = []
    for words in commands(page):
        command, rest = reft_ray(), list(words)
        while rest and rest[0] in getattr(command, "commands", {}):
            command = command.commands[rest.pop(0)]
        options = {name for param in command.params for name in (*param.opts, *param.secondary_opts)} | {"--help"}
        if hasattr(command, "commands") and rest and not rest[0].startswith("-"):
            unknown.append(" ".join(words))
        given = (word.partition("=")[0] for word in rest if word.startswith("--"))
        unknown += [f"{' '.join(words)}: {option}" for option in given if option not in options]
    assert unknown == []
