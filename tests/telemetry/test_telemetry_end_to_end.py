"""From recording to panel and alert, with real Ray processes and a real Prometheus."""

import re
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from reft_ray.telemetry.alerts import ALERTS
from reft_ray.telemetry.catalog import METRICS
from reft_ray.telemetry.dashboards import BOARDS
from reft_ray.telemetry.metric_types import Kind
from reft_ray.telemetry.ray_recorder import REFRESH_SECONDS
from reft_ray.telemetry.recording_rules import RECORDING_RULES

pytestmark = [pytest.mark.ray, pytest.mark.timeout(400)]

ROOT = Path(__file__).parents[2]
PREFIX = {"reft-ray": "ray_", "reft-gateway": ""}
"""Of the exposed names; Prometheus stores them without it."""
RAY_DROPS_GAUGES_AFTER = 20.0
KINDS = {metric.name: metric.kind for metric in METRICS}


def exposed(entry: dict, job: str) -> str:
    """The aggregated series of a ledger entry in PromQL."""
    suffix = "_count" if KINDS[entry["metric"]] is Kind.HISTOGRAM else ""
    labels = "".join(f',{name}="{value}"' for name, value in entry["labels"].items())
    return f'sum({entry["metric"]}{suffix}{{job="{job}"{labels}}})'


def mismatches(prometheus, ledger) -> list[str]:
    """Ledger entries whose value in Prometheus differs."""
    found = []
    for job, entries in ledger.items():
        have = {}
        for labels, value in prometheus.query(f'{{__name__=~"reft_.*",job="{job}"}}'):
            name = labels["__name__"]
            for entry in entries:
                suffix = "_count" if KINDS[entry["metric"]] is Kind.HISTOGRAM else ""
                if name == entry["metric"] + suffix and entry["labels"].items() <= labels.items():
                    key = exposed(entry, job)
                    have[key] = have.get(key, 0) + value
        found += [
            f"{exposed(entry, job)} is {have.get(exposed(entry, job))}, recorded {entry['value']}"
            for entry in entries
            if have.get(exposed(entry, job)) != pytest.approx(entry["value"], rel=1e-9)
        ]
    return found


@pytest.fixture(scope="module")
def ledger(service, prometheus):
    """Record every metric twice, the second time after the first was scraped, so that counters have a rate."""
    for _ in range(2):
        recorded = service.record()
        prometheus.wait("scraped what was recorded", lambda recorded=recorded: not mismatches(prometheus, recorded))
    prometheus.wait(
        "computed the recording rules",
        lambda: all(prometheus.query(record.name) for record in RECORDING_RULES),
    )
    return recorded


def test_every_metric_is_scraped_exactly_as_recorded(prometheus, ledger):
    assert {entry["metric"] for entries in ledger.values() for entry in entries} == set(KINDS)
    assert mismatches(prometheus, ledger) == []


def test_every_panel_has_data(prometheus, ledger):
    assert prometheus.silent_panels(prometheus.query) == []


def test_every_alert_has_its_signals(prometheus, ledger):
    assert prometheus.silent_signals(prometheus.query) == []


def test_rules_are_evaluated_without_error_and_invariants_fire(prometheus, ledger):
    def rules_now():
        return [rule for group in prometheus.get("rules")["groups"] for rule in group["rules"]]

    # The synthetic service counts rows on the metrics that must stay 0.
    invariants = {"ReftUnscreenedRows", "ReftUnaccountedRows", "ReftAuditChainBroken"}
    prometheus.until_none(
        lambda: sorted(invariants - {rule["name"] for rule in rules_now() if rule.get("state") == "firing"})
    )
    rules = rules_now()
    assert len(rules) == len(RECORDING_RULES) + len(ALERTS)
    assert [(rule["name"], rule.get("lastError")) for rule in rules if rule["health"] != "ok"] == []


def test_gauges_are_refreshed(prometheus, service, ledger):
    """Ray drops a gauge 20 s after its last set; the recorder refreshes it."""
    since = time.monotonic()
    prometheus.wait(
        "passed the time after which Ray drops gauges",
        lambda: time.monotonic() - since > RAY_DROPS_GAUGES_AFTER + 2 * REFRESH_SECONDS,
    )
    gauges = {"reft-ray": [entry for entry in ledger["reft-ray"] if KINDS[entry["metric"]] is Kind.GAUGE]}
    text = httpx.get(f"http://{service.targets['reft-ray']}/metrics", timeout=30).text
    assert all(f"ray_{entry['metric']}" + "{" in text for entry in gauges["reft-ray"])
    assert mismatches(prometheus, gauges) == []


@pytest.mark.usefixtures("promtool")
@pytest.mark.parametrize("job", PREFIX)
def test_promtool_accepts_our_metrics(service, ledger, job):
    text = httpx.get(f"http://{service.targets[job]}/metrics", timeout=30).text
    ours = [line for line in text.splitlines() if re.match(rf"(# (HELP|TYPE) )?{PREFIX[job]}reft_", line)]
    assert len(ours) > len(METRICS)
    done = subprocess.run(
        ["promtool", "check", "metrics"], input="\n".join(ours) + "\n", capture_output=True, text=True, check=False
    )
    messages = (done.stdout + done.stderr).splitlines()
    # Ray adds labels in camel case, such as WorkerId, to every metric.
    camel_case = "label names should be written in 'snake_case' not 'camelCase'"
    assert [line for line in messages if job != "reft-ray" or not line.endswith(camel_case)] == []
    assert done.returncode in (0, 3)


def test_pictures_are_drawn_from_prometheus(prometheus, ledger, tmp_path):
    script = ROOT / "benchmarks/dashboard_pictures.py"
    command = [sys.executable, str(script), "--prometheus", prometheus.url, "--out", str(tmp_path), "--minutes", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    pictures = sorted(tmp_path.glob("*.png"))
    assert {path.stem for path in pictures} == {f"dashboard-{board.name}" for board in BOARDS} - {"dashboard-gpu"}
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in pictures)
