"""The Chat dashboard: what users of a language model watch first, whichever engine answers."""

from __future__ import annotations

from reft_ray.telemetry import catalog as c
from reft_ray.telemetry.panel import DASHBOARD as Q
from reft_ray.telemetry.panel import (
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

_LATENCY = Section(
    "Latency",
    (
        Panel(
            "Time to first token, p95",
            "95th percentile from the request to its first token, queueing included.",
            DisplayUnit.SECONDS,
            (Line(Q.quantile(0.95, c.CHAT_FIRST_TOKEN_SECONDS)),),
            Thresholds(1, 5),
            Chart.STAT,
        ),
        Panel(
            "Inter-token latency, p95",
            "95th percentile over completions of their mean time between tokens.",
            DisplayUnit.SECONDS,
            (Line(Q.quantile(0.95, c.CHAT_TOKEN_SECONDS)),),
            Thresholds(0.1, 0.2),
            Chart.STAT,
        ),
        Panel(
            "Completions in progress",
            "Requests in progress, sum over gateways.",
            DisplayUnit.NUMBER,
            (Line(Q.gauge(c.CHAT_RUNNING, how="sum")),),
            chart=Chart.STAT,
        ),
        Panel(
            "Waiting for a place",
            "Completions that wait for a place in a student's batch, sum over replicas; endpoints queue on their own.",
            DisplayUnit.NUMBER,
            (Line(Q.gauge(c.CHAT_WAITING, how="sum")),),
            Thresholds(32, 128),
            Chart.STAT,
        ),
        Panel(
            "Time to first token",
            "Median, 95th and 99th percentile, of base models and of finetuned ones.",
            DisplayUnit.SECONDS,
            quantiles(c.CHAT_FIRST_TOKEN_SECONDS, "model"),
        ),
        Panel(
            "Inter-token latency",
            "Median, 95th and 99th percentile over completions of their mean time between tokens.",
            DisplayUnit.SECONDS,
            quantiles(c.CHAT_TOKEN_SECONDS, "model"),
        ),
    ),
)

_WORK = Section(
    "Work",
    (
        Panel(
            "Chat tokens",
            "Tokens per second of conversations and of completions.",
            DisplayUnit.OPERATIONS_PER_SECOND,
            (Line(Q.rate(c.CHAT_TOKENS, "model", "kind"), "{{model}} {{kind}}"),),
        ),
        Panel(
            "Completions by outcome",
            "Completions per second: completed, overloaded (503), failed, or cancelled by the client.",
            DisplayUnit.REQUESTS_PER_SECOND,
            (Line(zero_if_absent(Q.rate(c.CHAT_REQUESTS, "outcome")), "{{outcome}}"),),
        ),
        Panel(
            "Adapters",
            "Adapters on the disks of the student replicas.",
            DisplayUnit.NUMBER,
            (Line(Q.gauge(c.CHAT_ADAPTERS, how="sum"), "adapters"),),
        ),
        Panel(
            "Adapter hits",
            "Fraction of the requests for a finetuned model whose replica had its adapter.",
            DisplayUnit.SHARE,
            (Line(Q.share(c.CHAT_ADAPTER_LOOKUPS, result="hit")),),
        ),
    ),
)

BOARD = Board("chat", "Chat", "Latency, tokens, queue and adapters of chat completions.", (_LATENCY, _WORK))
