"""Render the Grafana dashboards and the Prometheus rule file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from reft_ray.telemetry.alerts import ALERTS
from reft_ray.telemetry.dashboards import BOARDS, RUNBOOKS, dashboard_json
from reft_ray.telemetry.recording_rules import INTERVAL_SECONDS, RECORDING_RULES

RULE_FILE = "rules/reft.yaml"
_HEADER = "# Made by `reft-ray telemetry render` from reft_ray/telemetry: change it there.\n"


def rule_groups(runbooks: str = RUNBOOKS) -> dict[str, Any]:
    """The content of the rule file: a group of recording rules and a group of alerts."""
    return {
        "groups": [
            {
                "name": "reft-records",
                "interval": f"{INTERVAL_SECONDS}s",
                "rules": [{"record": rule.name, "expr": rule.expr} for rule in RECORDING_RULES],
            },
            {
                "name": "reft-alerts",
                "rules": [
                    {
                        "alert": alert.name,
                        "expr": alert.expr,
                        "for": alert.hold,
                        "labels": alert.labels,
                        "annotations": {
                            "summary": alert.summary,
                            "description": alert.description,
                            "runbook_url": f"{runbooks}/{alert.name}.md",
                        },
                    }
                    for alert in ALERTS
                ],
            },
        ]
    }


def rendered(runbooks: str = RUNBOOKS) -> dict[str, str]:
    """Path relative to the output directory -> content. `runbooks` is the URL of the runbooks."""
    files = {
        f"{board.name}.json": json.dumps(dashboard_json(board, runbooks), indent=2, ensure_ascii=False) + "\n"
        for board in BOARDS
    }
    rules = yaml.safe_dump(rule_groups(runbooks), sort_keys=False, width=1000, allow_unicode=True)
    return files | {RULE_FILE: _HEADER + rules}


def write(directory: Path, runbooks: str = RUNBOOKS) -> list[Path]:
    """Write all files into `directory`, which is created if missing; returns their paths."""
    paths = []
    for name, content in rendered(runbooks).items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
        paths.append(path)
    return paths
