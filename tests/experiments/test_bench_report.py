"""Caching of sections, the report of cached and missing ones, and strict settings."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from reft_ray.cli.main import app
from reft_ray.core.errors import UsageError
from reft_ray.experiments.bench.presets import PRESETS, preset
from reft_ray.experiments.bench.section import Section
from reft_ray.experiments.bench.workspace import Workspace
from reft_ray.experiments.sections import check_settings, write_results


class FixedWorkspace(Workspace):
    """A workspace with a fixed identity."""

    def __init__(self, out: Path, **changes: Any) -> None:
        super().__init__(preset("quick", changes), out)

    def identity(self) -> dict[str, str]:
        return {"rows": "r", "base": "b", "teacher": "t"}

    def title(self) -> str:
        return "Of a test."


def count_calls(calls: list[dict[str, Any]]) -> Section:
    def run(_workspace: Workspace, settings: Mapping[str, Any]) -> dict[str, Any]:
        calls.append(dict(settings))
        return {"calls": len(calls)}

    def render(result: Mapping[str, Any], pictures: Path) -> str:
        (pictures / "one.png").write_bytes(b"png")
        return f"Made {result['calls']} times.\n\n![one]({pictures.name}/one.png)"

    return Section("counted", "Counted", run, render)


def test_a_section_is_made_once_per_settings_and_version(tmp_path: Path) -> None:
    calls: list[dict[str, Any]] = []
    section = count_calls(calls)
    workspace = FixedWorkspace(tmp_path)
    assert section.result(workspace) is None
    section.make(workspace)
    section.make(FixedWorkspace(tmp_path))
    assert len(calls) == 1
    assert section.result(FixedWorkspace(tmp_path)) == {"calls": 1}
    section.make(FixedWorkspace(tmp_path, sections={"counted": {"rows": 3}}))
    assert calls == [{}, {"rows": 3}]
    dataclasses.replace(section, version=2).make(workspace)
    assert len(calls) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cost": {"rounds": 3}}, "sections.cost: no such section; there are grid, filters, "),
        ({"costs": {"round": 3}}, "sections.costs: round: unknown key, did you mean rounds"),
        ({"costs": {"contenders": ["Lisa"]}}, "sections.costs: contenders: .*add 'plain LoRA SFT'"),
        ({"costs": {"contenders": ["plain LoRA SFT", "LISA"]}}, "sections.costs: .*no contender 'LISA'; there are "),
        ({"attacks": {"only": ["base46"]}}, "sections.attacks: only: .*no attack 'base46'; there are plain, base64, "),
        ({"ablations": {"only": ["lambda", "beta"]}}, "sections.ablations: only: .*no axis 'beta'; there are .*, tau"),
        ({"grid": {"n": 3}}, "sections.grid: n: unknown key"),
        ({"filters": {"answer": False}}, "sections.filters: answer: unknown key, did you mean answers"),
        ({"conflict": {"point": 1}}, "sections.conflict: point: unknown key, did you mean points"),
    ],
)
def test_wrong_settings_of_a_section_are_reported_before_any_training(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        check_settings(settings)
    given = [f"sections.{name}={json.dumps(values)}" for name, values in settings.items()]
    result = CliRunner().invoke(app, ["bench", "run", "--out", str(tmp_path / "out"), "--set", *given])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", PRESETS)
def test_the_presets_settings_of_sections_are_valid(name: str) -> None:
    check_settings(preset(name, {"rows": "DIR", "base": "BASE"}).sections)
    check_settings({"attacks": {"only": ["suffix for all", "identity shift"]}, "ablations": {"only": ["tau", "T"]}})


def test_a_section_depends_on_the_students_settings_and_not_on_the_grid(tmp_path: Path) -> None:
    calls: list[dict[str, Any]] = []
    section = count_calls(calls)
    section.make(FixedWorkspace(tmp_path))
    section.make(FixedWorkspace(tmp_path, blocks=[{"methods": ["sft"], "tasks": ["arithmetic"]}]))
    assert len(calls) == 1
    section.make(FixedWorkspace(tmp_path, student={"batch_rows": 3}))
    assert len(calls) == 2


def test_a_report_contains_cached_sections_and_names_the_others(tmp_path: Path) -> None:
    workspace = FixedWorkspace(tmp_path / "out")
    made, absent = count_calls([]), dataclasses.replace(count_calls([]), name="absent")
    made.make(workspace)
    report = tmp_path / "docs" / "results.md"
    assert write_results(workspace, [made, absent], report, "reft-ray bench run") == ["absent"]
    text = report.read_text()
    assert "## Counted\n\nMade 1 times." in text
    assert "Not run: absent." in text
    assert "`reft-ray bench run`" in text
    assert (report.parent / "results" / "one.png").is_file()
    assert sorted(path.name for path in report.parent.iterdir()) == ["results", "results.md"]


def test_errors_of_a_section_are_not_cached(tmp_path: Path) -> None:
    def broken(_workspace: Workspace, _settings: Mapping[str, Any]) -> dict[str, Any]:
        raise ValueError("broken")

    section = dataclasses.replace(count_calls([]), run=broken)
    with pytest.raises(ValueError, match="broken"):
        section.make(FixedWorkspace(tmp_path))
    assert section.result(FixedWorkspace(tmp_path)) is None


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_complete(name: str) -> None:
    config = preset(name, {"rows": "rows", "base": "base"})
    assert config.name == name
    assert config.blocks


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("smal", {}, "no preset 'smal'"),
        ("small", {}, "preset small reads real rows: name their folder with --rows"),
        ("8b", {"rows": "rows"}, "preset 8b needs a base model"),
        ("quick", {"evaluation": {"tasks": 3}}, "evaluation.tasks: unknown key, did you mean task?"),
        ("quick", {"student": {"epoch": 3}}, "epoch: unknown key, did you mean epochs?"),
        ("quick", {"blocks": [{"methods": ["sfft"], "tasks": ["sst2"]}]}, "no method 'sfft'"),
    ],
)
def test_an_invalid_preset_is_reported_in_one_line(name: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        preset(name, changes)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_changes_of_a_preset_are_merged_by_key() -> None:
    config = preset("quick", {"evaluation": {"task": 7}})
    assert config.evaluation.task == 7
    assert config.evaluation.harmful == 100
