"""The Service health dashboard: objectives, API and Ray."""

from __future__ import annotations

from reft_ray.telemetry import catalog as c
from reft_ray.telemetry.panel import DASHBOARD as Q
from reft_ray.telemetry.panel import (
    NO_THRESHOLDS,
    NODES,
    Board,
    Chart,
    DisplayUnit,
    Line,
    Panel,
    Section,
    Thresholds,
    quantiles,
    zero_if_absent,
)
from reft_ray.telemetry.promql import SCRAPED
from reft_ray.telemetry.recording_rules import AVAILABILITY, BUDGET_WINDOW, FRESHNESS, LATENCY, Slo


def _budget(slo: Slo, runbook: str) -> Panel:
    """What is left of the error budget, per cluster and application."""
    return Panel(
        slo.title,
        f"Remaining error budget over 30 days for the objective of {slo.objective:.1%}; below 0 it is missed.",
        DisplayUnit.SHARE,
        (
            Line(
                f"1 - {slo.bad_share(BUDGET_WINDOW).name}{{{Q.scope}}} / {slo.budget:.4g}",
                "{{cluster}} {{application}}",
            ),
        ),
        Thresholds(0.5, 0.1, low_is_bad=True),
        Chart.STAT,
        runbook,
    )


_OBJECTIVES = Section(
    "Objectives",
    (
        _budget(AVAILABILITY, "ReftAvailabilityBurn"),
        _budget(LATENCY, "ReftModerationLatencyBurn"),
        _budget(FRESHNESS, "ReftScreeningFreshnessBurn"),
        Panel(
            "Versions",
            "Running versions; more than one only during a rollout.",
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
            "Responses per second with status 4xx or 5xx.",
            DisplayUnit.REQUESTS_PER_SECOND,
            (Line(Q.rate(c.API_REQUESTS, "code", code="[45].."), "{{code}}"),),
            Thresholds(0.1, 1),
            runbook="ReftAvailabilityBurn",
        ),
        Panel(
            "Request time",
            "Median, 95th and 99th percentile over all routes.",
            DisplayUnit.SECONDS,
            quantiles(c.API_SECONDS),
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
            "Requests in flight",
            "HTTP requests in flight, sum over gateways.",
            DisplayUnit.NUMBER,
            (Line(Q.gauge(c.API_IN_FLIGHT, how="sum"), "requests"),),
            Thresholds(200, 500),
            runbook="ReftFilterSheds",
        ),
        Panel(
            "Rate-limited requests",
            "Requests per second rejected by a rate limit or quota.",
            DisplayUnit.REQUESTS_PER_SECOND,
            (Line(zero_if_absent(Q.rate(c.RATE_LIMITED, "limit")), "{{limit}}"),),
            Thresholds(1, 10),
        ),
    ),
)

_SCOPE = f"{SCRAPED},{Q.scope}"


def _ray(
    title: str, description: str, unit: DisplayUnit, lines: tuple[Line, ...], thresholds: Thresholds = NO_THRESHOLDS
) -> Panel:
    return Panel(title, description, unit, lines, thresholds, runbook="ReftReplicaUnhealthy", needs="serve")


_RAY = Section(
    "Ray",
    (
        _ray(
            "Healthy replicas",
            "Replicas per deployment that pass their health check.",
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
            "Queued at the Serve routers",
            "Calls waiting for a replica, per deployment; growth means too few replicas.",
            DisplayUnit.NUMBER,
            (Line(f"sum by (deployment) (ray_serve_deployment_queued_queries{{{_SCOPE}}})", "{{deployment}}"),),
            Thresholds(100, 500),
        ),
        Panel(
            "CPU and memory",
            "CPU and memory utilisation per node.",
            DisplayUnit.SHARE,
            (
                Line(f"max by (instance) (ray_node_cpu_utilization{{{NODES}}}) / 100", "CPU {{instance}}"),
                Line(
                    f"max by (instance) (ray_node_mem_used{{{NODES}}})"
                    f" / max by (instance) (ray_node_mem_total{{{NODES}}})",
                    "memory {{instance}}",
                ),
            ),
            Thresholds(0.8, 0.95),
            needs="ray",
        ),
    ),
)

BOARD = Board("service", "Service health", "Service level objectives, API and Ray.", (_OBJECTIVES, _API, _RAY))
