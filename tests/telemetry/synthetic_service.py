"""A process that records every catalogue metric in a Ray actor and on its own `/metrics`.

Protocol: one JSON document per line. It first writes `{"targets": {job: "host:port"}}`. For each line on stdin it
records one round and writes the ledger of all rounds: `{job: [{"metric", "labels", "value"}, ...]}`, where the value is
a counter's total, a gauge's last value, or a histogram's number of observations. It exits at the end of input.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import ray
from ray import serve

from reft_ray.telemetry.catalog import METRICS
from reft_ray.telemetry.metric_types import Kind, Label, Labeller, Metric, Unit
from reft_ray.telemetry.ray_recorder import RayRecorder
from reft_ray.telemetry.recorder import MemoryRecorder, PrometheusRecorder, Recorder

UNBOUNDED_VALUES = {
    "teacher": ("rt-1", "rt-2"),
    "route": ("/v1/moderations", "/v1/files/{id}"),
    "code": ("200", "404", "503"),
    "suite": ("harmful-prompts", "benign-prompts"),
}


def label_sets(metric: Metric) -> Iterator[dict[str, str]]:
    """Label sets that contain every value of every label at least once."""

    def values(label: Label) -> tuple[str, ...]:
        return label.values or UNBOUNDED_VALUES.get(label.name, ("a", "b"))

    first = {label.name: values(label)[0] for label in metric.labels}
    yield first
    for label in metric.labels:
        for value in values(label)[1:]:
            yield {**first, label.name: value}


def record_round(recorder: Recorder, number: int) -> None:
    """Record every metric; the amounts differ between series, so that mixed-up series are found."""
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
    """The recorded values as plain data."""
    lines: list[dict[str, object]] = []
    for metric in METRICS:
        # An info metric keeps only its last series.
        for labels in list(label_sets(metric))[-1 if metric.unit is Unit.INFO else 0 :]:
            histogram = metric.kind is Kind.HISTOGRAM
            value = len(memory.observations(metric, **labels)) if histogram else memory.total(metric, **labels)
            lines.append({"metric": metric.name, "labels": labels, "value": value})
    return lines


@ray.remote(num_cpus=0)
class RecordingActor:
    """A worker process that records with Ray."""

    def __init__(self) -> None:
        self.recorder = RayRecorder(Labeller("filter", projects=True))
        self.memory = MemoryRecorder()

    def record(self, number: int) -> list[dict[str, object]]:
        record_round(self.recorder, number)
        record_round(self.memory, number)
        return ledger(self.memory)


@serve.deployment(name="Teacher", ray_actor_options={"num_cpus": 0})
class Deployment:
    """A deployment behind a proxy, so that Serve exports the metrics of both."""

    def __call__(self, request: object) -> str:
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


def call(proxy: int) -> None:
    """One request through Serve's proxy, which counts it."""
    with urllib.request.urlopen(f"http://127.0.0.1:{proxy}/", timeout=30) as answer:
        assert answer.read() == b"ok"


def emit(document: object) -> None:
    os.write(_OUT, json.dumps(document).encode() + b"\n")


def main() -> None:
    port = free_port()
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, _metrics_export_port=port, logging_level=logging.ERROR
    )
    proxy = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": proxy})
    serve.run(Deployment.bind(), name="filter", logging_config={"log_level": "ERROR"})
    call(proxy)
    recording = RecordingActor.remote()
    gateway, memory = PrometheusRecorder(Labeller("gateway", projects=True)), MemoryRecorder()
    server = expose(gateway)
    emit({"targets": {"reft-ray": f"127.0.0.1:{port}", "reft-gateway": f"127.0.0.1:{server.server_port}"}})
    for number, _ in enumerate(sys.stdin, start=1):
        record_round(gateway, number)
        record_round(memory, number)
        emit({"reft-ray": ray.get(recording.record.remote(number)), "reft-gateway": ledger(memory)})
        call(proxy)
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    # Ray writes to stdout; keep the original descriptor for the protocol.
    _OUT = os.dup(1)
    os.dup2(2, 1)
    main()
