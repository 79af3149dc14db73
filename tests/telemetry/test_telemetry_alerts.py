"""Every alert fires on bad series and does not fire on good ones (`promtool test rules`)."""

import re
import subprocess
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import yaml

from reft_ray.telemetry import catalog as c
from reft_ray.telemetry import rendering
from reft_ray.telemetry.alerts import ALERTS
from reft_ray.telemetry.catalog import METRICS
from reft_ray.telemetry.metric_types import Metric

with warnings.catch_warnings():
    # Ray emits deprecation warnings on import.
    warnings.simplefilter("ignore")
    from ray.serve._private.common import DeploymentStatus

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Case:
    """Series (name with labels -> promtool notation) and the labels of the alerts that fire at `at`."""

    alert: str
    series: dict[str, str]
    at: str
    fires: tuple[dict[str, str], ...] = ()
    step: str = "1m"


def s(metric: Metric, suffix: str = "", prefix: str = "", **labels: str) -> str:
    inside = ", ".join(f'{name}="{value}"' for name, value in labels.items())
    return f"{prefix}{metric.name}{suffix}{{{inside}}}"


def page(**labels: str) -> dict[str, str]:
    return {"severity": "page", **labels}


def ticket(**labels: str) -> dict[str, str]:
    return {"severity": "ticket", **labels}


MODERATION = {"route": "/v1/moderations", "method": "POST"}
AVAILABILITY, LATENCY, FRESHNESS = (
    "ReftModerationAvailabilityBurn",
    "ReftModerationLatencyBurn",
    "ReftScreeningFreshnessBurn",
)


def api(good: float, bad: float) -> dict[str, str]:
    return {
        s(c.API_REQUESTS, code="200", **MODERATION): f"0+{good}x600",
        s(c.API_REQUESTS, code="503", **MODERATION): f"0+{bad}x600",
        s(c.API_REQUESTS, code="500", route="/v1/files", method="POST"): "0+1000x600",
    }


def latency(within: float, prefix: str = "") -> dict[str, str]:
    return {
        s(c.FILTER_REQUEST_SECONDS, "_bucket", prefix, stream="moderation", le="0.5"): f"0+{within}x600",
        s(c.FILTER_REQUEST_SECONDS, "_count", prefix, stream="moderation"): "0+100x600",
    }


def freshness(within: float, le: str, prefix: str = "") -> dict[str, str]:
    return {
        s(c.SCREENING_SECONDS, "_bucket", prefix, size="small", le=le): f"0+{within}x600",
        s(c.SCREENING_SECONDS, "_count", prefix, size="small"): "0+100x600",
    }


def rows(block: str) -> dict[str, str]:
    return {
        s(c.FILTER_ROWS, prefix="ray_", decision="allow"): "0+99x576",
        s(c.FILTER_ROWS, prefix="ray_", decision="block"): block,
    }


def teachers(*ids: str) -> dict[str, str]:
    return {s(c.TEACHER_INFO, prefix="ray_", application="filter", teacher=teacher): "1x60" for teacher in ids}


def statuses(**of: str) -> dict[str, str]:
    return {
        f'ray_serve_deployment_status{{application="filter", deployment="{name}"}}': values
        for name, values in of.items()
    }


CASES = (
    Case(AVAILABILITY, api(90, 10), "2h", (page(window="1h"), page(window="6h"), ticket(window="1d"))),
    Case(AVAILABILITY, api(998, 2), "4h", (ticket(window="3d"),)),
    Case(AVAILABILITY, api(9995, 5), "4h"),
    Case(LATENCY, latency(50), "2h", (page(window="1h"), page(window="6h"), ticket(window="1d"))),
    Case(LATENCY, latency(99.5, "ray_"), "4h"),
    Case(FRESHNESS, freshness(50, "600.0"), "2h", (page(window="6h"), ticket(window="1d"))),
    Case(FRESHNESS, freshness(99, "600", "ray_"), "4h"),
    Case("ReftUnscreenedRows", {s(c.UNSCREENED_ROWS, prefix="ray_", WorkerId="w"): "_x5 3x10"}, "8m", (page(),)),
    Case("ReftUnscreenedRows", {s(c.UNSCREENED_ROWS, prefix="ray_", WorkerId="w"): "0x70 2x10"}, "75m", (page(),)),
    Case("ReftUnscreenedRows", {s(c.UNSCREENED_ROWS): "0x20"}, "8m"),
    Case("ReftUnscreenedRows", {s(c.UNSCREENED_ROWS): "3x180"}, "2h"),
    Case("ReftUnaccountedRows", {s(c.UNACCOUNTED_ROWS, where="stream"): "_x5 1x10"}, "8m", (page(),)),
    Case("ReftUnaccountedRows", {s(c.UNACCOUNTED_ROWS, where="stream"): "0x20"}, "8m"),
    Case("ReftAuditChainBroken", {s(c.AUDIT_BREAKS): "0x5 1x10"}, "8m", (page(),)),
    Case("ReftAuditChainBroken", {s(c.AUDIT_BREAKS): "0x15"}, "8m"),
    Case("ReftNoTeacher", {'up{job="ray"}': "1x20"}, "10m", (page(),)),
    Case("ReftNoTeacher", teachers("t1"), "10m"),
    Case(
        "ReftCanaryRecallLow",
        {
            s(c.FILTER_CANARY_RECALL, prefix="ray_", teacher="t1", replica="a"): "1x20",
            s(c.FILTER_CANARY_RECALL, prefix="ray_", teacher="t1", replica="b"): "0.9x20",
        },
        "10m",
        (page(teacher="t1"),),
    ),
    Case("ReftCanaryRecallLow", {s(c.FILTER_CANARY_RECALL, teacher="t1"): "1x20"}, "10m"),
    Case(
        "ReftCanaryFalsePositives",
        {s(c.FILTER_CANARY_FALSE_POSITIVES, teacher="t1"): "0.1x40"},
        "20m",
        (ticket(teacher="t1"),),
    ),
    Case("ReftCanaryFalsePositives", {s(c.FILTER_CANARY_FALSE_POSITIVES, teacher="t1"): "0.01x40"}, "20m"),
    Case("ReftRejectRatioJump", rows("0+1x552 602+50x24"), "48h", (ticket(),), "5m"),
    Case("ReftRejectRatioJump", rows("0+10x576"), "48h", step="5m"),
    Case(
        "ReftScoreDrift",
        {s(c.FILTER_SCORE_PSI, stream="dataset", teacher="t1"): "0.3x60"},
        "45m",
        (ticket(stream="dataset", teacher="t1"),),
    ),
    Case("ReftScoreDrift", {s(c.FILTER_SCORE_PSI, stream="dataset", teacher="t1"): "0.2x60"}, "45m"),
    Case("ReftTeachersDiffer", teachers("t1", "t2"), "45m", (ticket(application="filter"),)),
    Case("ReftTeachersDiffer", teachers("t1"), "45m"),
    Case(
        "ReftFilterSheds",
        {
            s(c.FILTER_SHED, reason="queue_full"): "0+10x60",
            s(c.FILTER_REQUEST_SECONDS, "_count", stream="chat"): "0+90x60",
        },
        "30m",
        (ticket(),),
    ),
    Case(
        "ReftFilterSheds",
        {
            s(c.FILTER_SHED, reason="queue_full"): "0+1x60",
            s(c.FILTER_REQUEST_SECONDS, "_count", stream="chat"): "0+90x60",
        },
        "30m",
    ),
    Case("ReftQuarantineOld", {s(c.REVIEW_OLDEST): "300000x30"}, "20m", (ticket(),)),
    Case("ReftQuarantineOld", {s(c.REVIEW_OLDEST): "200000x30"}, "20m"),
    Case(
        "ReftOverturnRateHigh",
        {s(c.REVIEW_DECISIONS, outcome="approved"): "0+1x200", s(c.REVIEW_DECISIONS, outcome="rejected"): "0+2x200"},
        "3h",
        (ticket(),),
    ),
    Case(
        "ReftOverturnRateHigh",
        {s(c.REVIEW_DECISIONS, outcome="approved"): "0+1x200", s(c.REVIEW_DECISIONS, outcome="rejected"): "0+9x200"},
        "3h",
    ),
    Case(
        "ReftJobsStuck", {s(c.JOBS, status="queued"): "2x60", s(c.JOBS, status="running"): "0x60"}, "45m", (ticket(),)
    ),
    Case("ReftJobsStuck", {s(c.JOBS, status="queued"): "2x60", s(c.JOBS, status="running"): "1x60"}, "45m"),
    Case("ReftTrainingRestarts", {s(c.TRAIN_RESTARTS, stage="student"): "_x5 4x30"}, "20m", (ticket(),)),
    Case("ReftTrainingRestarts", {s(c.TRAIN_RESTARTS, stage="student"): "_x5 3x30"}, "20m"),
    Case(
        "ReftStudentHarmful",
        {
            s(c.SAFETY_EVAL, suite="s1", measure="harmful_score", model="student"): "0.2x20",
            s(c.SAFETY_EVAL, suite="s1", measure="harmful_score", model="base"): "0.9x20",
        },
        "10m",
        (ticket(suite="s1"),),
    ),
    Case(
        "ReftStudentHarmful",
        {
            s(c.SAFETY_EVAL, suite="s1", measure="harmful_score", model="student"): "0.01x20",
            s(c.SAFETY_EVAL, suite="s1", measure="harmful_score", model="base"): "0.9x20",
        },
        "10m",
    ),
    Case("ReftGateErrors", {s(c.GATE_RESULTS, result="error"): "_x5 1x20"}, "10m", (ticket(),)),
    Case("ReftGateErrors", {s(c.GATE_RESULTS, result="withheld"): "_x5 1x20"}, "10m"),
    Case(
        "ReftGateWithholdsMany",
        {s(c.GATE_RESULTS, result="withheld"): "0+9x60", s(c.GATE_RESULTS, result="passed"): "0+1x60"},
        "45m",
        (ticket(),),
    ),
    Case(
        "ReftGateWithholdsMany",
        {s(c.GATE_RESULTS, result="withheld"): "0+1x60", s(c.GATE_RESULTS, result="passed"): "0+9x60"},
        "45m",
    ),
    # A crash loop: each replica lives for a few minutes.
    Case(
        "ReftReplicaUnhealthy",
        statuses(teacher=" ".join(["6 6 6 2"] * 10), gateway="6x40"),
        "30m",
        (ticket(application="filter", deployment="teacher"),),
    ),
    Case(
        "ReftReplicaUnhealthy",
        statuses(teacher="3x5 1x30"),
        "30m",
        (ticket(application="filter", deployment="teacher"),),
    ),
    # A replaced replica and deployments that update: no alert.
    Case("ReftReplicaUnhealthy", statuses(teacher="6x9 2x3 6x30", gateway="3x10 4x10 5x10"), "22m"),
    Case("ReftTargetDown", {'up{job="ray"}': "0x30"}, "20m", (ticket(job="ray"),)),
    Case("ReftTargetDown", {'up{job="ray"}': "1x30"}, "20m"),
)


def test_every_alert_has_a_case_that_fires_it_and_one_that_does_not():
    names = {alert.name for alert in ALERTS}
    assert {case.alert for case in CASES if case.fires} == names
    assert {case.alert for case in CASES if not case.fires} == names


def test_every_alert_has_a_runbook_and_every_runbook_an_alert():
    runbooks = {path.stem: path.read_text() for path in (ROOT / "docs/runbooks").glob("Reft*.md")}
    assert runbooks.keys() == {alert.name for alert in ALERTS}
    for name, text in runbooks.items():
        assert text.startswith(f"# {name}\n")
        assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ["Meaning", "Impact", "Diagnosis", "Mitigation"]


def promtool_test(case: Case) -> dict[str, object]:
    summaries = {(alert.name, alert.window): alert.summary for alert in ALERTS}
    expected = []
    for labels in case.fires:
        summary = summaries[case.alert, labels.get("window", "")]
        for name, value in labels.items():
            summary = summary.replace(f"{{{{ $labels.{name} }}}}", value)
        annotations = {"summary": summary, "runbook_url": f"docs/runbooks/{case.alert}.md"}
        expected.append({"exp_labels": labels, "exp_annotations": annotations})
    return {
        "interval": case.step,
        "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
        "alert_rule_test": [{"eval_time": case.at, "alertname": case.alert, "exp_alerts": expected}],
    }


def run_promtool(cases: tuple[Case, ...], directory: Path) -> subprocess.CompletedProcess[str]:
    """Run promtool once over all cases, each with the rules of its alert only."""
    records, alerts = (group["rules"] for group in rendering.rule_groups()["groups"])
    paths = []
    for index, case in enumerate(cases):
        tested = [rule for rule in alerts if rule["alert"] == case.alert]
        read = [rule for rule in records if any(rule["record"] in alert["expr"] for alert in tested)]
        rule_file = {"groups": [{"name": "records", "rules": read}, {"name": "alerts", "rules": tested}]}
        (directory / f"rules-{index}.yaml").write_text(yaml.safe_dump(rule_file))
        tests = {
            "rule_files": [f"rules-{index}.yaml"],
            "evaluation_interval": case.step,
            "group_eval_order": ["records", "alerts"],
            "tests": [promtool_test(case)],
        }
        paths.append(directory / f"case-{index}.yaml")
        paths[-1].write_text(yaml.safe_dump(tests))
    command = ["promtool", "test", "rules", *map(str, paths)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.usefixtures("promtool")
def test_alerts_fire_only_on_bad_series(tmp_path: Path):
    done = run_promtool(CASES, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.usefixtures("promtool")
def test_the_cases_can_fail(tmp_path: Path):
    """An unexpected alert fails the run, and so does a missing one."""
    fires, quiet = CASES[7], CASES[9]
    for wrong in (replace(fires, fires=()), replace(quiet, fires=fires.fires)):
        assert run_promtool((wrong,), tmp_path).returncode != 0


@pytest.mark.usefixtures("promtool")
def test_promtool_accepts_the_rules(tmp_path: Path):
    rendering.write(tmp_path)
    path = tmp_path / rendering.RULE_FILE
    done = subprocess.run(["promtool", "check", "rules", str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""


def test_only_failing_serve_statuses_are_below_the_bound():
    (alert,) = (alert for alert in ALERTS if alert.name == "ReftReplicaUnhealthy")
    (condition,) = alert.conditions
    bound = int(condition.bound.removeprefix("< "))
    failing = {status.name for status in DeploymentStatus if status.to_numeric() < bound}
    assert failing == {"DEPLOY_FAILED", "UNHEALTHY"}


def test_metrics_that_must_stay_zero_have_a_page():
    pages = " ".join(alert.expr for alert in ALERTS if alert.severity == "page")
    assert all(metric.name in pages for metric in METRICS if "must stay 0" in metric.help)
