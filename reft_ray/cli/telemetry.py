"""`reft-ray telemetry`: the metrics catalogue, and dashboards and rules rendered from it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reft_ray.cli.common import JsonOption, print_json, user_errors

app = typer.Typer(help="Dashboards, alert rules and the metrics catalogue.", no_args_is_help=True)


@app.command()
def render(
    out: Annotated[Path, typer.Option(help="Directory for the dashboards; rules go to its `rules/`.")] = Path(
        "dashboards"
    ),
    runbooks: Annotated[str | None, typer.Option(help="URL of your runbooks.", show_default="the project's")] = None,
) -> None:
    """Write the Grafana dashboards and the Prometheus rules."""
    from reft_ray.telemetry import dashboards, rendering

    with user_errors():
        for path in rendering.write(out, runbooks or dashboards.RUNBOOKS):
            print(path)


@app.command()
def metrics(as_json: JsonOption = False) -> None:
    """List every metric with its kind, labels and meaning."""
    from reft_ray.telemetry.catalog import METRICS

    if as_json:
        print_json(
            [
                {
                    "name": metric.name,
                    "kind": metric.kind,
                    "unit": metric.unit,
                    "labels": {label.name: list(label.values) or {"limit": label.limit} for label in metric.labels},
                    "help": metric.help,
                }
                for metric in METRICS
            ]
        )
        return
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("metric", no_wrap=True)
    for column in ("kind", "labels", "meaning"):
        table.add_column(column)
    for metric in METRICS:
        table.add_row(metric.name, metric.kind, ", ".join(metric.label_names), metric.help)
    Console().print(table)
