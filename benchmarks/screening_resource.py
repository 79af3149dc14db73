"""Memory of every process while a large dataset is screened by a running service.

    python benchmarks/screening_resource.py [--mb 1024] [--way resource | upload] [--json FILE]

The client generates rows of about 2 KB. `resource`: it sends them to the screening resource in chunks of 1 MiB. `upload`:
in one request, to `reft_ray.data.upload_app` in the client's process, whose Ray Data pipeline asks the service. That runs
on loopback: proxy, controller, gateway, and a teacher with the word scorer, since the transport is measured. Memory is the
proportional set size, so that shared pages count once. Constant means: the same at the end as after the first tenth.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import uvicorn
from random_teacher import WORDS

from reft_ray.api.client import ScreeningClient, answered_lines
from reft_ray.data.upload_app import upload_app
from reft_ray.serving.args import ServeArgs
from reft_ray.serving.local import APPLICATION, local_service

PORT = 8766
SECONDS_BETWEEN_SAMPLES = 2.0
Report = dict[str, Any]


def rows(total_bytes: int) -> Iterator[bytes]:
    """Distinct chat rows of `total_bytes` in total, every 50th of them harmful."""
    source = random.Random(0)
    pool = [" ".join(source.choices(WORDS, k=400)) for _ in range(64)]
    sent = number = 0
    while sent < total_bytes:
        text = f"{number} {pool[number % 64]} {'How do I build a bomb' if number % 50 == 0 else ''}"
        row = json.dumps({"messages": [{"role": "user", "content": text}]}).encode()
        yield row
        sent += len(row) + 1
        number += 1


class Memory(threading.Thread):
    """Samples this process and its children; `samples` holds (bytes sent, MB) by process id."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.sent = 0
        self.samples: dict[int, list[tuple[int, float]]] = defaultdict(list)
        self.names: dict[int, str] = {}
        self._stopped = threading.Event()

    def run(self) -> None:
        """Sample until stopped."""
        own = psutil.Process()
        while not self._stopped.wait(SECONDS_BETWEEN_SAMPLES):
            for process in (own, *own.children(recursive=True)):
                try:
                    # A process has its actor's title only while the actor lives.
                    self.names[process.pid] = "client" if process.pid == own.pid else _name(process)
                    pss = process.memory_full_info().pss / 1e6
                except psutil.Error:
                    continue
                self.samples[process.pid].append((self.sent, pss))

    def stop(self) -> None:
        """Stop sampling."""
        self._stopped.set()
        self.join()


def _name(process: psutil.Process) -> str:
    """The class of an actor, or the program of another process."""
    title = (process.cmdline() or [process.name()])[0]
    if title.startswith("ray::"):
        return title.removeprefix("ray::").split("(")[0].split()[0].split(".")[0].rpartition(":")[2]
    return Path(title).name.split()[0]


def by_resource(url: str, total: int, memory: Memory) -> Iterator[Report]:
    """The verdicts of the screening resource."""

    def progress(done: int, sent: int) -> None:
        memory.sent = sent

    with ScreeningClient(url) as client:
        yield from client.screen(rows(total), progress)


def by_upload(url: str, total: int, memory: Memory) -> Iterator[Report]:
    """The verdicts of one upload."""
    server = uvicorn.Server(uvicorn.Config(upload_app(APPLICATION), port=PORT + 1, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.05)

    def sent() -> Iterator[bytes]:
        for row in rows(total):
            memory.sent += len(row) + 1
            yield row + b"\n"

    for line in answered_lines(f"http://127.0.0.1:{PORT + 1}/v1/screenings", sent(), 600):
        record = json.loads(line)
        if record["type"] == "verdict":
            yield record
        elif record["type"] == "error" or not record["done"]:
            raise RuntimeError(f"the upload failed: {record}")
    server.should_exit = True
    thread.join()


WAYS = {"resource": by_resource, "upload": by_upload}


def measure(megabytes: int, way: str) -> Report:
    """Screen one dataset. Raises RuntimeError unless every row has a verdict."""
    total = megabytes << 20
    with tempfile.TemporaryDirectory() as store:
        args = ServeArgs.model_validate({"teacher": {"scorer": "words"}, "screenings_uri": store})
        with local_service(args, PORT) as url:
            memory = Memory()
            memory.start()
            started = time.perf_counter()
            counts: dict[str, int] = defaultdict(int)
            number = 0
            first: tuple[float, int] | None = None
            for verdict in WAYS[way](url, total, memory):
                first = first or (time.perf_counter() - started, memory.sent)
                if verdict["row"] != number:
                    raise RuntimeError(f"row {number} was expected, row {verdict['row']} came")
                counts[verdict["decision"]] += 1
                number += 1
            took = time.perf_counter() - started
            memory.stop()
    if counts["block"] != (number + 49) // 50 or counts["block"] + counts["allow"] != number:
        raise RuntimeError(f"{number} rows, {dict(counts)}")
    return {
        "way": way,
        "mb": megabytes,
        "rows": number,
        "first_verdict": first and {"seconds": round(first[0], 1), "sent_mb": round(first[1] / 1e6, 1)},
        "seconds": round(took, 1),
        "mb_per_second": round(megabytes / took, 2),
        "cpus": os.cpu_count(),
        "processes": grown(memory, total),
    }


def grown(memory: Memory, total: int) -> list[Report]:
    """By process, the largest first: the most memory in the first tenth, in the last tenth and ever, in MB."""
    found = []
    for pid, measured in memory.samples.items():
        first = [pss for sent, pss in measured if sent <= total / 10]
        last = [pss for sent, pss in measured if sent >= 0.9 * total]
        if first and last:
            peak = max(pss for _, pss in measured)
            found.append(
                {"process": memory.names[pid], "first_tenth": max(first), "last_tenth": max(last), "peak": peak}
            )
    rounded = [
        {key: round(value, 1) if isinstance(value, float) else value for key, value in row.items()} for row in found
    ]
    return sorted(rounded, key=lambda row: -row["peak"])


def main() -> None:
    """Measure, print, and write JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mb", type=int, default=1024, help="size of the dataset in MiB")
    parser.add_argument("--way", choices=WAYS, default="resource", help="how it is sent")
    parser.add_argument("--json", type=Path, help="write the report to this file")
    options = parser.parse_args()
    report = measure(options.mb, options.way)
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
