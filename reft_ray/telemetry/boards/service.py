"""The Service health dashboard: objectives, the API, and Ray underneath."""

from __future__ import annotations

from reft_ray.telemetry import catalog as c
from reft_ray.telemetry.panel import DASHBOARD as Q
from reft_ray.telemetry.panel import NEUTRAL, Board, Chart, Thresholds, Line, Panel, Section, DisplayUnit, zero_if_absent
from reft_ray.telemetry.recording_rules import AVAILABILITY, FRESHNESS, LATENCY, Slo


def _budget(slo: Slo, runbook: str) -> Panel:
    """Budget left if the last three days were the whole period."""
    return Panel(
        slo.title,
        f"Error budget left over three days for the objective of {slo.objective:.1%}; below 0 the objective is missed.",
        DisplayUnit.SHARE,
        (Line(f"1 - {slo.recording_rule('3d').name} / {slo.budget:.4g}"),),
        Thresholds(0.5, 0.1, low_is_bad=True),
        Chart.STAT,
        runbook,
    )


_OBJECTIVES = Section(
    "Objectives",
    (
        _budget(AVAILABILITY, "ReftModerationAvailabilityBurn"),
        _budget(LATENCY, "ReftModerationLatencyBurn"),
        _budget(FRESHNESS, "ReftScreeningFreshnessBurn"),
        Panel(
            "Versions",
            "Running versions; more than one only while a new one rolls out.",
            DisplayUnit.NUMBER,
            (Line(Q.gauge(c.BUILD_INFO, "application", "version", "python")),),
            Thresholds(1, 2),
            Chart.TABLE,
        ),
    ),
)

_API = Section(
    "API",
    (
        Panel(
            "Requests by route",
            "HTTP requests per second by route template.",
            DisplayUnit.REQUESTS_PER_SECOND,
            (Line(Q.rate(c.API_REQUESTS, "method", "route"), "{{method}} {{route}}"),),
        ),
        Panel(
            "Errors by code",
            "Requests per second that were answered with 4xx or 5xx.",
            DisplayUnit.REQUESTS_PER_SECOND,
            (Line(Q.rate(c.API_REQUESTS, "code", code="[45].."), "{{code}}"),),
            Thresholds(0.1, 1),
            runbook="ReftModerationAvailabilityBurn",
        ),
        Panel(
            "Request time",
            "Median, 95th and 99th percentile over all routes.",
            DisplayUnit.SECONDS,
            tuple(Line(Q.quantile(q, c.API_SECONDS), f"p{q * 100:.0f}") for q in (0.5, 0.95, 0.99)),
            Thresholds(0.5, 2),
            runbook="ReftModerationLatencyBurn",
        ),
        Panel(
            "Slowest routes",
            "99th percentile of the request time by route.",
            DisplayUnit.SECONDS,
            (Line(f"topk(10, {Q.quantile(0.99, c.API_SECONDS, 'route')})", "{{route}}"),),
            Thresholds(0.5, 2),
        ),
        Panel(
            "In flight",
            "Requests being answered, over all gateways.",
            DisplayUnit.NUMBER,
            (Line(Q.gauge(c.API_IN_FLIGHT, how="sum"), "requests"),),
            Thresholds(200, 500),
            runbook="ReftFilterSheds",
        ),
        Panel(
            "Refused by a limit",
            "Requests per second over a customer's rate limit or quota.",
            DisplayUnit.REQUESTS_PER_SECOND,
            (Line(zero_if_absent(Q.rate(c.RATE_LIMITED, "limit")), "{{limit}}"),),
            Thresholds(1, 10),
        ),
    ),
)

_SCOPE = 'cluster=~"$cluster"'


def _ray(title: str, description: str, shown: DisplayUnit, lines: tuple[Line, ...], level: Thresholds = NEUTRAL) -> Panel:
    return Panel(title, description, shown, lines, level, runbook="ReftReplicaUnhealthy", needs="serve")


_RAY = Section(
    "Ray",
    (
        _ray(
            "Healthy replicas",
            "Replicas of each deployment that pass their health check.",
            DisplayUnit.NUMBER,
            (
                Line(
                    f"sum by (application, deployment) (ray_serve_deployment_replica_healthy{{{_SCOPE}}})",
                    "{{application}} {{deployment}}",
                ),
            ),
            Thresholds(1, 0.5, low_is_bad=True),
        ),
        _ray(
            "Waiting at Serve's routers",
            "Calls that wait for a replica, per deployment; a line that grows asks for replicas.",
            DisplayUnit.NUMBER,
            (Line(f"sum by (deployment) (ray_serve_deployment_queued_queries{{{_SCOPE}}})", "{{deployment}}"),),
            Thresholds(100, 500),
        ),
        Panel(
            "Processor and memory",
            "Use of each node's processors, and of its memory.",
            DisplayUnit.SHARE,
            (
                Line(f"max by (instance) (ray_node_cpu_utilization{{{_SCOPE}}}) / 100", "processor {{instance}}"),
                Line(
                    f"max by (instance) (ray_node_mem_used{{{_SCOPE}}})"
                    f" / max by (instance) (ray_node_mem_total{{{_SCOPE}}})",
                    "memory {{instance}}",
                ),
            ),
            Thresholds(0.8, 0.95),
            needs="ray",
        ),
        Panel(
            "Object store",
            "Bytes in Ray's object store by place; bytes that are spilled cost disk time.",
            DisplayUnit.BYTES,
            (Line(f"sum by (Location) (ray_object_store_memory{{{_SCOPE}}})", "{{Location}}"),),
            needs="ray",
        ),
        Panel(
            "Graphics processors",
            "Use of each graphics processor.",
            DisplayUnit.SHARE,
            (
                Line(
                    f"max by (instance, GpuIndex) (ray_node_gpus_utilization{{{_SCOPE}}}) / 100",
                    "{{instance}} {{GpuIndex}}",
                ),
            ),
            Thresholds(0.95, 0.99),
            needs="gpu",
        ),
    ),
)

BOARD = Board(
    "service", "Service health", "Objectives, the API in front, and Ray underneath.", (_OBJECTIVES, _API, _RAY)
)
