"""A process that records every catalogue metric as the service would: in a Ray actor and behind its own `/metrics`.

Speaks one JSON document per line. At start: `{"targets": {job: "host:port"}}`. For each line read from stdin it records
one round and answers with the ledger of all rounds: `{job: [{"metric", "labels", "value"}, ...]}`, where the value is a
counter's total, a gauge's last value, or a histogram's number of observations. End of input stops it. Any other
process that speaks so, such as a real service under load, can stand in its place.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import ray
from ray import serve

from reft_ray.telemetry.catalog import METRICS
from reft_ray.telemetry.metric_types import Kind, Label, Labeller, Metric, Unit
from reft_ray.telemetry.ray_recorder import RayRecorder
from reft_ray.telemetry.recorder import MemoryRecorder, PrometheusRecorder, Recorder

OUTSIDE = {
    "teacher": ("rt-1", "rt-2"),
    "route": ("/v1/moderations", "/v1/files/{id}"),
    "code": ("200", "404", "503"),
    "suite": ("harmful-prompts", "benign-prompts"),
}


def label_sets(metric: Metric) -> Iterator[dict[str, str]]:
    """Every value of every label at least once, the other labels at their first value."""

    def values(label: Label) -> tuple[str, ...]:
        return label.values or OUTSIDE.get(label.name, ("a", "b"))

    first = {label.name: values(label)[0] for label in metric.labels}
    yield first
    for label in metric.labels:
        for value in values(label)[1:]:
            yield {**first, label.name: value}


def record_round(recorder: Recorder, number: int) -> None:
    """One round over the catalogue; amounts differ by series, so that no two can be mistaken for each other."""
    for metric in METRICS:
        for index, labels in enumerate(label_sets(metric)):
            if metric.kind is Kind.COUNTER:
                recorder.count(metric, (index + 1) * number, **labels)
            elif metric.kind is Kind.HISTOGRAM:
                for bound in metric.buckets:
                    recorder.observe(metric, bound * 0.99, **labels)
            else:
                value = {Unit.INFO: 1.0, Unit.RATIO: 0.5 / (index + 1)}.get(metric.unit, float(index + number))
                recorder.set(metric, value, **labels)


def ledger(memory: MemoryRecorder) -> list[dict[str, object]]:
    """What was recorded, as plain data."""
    lines: list[dict[str, object]] = []
    for metric in METRICS:
        # an info metric keeps its last series only
        for labels in list(label_sets(metric))[-1 if metric.unit is Unit.INFO else 0 :]:
            histogram = metric.kind is Kind.HISTOGRAM
            value = len(memory.observations(metric, **labels)) if histogram else memory.total(metric, **labels)
            lines.append({"metric": metric.name, "labels": labels, "value": value})
    return lines


@ray.remote(num_cpus=0)
class Recording:
    """A worker process that records through Ray."""

    def __init__(self) -> None:
        self.recorder = RayRecorder(Labeller("filter", projects=True))
        self.memory = MemoryRecorder()

    def record(self, number: int) -> list[dict[str, object]]:
        record_round(self.recorder, number)
        record_round(self.memory, number)
        return ledger(self.memory)


@serve.deployment(name="teacher", ray_actor_options={"num_cpus": 0})
class Answering:
    """A deployment, so that Serve has metrics of its own."""

    def __call__(self) -> str:
        return "ok"


def expose(recorder: PrometheusRecorder) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = recorder.exposition()
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    return server


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def say(document: object) -> None:
    os.write(_OUT, json.dumps(document).encode() + b"\n")


def main() -> None:
    port = free_port()
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, _metrics_export_port=port, logging_level=logging.ERROR
    )
    handle = serve.run(Answering.bind(), name="filter", route_prefix=None, logging_config={"log_level": "ERROR"})
    handle.remote().result()
    recording = Recording.remote()
    gateway, memory = PrometheusRecorder(Labeller("gateway", projects=True)), MemoryRecorder()
    server = expose(gateway)
    say({"targets": {"ray": f"127.0.0.1:{port}", "gateway": f"127.0.0.1:{server.server_port}"}})
    for number, _ in enumerate(sys.stdin, start=1):
        record_round(gateway, number)
        record_round(memory, number)
        say({"ray": ray.get(recording.record.remote(number)), "gateway": ledger(memory)})
        handle.remote().result()
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    # Ray writes to stdout as it likes; the protocol keeps the real one for itself.
    _OUT = os.dup(1)
    os.dup2(2, 1)
    main()
