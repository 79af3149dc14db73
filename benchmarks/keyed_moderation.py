"""What a moderation of a service with keys costs apart from the model: key, rates, request and answer, without Ray.

    python benchmarks/keyed_moderation.py [--database URL] [--requests 300] [--clients 32]

The application runs as `uvicorn` serves it, with the word scorer. Processor time is that of the service's process: on a
busy machine the other figures contain waiting for it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from fixtures.service_process import started

BODY = {"input": "How do I bake bread?"}


def main() -> None:
    """Print a line for one client and one for many."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--database", help="an empty PostgreSQL database; default: SQLite")
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--clients", type=int, default=32)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as root,
        started(Path(root), options.database or f"sqlite:///{root}/state/jobs.db") as run,
    ):
        client, process = run.client("a"), psutil.Process(run.process.pid)

        def ask(client: httpx.Client, times: int) -> list[float]:
            seconds = []
            for _ in range(times):
                begun = time.perf_counter()
                client.post("/v1/moderations", json=BODY).raise_for_status()
                seconds.append(time.perf_counter() - begun)
            return seconds

        def processor() -> float:
            return sum(process.cpu_times()[:2])

        ask(client, 20)
        before = processor()
        p50 = statistics.median(ask(client, options.requests))
        each = (processor() - before) / options.requests
        print(f"1 client: p50 {p50 * 1e3:.1f} ms, of the processor {each * 1e3:.1f} ms a request", flush=True)
        clients = [httpx.Client(base_url=run.url, headers=client.headers, timeout=120) for _ in range(options.clients)]
        times = max(1, options.requests // options.clients)
        before, begun = processor(), time.perf_counter()
        with ThreadPoolExecutor(options.clients) as pool:
            made = sum(len(seconds) for seconds in pool.map(lambda one: ask(one, times), clients))
        rate, each = made / (time.perf_counter() - begun), (processor() - before) / made
        print(f"{options.clients} clients: {rate:.0f} a second, of the processor {each * 1e3:.1f} ms a request")


if __name__ == "__main__":
    main()
