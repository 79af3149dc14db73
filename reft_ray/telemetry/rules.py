"""Prometheus rule files, generated from the records and alerts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from reft_ray.telemetry.alerts import ALERTS
from reft_ray.telemetry.dashboards import RUNBOOKS
from reft_ray.telemetry.recording_rules import RECORDING_RULES

FILE = "reft.yaml"
_HEADER = "# Made by `reft-ray telemetry render` from reft_ray/telemetry: change it there.\n"


def groups(runbooks: str = RUNBOOKS) -> dict[str, Any]:
    """The rule file as data: one group of records, one of alerts."""
    return {
        "groups": [
            {
                "name": "reft-records",
                "rules": [{"record": record.name, "expr": record.expr} for record in RECORDING_RULES],
            },
            {
                "name": "reft-alerts",
                "rules": [
                    {
                        "alert": alert.name,
                        "expr": alert.expr,
                        "for": alert.hold,
                        "labels": alert.labels,
                        "annotations": {"summary": alert.summary, "runbook_url": f"{runbooks}/{alert.name}.md"},
                    }
                    for alert in ALERTS
                ],
            },
        ]
    }


def rendered(runbooks: str = RUNBOOKS) -> dict[str, str]:
    """File name -> content of the rule file."""
    text = yaml.safe_dump(groups(runbooks), sort_keys=False, width=1000, allow_unicode=True)
    return {FILE: _HEADER + text}


def write(directory: Path, runbooks: str = RUNBOOKS) -> list[Path]:
    """Write the rule file into `directory`, which is made if absent; returns its path in a list."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, content in rendered(runbooks).items():
        path = directory / name
        path.write_text(content, encoding="utf-8")
        paths.append(path)
    return paths
