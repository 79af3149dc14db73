"""The dashboards are complete, valid for Grafana, and the checked-in files are current."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from reft_ray.telemetry import dashboards
from reft_ray.telemetry.alerts import ALERTS
from reft_ray.telemetry.catalog import METRICS
from reft_ray.telemetry.dashboards import BOARDS, dashboard_json
from reft_ray.telemetry.panel import Chart, DisplayUnit, Panel, Thresholds
from reft_ray.telemetry.rendering import RULE_FILE, rendered, write

ROOT = Path(__file__).parents[2]
PANELS = [(board, panel) for board in dashboards.BOARDS for panel in board.panels]


def differences(written: Any, read: Any, path: str = "") -> Iterator[str]:
    """Paths at which the parsed model differs from the written one."""
    if isinstance(written, dict) and isinstance(read, dict):
        for key, value in written.items():
            if key in read:
                yield from differences(value, read[key], f"{path}/{key}")
            else:
                yield f"{path}/{key} is not in Grafana's schema"
    elif isinstance(written, list) and isinstance(read, list):
        if len(written) != len(read):
            yield f"{path} lost items"
        for index, (left, right) in enumerate(zip(written, read, strict=False)):
            yield from differences(left, right, f"{path}[{index}]")
    elif written != read:
        yield f"{path}: wrote {written!r}, read {read!r}"


@pytest.fixture(scope="module")
def through_grafana():
    """Round trip through Grafana's foundation SDK, whose types drop unknown keys."""
    plugins = pytest.importorskip("grafana_foundation_sdk.cog.plugins", reason="grafana-foundation-sdk not installed")
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    plugins.register_default_plugins()
    return lambda model: json.loads(json.dumps(Dashboard.from_json(model), cls=JSONEncoder))


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)
def test_grafana_parses_every_key(board, through_grafana):
    written = json.loads(json.dumps(dashboard_json(board)))
    assert list(differences(written, through_grafana(written))) == []


def test_a_key_unknown_to_grafana_is_found(through_grafana):
    written = json.loads(json.dumps(dashboard_json(BOARDS[0])))
    written["panels"][1]["fieldConfig"]["defaults"]["thresholds"]["stepz"] = []
    written["panels"][1]["targets"][0]["expression"] = "up"
    found = list(differences(written, through_grafana(written)))
    assert len(found) == 2
    assert all("not in Grafana's schema" in line for line in found)


def test_the_checked_in_dashboards_and_rules_are_what_the_code_renders():
    folder = ROOT / "dashboards"
    checked_in = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.*")}
    assert checked_in == rendered(), "run `reft-ray telemetry render`"


def test_write_creates_all_files(tmp_path):
    written = write(tmp_path / "d", "https://runbooks")
    assert [str(path.relative_to(tmp_path / "d")) for path in written] == list(rendered())
    for name in ("filter.json", RULE_FILE):
        assert "https://runbooks" in (tmp_path / "d" / name).read_text()


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)
def test_panels_have_descriptions_units_thresholds_and_positions(board):
    model = dashboard_json(board)
    taken: set[tuple[int, int]] = set()
    assert len({panel["id"] for panel in model["panels"]}) == len(model["panels"])
    for panel in model["panels"]:
        grid = panel["gridPos"]
        cells = {(grid["x"] + x, grid["y"] + y) for x in range(grid["w"]) for y in range(grid["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
        if panel["type"] != "row":
            defaults = panel["fieldConfig"]["defaults"]
            assert panel["description"]
            assert defaults["unit"]
            steps = defaults["thresholds"]["steps"]
            assert steps[0]["value"] is None
            bounds = [step["value"] for step in steps[1:]]
            assert bounds == sorted(bounds)


def test_thresholds_are_ordered():
    def colors(thresholds: Thresholds) -> list[tuple[float | None, str]]:
        return [(step["value"], step["color"]) for step in dashboards._thresholds(thresholds)["steps"]]

    assert colors(Thresholds(1, 2)) == [(None, "green"), (1, "orange"), (2, "red")]
    assert colors(Thresholds(2, 1, low_is_bad=True)) == [(None, "red"), (1, "orange"), (2, "green")]
    assert colors(Thresholds(bad=5)) == [(None, "green"), (5, "red")]
    assert colors(Thresholds()) == [(None, "blue")]


def test_runbook_links_name_alerts():
    linked = {panel.runbook for _, panel in PANELS if panel.runbook}
    alerts = {alert.name for alert in ALERTS}
    assert linked <= alerts
    assert {"ReftCanaryRecallLow", "ReftUnscreenedRows"} <= linked


def test_variables_and_links_are_on_every_board():
    for board in BOARDS:
        model = dashboard_json(board)
        variables = {variable["name"] for variable in model["templating"]["list"]}
        used = set(re.findall(r"\$\{?(\w+)", json.dumps(model["panels"]))) - {"__rate_interval"}
        assert used <= variables
        # No choice without an effect: a variable that no panel uses is not offered.
        assert variables - used <= {"datasource", "cluster", "application", "runbooks"}
        assert model["links"][0]["tags"][0] in model["tags"]


def test_every_metric_has_a_panel_or_an_alert():
    text = " ".join([line.expr for _, panel in PANELS for line in panel.lines] + [alert.expr for alert in ALERTS])
    assert [metric.name for metric in METRICS if metric.name not in text] == []


def test_metric_names_are_written_in_the_catalogue_only():
    """A second copy of a name could differ from what is recorded, drawn and alerted."""
    known = re.compile("|".join(sorted((metric.name for metric in METRICS), key=len, reverse=True)))
    found = []
    for path in (ROOT / "reft_ray").rglob("*.py"):
        if path.name == "catalog.py" and path.parent.name == "telemetry":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                text = node.value
                looks_like_a_name = re.fullmatch(r"(ray_)?reft_[a-z_]+_(total|seconds|ratio|info|rows|bytes)", text)
                if known.search(text) or looks_like_a_name:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {text[:60]}")
    assert found == []


def test_runbooks_name_panels_that_exist():
    titles = [panel.title for _, panel in PANELS]
    for path in (ROOT / "docs/runbooks").glob("*.md"):
        named = set(re.findall(r"(?<!\*)\*([A-Z][^*]+)\*(?!\*)", path.read_text())) - {"Targets"}
        assert [name for name in named if not any(title.startswith(name) for title in titles)] == [], path.stem


def test_every_panel_follows_the_cluster_that_was_chosen():
    """A panel that ignores its variables shows another team's service."""
    lines = [(board.name, panel.title, line.expr) for board, panel in PANELS for line in panel.lines]
    assert [line for line in lines if "$cluster" not in line[2]] == []


def test_a_busy_accelerator_is_not_red():
    (busy, ray) = (panel for board, panel in PANELS if board.name == "gpu" and panel.title in ("Busy", "GPUs"))
    assert (busy.thresholds, ray.thresholds) == (Thresholds(), Thresholds())


def test_a_panel_without_a_query_is_refused():
    with pytest.raises(ValueError, match="at least one query"):
        Panel("Empty", "Nothing.", DisplayUnit.NUMBER, (), chart=Chart.STAT)
