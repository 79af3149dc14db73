"""The dashboards as Grafana JSON models (Grafana >= 10)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from reft_ray.telemetry import catalog
from reft_ray.telemetry.boards import chat, finetuning, jobs, nodes, review, safety, screening, service
from reft_ray.telemetry.boards import filter as filter_board
from reft_ray.telemetry.metric_types import APPLICATION, Metric
from reft_ray.telemetry.panel import Board, Chart, Panel, Thresholds
from reft_ray.telemetry.promql import CLUSTER

BOARDS: tuple[Board, ...] = (
    filter_board.BOARD,
    screening.BOARD,
    review.BOARD,
    jobs.BOARD,
    finetuning.BOARD,
    safety.BOARD,
    chat.BOARD,
    service.BOARD,
    nodes.ACCELERATORS,
    nodes.DATA,
)
RUNBOOKS = "https://github.com/reft-ray/reft-ray/blob/main/docs/runbooks"
_TAG = "reft"
_DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
_GRID_WIDTH = 24
_SIZES = {Chart.STAT: (6, 5), Chart.TIME_SERIES: (12, 8), Chart.HEATMAP: (24, 9), Chart.TABLE: (12, 8)}
_OPTIONS: dict[Chart, dict[str, Any]] = {
    Chart.TIME_SERIES: {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    },
    Chart.STAT: {
        "graphMode": "area",
        "colorMode": "value",
        "justifyMode": "auto",
        "textMode": "auto",
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
        "orientation": "auto",
    },
    Chart.HEATMAP: {
        "calculate": False,
        "color": {
            "mode": "scheme",
            "scheme": "Turbo",
            "steps": 64,
            "reverse": False,
            "exponent": 0.5,
            "fill": "dark-orange",
        },
        "yAxis": {"unit": "short", "axisPlacement": "left"},
        "cellGap": 1,
        "legend": {"show": True},
        "tooltip": {"show": True, "yHistogram": False},
    },
    Chart.TABLE: {"showHeader": True, "cellHeight": "sm"},
}


def dashboard_json(board: Board, runbooks: str = RUNBOOKS) -> dict[str, Any]:
    """The dashboard's JSON model. `runbooks`, the URL of the runbooks, is the default of a text box."""
    panels = list(_panels(board))
    return {
        "uid": f"reft-{board.name}",
        "title": f"reft-ray / {board.title}",
        "description": board.description,
        "tags": [_TAG],
        "schemaVersion": 39,
        "editable": True,
        "graphTooltip": 1,
        "timezone": "browser",
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "links": [
            {
                "title": "Other reft-ray dashboards",
                "type": "dashboards",
                "icon": "external link",
                "tooltip": "",
                "url": "",
                "tags": [_TAG],
                "asDropdown": True,
                "targetBlank": False,
                "includeVars": True,
                "keepTime": True,
            }
        ],
        "templating": {"list": _variables(runbooks, json.dumps(panels))},
        "panels": panels,
    }


def _variables(runbooks: str, used: str) -> list[dict[str, Any]]:
    return [
        {
            "name": "datasource",
            "label": "Data source",
            "type": "datasource",
            "query": "prometheus",
            "multi": False,
            "includeAll": False,
        },
        # Each lists the values that the choices before it leave.
        _query_variable(CLUSTER, _values(catalog.BUILD_INFO, CLUSTER)),
        _query_variable(APPLICATION, _values(catalog.BUILD_INFO, APPLICATION, CLUSTER)),
        *(
            _query_variable(label, _values(metric, label, CLUSTER, APPLICATION))
            for label, metric in (("teacher", catalog.TEACHER_INFO), ("project", catalog.JOBS))
            if f"${label}" in used
        ),
        {
            "name": "runbooks",
            "label": "Runbooks",
            "description": "URL of the runbooks.",
            "type": "textbox",
            "query": runbooks,
            "current": {"text": runbooks, "value": runbooks},
        },
    ]


def _values(metric: Metric, label: str, *chosen: str) -> str:
    inside = ",".join(f'{name}=~"${name}"' for name in chosen)
    return f"label_values({metric.name}{{{inside}}}, {label})"


def _query_variable(name: str, query: str) -> dict[str, Any]:
    return {
        "name": name,
        "label": name.capitalize(),
        "type": "query",
        "datasource": _DATASOURCE,
        "query": {"query": query, "refId": name},
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        # Also matches series without the label, e.g. `cluster` where there is only one.
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def _panels(board: Board) -> Iterator[dict[str, Any]]:
    identity, top = 0, 0
    for section in board.sections:
        identity += 1
        yield {
            "id": identity,
            "type": "row",
            "title": section.title,
            "collapsed": False,
            "gridPos": {"x": 0, "y": top, "w": _GRID_WIDTH, "h": 1},
            "panels": [],
        }
        top, left, tallest = top + 1, 0, 0
        for panel in section.panels:
            identity += 1
            width, height = _SIZES[panel.chart]
            if left + width > _GRID_WIDTH:
                top, left, tallest = top + tallest, 0, 0
            yield _panel(panel, identity, {"x": left, "y": top, "w": width, "h": height})
            left, tallest = left + width, max(tallest, height)
        top += tallest


def _panel(panel: Panel, identity: int, position: dict[str, int]) -> dict[str, Any]:
    model: dict[str, Any] = {
        "id": identity,
        "type": panel.chart.value,
        "title": panel.title,
        "description": panel.description,
        "datasource": _DATASOURCE,
        "gridPos": position,
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": _DATASOURCE,
                "expr": line.expr,
                "legendFormat": line.legend or "__auto",
                "range": panel.chart is not Chart.TABLE,
                "instant": panel.chart is Chart.TABLE,
                "format": {Chart.HEATMAP: "heatmap", Chart.TABLE: "table"}.get(panel.chart, "time_series"),
            }
            for index, line in enumerate(panel.lines)
        ],
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit.value,
                "color": {"mode": "palette-classic" if panel.chart is Chart.TIME_SERIES else "thresholds"},
                "thresholds": _thresholds(panel.thresholds),
            },
            "overrides": [],
        },
        "options": _OPTIONS[panel.chart],
    }
    if panel.chart is Chart.TIME_SERIES and panel.thresholds.bad is not None:
        model["fieldConfig"]["defaults"]["custom"] = {"thresholdsStyle": {"mode": "dashed"}}
    if panel.runbook:
        model["links"] = [
            {
                "title": f"Runbook {panel.runbook}",
                "type": "link",
                "icon": "doc",
                "tooltip": "",
                "url": f"${{runbooks}}/{panel.runbook}.md",
                "tags": [],
                "asDropdown": False,
                "targetBlank": True,
                "includeVars": False,
                "keepTime": False,
            }
        ]
    return model


def _thresholds(thresholds: Thresholds) -> dict[str, Any]:
    if thresholds.bad is None:
        steps: list[tuple[float | None, str]] = [(None, "blue")]
    elif thresholds.low_is_bad:
        steps = [(None, "red"), (thresholds.bad, "orange"), (thresholds.warn, "green")]
    else:
        steps = [(None, "green"), (thresholds.warn, "orange"), (thresholds.bad, "red")]
        steps = [step for step in steps if step[0] is not None or step[1] == "green"]
    return {"mode": "absolute", "steps": [{"value": value, "color": color} for value, color in steps]}
