"""Every alert fires on bad series and does not fire on good ones (`promtool test rules`)."""

import copy
import re
import subprocess
import warnings
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pytest
import yaml

from reft_ray.telemetry import catalog as c
from reft_ray.telemetry import rendering
from reft_ray.telemetry.alerts import ALERTS
from reft_ray.telemetry.catalog import METRICS
from reft_ray.telemetry.dashboards import RUNBOOKS
from reft_ray.telemetry.metric_types import Metric
from reft_ray.telemetry.promql import SERVE_UPDATING

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


WHERE = {"cluster": "eu", "application": "filter"}
JOB = "reft-ray/reft-ray"


def s(metric: Metric | str, suffix: str = "", **labels: str) -> str:
    name = metric if isinstance(metric, str) else metric.name
    inside = ", ".join(f'{name}="{value}"' for name, value in {**WHERE, **labels}.items() if value)
    return f"{name}{suffix}{{{inside}}}"


def fires(severity: str, **labels: str) -> dict[str, str]:
    return {"severity": severity, **{name: value for name, value in {**WHERE, **labels}.items() if value}}


critical, warning, info = (partial(fires, severity) for severity in ("critical", "warning", "info"))

AVAILABILITY, LATENCY, FRESHNESS = (
    "ReftAvailabilityBurn",
    "ReftModerationLatencyBurn",
    "ReftScreeningFreshnessBurn",
)


def requests(good: str, bad: str, **labels: str) -> dict[str, str]:
    """Requests counted by Serve's proxies."""
    return {
        s("ray_serve_num_http_requests_total", job=JOB, status_code="200", **labels): good,
        s("ray_serve_num_http_requests_total", job=JOB, status_code="503", **labels): bad,
    }


def latency(within: str, every: str) -> dict[str, str]:
    return {
        s(c.FILTER_REQUEST_SECONDS, "_bucket", stream="moderation", le="0.5"): within,
        s(c.FILTER_REQUEST_SECONDS, "_count", stream="moderation"): every,
    }


def freshness(within: str, every: str, le: str = "600.0") -> dict[str, str]:
    return {
        s(c.SCREENING_SECONDS, "_bucket", size="small", le=le): within,
        s(c.SCREENING_SECONDS, "_count", size="small"): every,
    }


def rows(block: str) -> dict[str, str]:
    return {s(c.FILTER_ROWS, decision="allow"): "0+99x576", s(c.FILTER_ROWS, decision="block"): block}


def teachers(*ids: str, values: str = "1x60", **labels: str) -> dict[str, str]:
    return {s(c.TEACHER_INFO, teacher=teacher, **labels): values for teacher in ids}


def gateways(values: str = "1x60", **labels: str) -> dict[str, str]:
    return {s(c.BUILD_INFO, version="1", **labels): values}


def statuses(job: str = JOB, **of: str) -> dict[str, str]:
    return {s("ray_serve_deployment_status", job=job, deployment=name): values for name, values in of.items()}


def watched(values: str = "1x200") -> dict[str, str]:
    """A scrape target of the cluster, so that a new series is known to be new."""
    return {f'up{{cluster="eu", job="{JOB}"}}': values}


def harmful(score: str) -> dict[str, str]:
    labels = {"suite": "s1", "measure": "harmful_score"}
    return gateways("1x200") | {
        s(c.SAFETY_EVAL, model="student", **labels): f"{score}x200",
        s(c.SAFETY_EVAL, model="base", **labels): "0.9x200",
    }


def gate(**results: str) -> dict[str, str]:
    return watched() | {s(c.GATE_RESULTS, result=result): values for result, values in results.items()}


ELSEWHERE = {"cluster": "us"}


CASES = (
    # The service fails: a page; at a fifth of a percent a warning; within the budget nothing.
    Case(
        AVAILABILITY,
        requests("0+90x600", "0+10x600"),
        "2h",
        (critical(window="1h"), critical(window="6h"), warning(window="1d")),
    ),
    Case(AVAILABILITY, requests("0+998x600", "0+2x600"), "4h", (warning(window="3d"),)),
    Case(AVAILABILITY, requests("0+9995x600", "0+5x600"), "4h"),
    # 20 requests in a quiet hour, one of them failed.
    Case(AVAILABILITY, requests("0+0.33x60 20+0x60", "0x60 1x60"), "64m"),
    # Another application fails, and requests without an application are not ours.
    Case(
        AVAILABILITY,
        requests("0+100x600", "0x600") | requests("0+90x600", "0+10x600", application="other"),
        "2h",
        tuple(
            of(application="other", window=window)
            for of, window in ((critical, "1h"), (critical, "6h"), (warning, "1d"))
        ),
    ),
    Case(AVAILABILITY, requests("0+90x600", "0+10x600", application=""), "2h"),
    Case(
        LATENCY,
        latency("0+50x600", "0+100x600"),
        "2h",
        (critical(window="1h"), critical(window="6h"), warning(window="1d")),
    ),
    Case(LATENCY, latency("0+99.5x600", "0+100x600"), "4h"),
    # Six moderations in a night hour, one of them took 0.6 s.
    Case(LATENCY, latency("0x10 1x10 2x10 3x10 4x10 5x70", "0x10 1x10 2x10 3x10 4x10 6x70"), "55m"),
    # Slow datasets never page: many are a warning, and one of the day is nothing.
    Case(FRESHNESS, freshness("0+50x600", "0+100x600"), "2h", (warning(window="1d"),)),
    Case(FRESHNESS, freshness("0+99x600", "0+100x600", le="600"), "4h"),
    Case(FRESHNESS, freshness("0x600", "0x60 1x540"), "2h"),
    Case("ReftUnscreenedRows", watched() | {s(c.UNSCREENED_ROWS, WorkerId="w"): "_x65 3x10"}, "68m", (critical(),)),
    Case("ReftUnscreenedRows", watched() | {s(c.UNSCREENED_ROWS, WorkerId="w"): "0x70 2x10"}, "75m", (critical(),)),
    Case("ReftUnscreenedRows", watched() | {s(c.UNSCREENED_ROWS): "0x20"}, "8m"),
    Case("ReftUnscreenedRows", watched() | {s(c.UNSCREENED_ROWS): "3x180"}, "2h"),
    Case("ReftUnaccountedRows", watched() | {s(c.UNACCOUNTED_ROWS, where="stream"): "_x65 1x10"}, "68m", (critical(),)),
    Case("ReftUnaccountedRows", watched() | {s(c.UNACCOUNTED_ROWS, where="stream"): "0x20"}, "8m"),
    # A new Prometheus reads the counter of an old, settled row; a new pod starts it again from 0.
    *(
        Case("ReftUnaccountedRows", watched() | {s(c.UNACCOUNTED_ROWS, where="stream"): "5x180"}, at)
        for at in ("8m", "70m")
    ),
    Case("ReftUnaccountedRows", watched() | {s(c.UNACCOUNTED_ROWS, where="stream"): "5x70 0x60"}, "90m"),
    Case("ReftAuditChainBroken", {s(c.AUDIT_BREAKS): "0x5 1x10"}, "8m", (critical(),)),
    Case("ReftAuditChainBroken", {s(c.AUDIT_BREAKS): "0x15"}, "8m"),
    # A cluster loses its teachers while another has some; nothing was ever scraped; Serve never started one.
    Case(
        "ReftNoTeacher",
        teachers("t1", values="1x20 stale") | teachers("t1", **ELSEWHERE),
        "25m",
        (critical(),),
    ),
    Case("ReftNoTeacher", {"up": "1x20"}, "10m", (critical(cluster="", application=""),)),
    Case("ReftNoTeacher", teachers("t1", **ELSEWHERE) | statuses(Teacher="3x5 1x30"), "15m", (critical(),)),
    Case("ReftNoTeacher", teachers("t1", "t2", values="1x20 _x2 1x40"), "23m"),
    Case("ReftNoTeacher", teachers("t1", **ELSEWHERE) | statuses(Teacher="3x30"), "15m"),
    # All gateways fail while the teachers live.
    Case(
        "ReftNoGateway",
        teachers("t1") | gateways("1x20 stale") | statuses(Teacher="6x60", Gateway="6x20 1x40"),
        "25m",
        (critical(),),
    ),
    Case(
        "ReftNoGateway",
        gateways(**ELSEWHERE) | statuses(Teacher="6x60", Gateway="3x5 1x55"),
        "12m",
        (critical(),),
    ),
    Case("ReftNoGateway", gateways(**ELSEWHERE) | statuses(job="other", Gateway="1x60"), "12m"),
    Case("ReftNoGateway", gateways() | statuses(Gateway="6x20 1x40"), "25m"),
    Case(
        "ReftCanaryRecallLow",
        {
            s(c.FILTER_CANARY_RECALL, teacher="t1", replica="a"): "1x20",
            s(c.FILTER_CANARY_RECALL, teacher="t1", replica="b"): "0.9x20",
        },
        "10m",
        (critical(teacher="t1"),),
    ),
    Case("ReftCanaryRecallLow", {s(c.FILTER_CANARY_RECALL, teacher="t1"): "1x20"}, "10m"),
    Case(
        "ReftCanaryFalsePositives",
        {s(c.FILTER_CANARY_FALSE_POSITIVES, teacher="t1"): "0.1x40"},
        "20m",
        (warning(teacher="t1"),),
    ),
    Case("ReftCanaryFalsePositives", {s(c.FILTER_CANARY_FALSE_POSITIVES, teacher="t1"): "0.01x40"}, "20m"),
    Case("ReftRejectRatioJump", rows("0+1x552 602+50x24"), "48h", (warning(),), "5m"),
    Case("ReftRejectRatioJump", rows("0+10x576"), "48h", step="5m"),
    Case(
        "ReftScoreDrift",
        {s(c.FILTER_SCORE_PSI, stream="dataset", teacher="t1"): "0.3x60"},
        "45m",
        (warning(stream="dataset", teacher="t1"),),
    ),
    Case("ReftScoreDrift", {s(c.FILTER_SCORE_PSI, stream="dataset", teacher="t1"): "0.2x60"}, "45m"),
    Case("ReftTeachersDiffer", teachers("t1", "t2"), "45m", (info(),)),
    Case("ReftTeachersDiffer", teachers("t1"), "45m"),
    Case(
        "ReftFilterSheds",
        {
            s(c.FILTER_SHED, reason="queue_full"): "0+10x60",
            s(c.FILTER_REQUEST_SECONDS, "_count", stream="chat"): "0+90x60",
        },
        "30m",
        (warning(),),
    ),
    Case(
        "ReftFilterSheds",
        {
            s(c.FILTER_SHED, reason="queue_full"): "0+1x60",
            s(c.FILTER_REQUEST_SECONDS, "_count", stream="chat"): "0+90x60",
        },
        "30m",
    ),
    Case("ReftQuarantineOld", {s(c.REVIEW_OLDEST): "300000x30"}, "20m", (warning(),)),
    Case("ReftQuarantineOld", {s(c.REVIEW_OLDEST): "200000x30"}, "20m"),
    Case(
        "ReftOverturnRateHigh",
        {s(c.REVIEW_DECISIONS, outcome="approved"): "0+1x200", s(c.REVIEW_DECISIONS, outcome="rejected"): "0+2x200"},
        "3h",
        (warning(),),
    ),
    Case(
        "ReftOverturnRateHigh",
        {s(c.REVIEW_DECISIONS, outcome="approved"): "0+1x200", s(c.REVIEW_DECISIONS, outcome="rejected"): "0+9x200"},
        "3h",
    ),
    Case(
        "ReftJobsStuck", {s(c.JOBS, status="queued"): "2x60", s(c.JOBS, status="running"): "0x60"}, "45m", (warning(),)
    ),
    Case("ReftJobsStuck", {s(c.JOBS, status="queued"): "2x60", s(c.JOBS, status="running"): "1x60"}, "45m"),
    Case("ReftTrainingRestarts", watched() | {s(c.TRAIN_RESTARTS, stage="student"): "_x65 4x30"}, "80m", (info(),)),
    Case("ReftTrainingRestarts", watched() | {s(c.TRAIN_RESTARTS, stage="student"): "_x65 3x30"}, "80m"),
    Case("ReftStudentHarmful", harmful("0.2") | gate(passed="_x65 1x30"), "80m", (warning(suite="s1"),)),
    Case("ReftStudentHarmful", harmful("0.01") | gate(passed="_x65 1x30"), "80m"),
    # The gate withheld the model, as it should; and a warning ends an hour after the release.
    Case("ReftStudentHarmful", harmful("0.2") | gate(withheld="_x65 1x30"), "80m"),
    Case("ReftStudentHarmful", harmful("0.2") | gate(passed="_x65 1x130"), "140m"),
    Case("ReftGateErrors", gate(error="_x65 1x20"), "70m", (warning(),)),
    Case("ReftGateErrors", gate(withheld="_x65 1x20"), "70m"),
    Case("ReftGateWithholdsMany", gate(withheld="0+9x60", passed="0+1x60"), "45m", (warning(),)),
    Case("ReftGateWithholdsMany", gate(withheld="0+1x60", passed="0+9x60"), "45m"),
    # A crash loop: each replica lives for a few minutes.
    Case(
        "ReftReplicaUnhealthy",
        statuses(Teacher=" ".join(["6 6 6 2"] * 10), Gateway="6x40"),
        "30m",
        (warning(deployment="Teacher"),),
    ),
    Case(
        "ReftReplicaUnhealthy",
        statuses(Teacher="3x5 1x30"),
        "30m",
        (warning(deployment="Teacher"),),
    ),
    # A replaced replica and deployments that update: no alert.
    Case("ReftReplicaUnhealthy", statuses(Teacher="6x9 2x3 6x30", Gateway="3x10 4x10 5x10"), "22m"),
    Case("ReftReplicaUnhealthy", statuses(job="other", Teacher="1x40") | statuses(Translator="1x40"), "30m"),
    Case("ReftTargetDown", watched("0x30"), "20m", (warning(application="", job=JOB),)),
    Case("ReftTargetDown", watched("1x30"), "20m"),
    Case("ReftTargetDown", {f'up{{job="{job}"}}': "0x30" for job in ("kuberay-operator", "array-db-exporter")}, "20m"),
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
        summary = re.sub(
            r"{{ \$labels\.(\w+) }}",
            lambda found, labels=labels: labels.get(found[1], ""),
            summaries[case.alert, labels.get("window", "")],
        )
        annotations = {"summary": summary, "runbook_url": f"{RUNBOOKS}/{case.alert}.md"}
        expected.append({"exp_labels": labels, "exp_annotations": annotations})
    return {
        "interval": case.step,
        "input_series": [{"series": name, "values": values} for name, values in case.series.items()],
        "alert_rule_test": [{"eval_time": case.at, "alertname": case.alert, "exp_alerts": expected}],
    }


def needed(records: list[dict[str, str]], rules: list[dict[str, str]]) -> list[dict[str, str]]:
    """The recording rules that `rules` read, and those that these read, in order."""
    read = [record for record in records if any(record["record"] in rule["expr"] for rule in rules)]
    return read if all(rule in rules for rule in read) else needed(records, [*rules, *read])


def run_promtool(cases: tuple[Case, ...], directory: Path) -> subprocess.CompletedProcess[str]:
    """Run promtool once over all cases, each with the rules of its alert only."""
    records, alerts = (group["rules"] for group in rendering.rule_groups()["groups"])
    paths = []
    for index, case in enumerate(cases):
        tested = copy.deepcopy([rule for rule in alerts if rule["alert"] == case.alert])
        for rule in tested:
            # The value in it is an arithmetic result.
            assert "{{ $value" in rule["annotations"].pop("description")
        read = needed(records, tested)
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
    loud, quiet = (next(case for case in CASES if bool(case.fires) is fires) for fires in (True, False))
    for wrong in (replace(loud, fires=()), replace(quiet, fires=loud.fires)):
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
    assert bound == SERVE_UPDATING
    failing = {status.name for status in DeploymentStatus if status.to_numeric() < bound}
    assert failing == {"DEPLOY_FAILED", "UNHEALTHY"}


def test_metrics_that_must_stay_zero_have_a_page():
    pages = " ".join(alert.expr for alert in ALERTS if alert.severity == "critical")
    assert all(metric.name in pages for metric in METRICS if "must stay 0" in metric.help)
