"""Speed of the console: pages over a queue of 100,000 rows, decisions with the keys, and ten reviewers at once.

    python benchmarks/review_console.py [--postgres URL] [--rows 100000] [--people 10] [--decisions 500]

Prints one JSON line per measurement; `--postgres` names an empty database on this machine. `processor_ms` is the mean time
that client, service and the database's connections computed: on a busy machine the other figures contain waiting for it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import psutil
from sqlalchemy import text

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from fixtures.http import _serving
from fixtures.review_service import ReviewService
from fixtures.reviews import filed

from reft_ray.jobs.job import Job, JobSpec, Options
from reft_ray.jobs.review import Action, Reviewer
from reft_ray.jobs.review_queue import Filter

REPEATS = 40


def main() -> None:
    """Measure what the options ask for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--postgres", default=None)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--people", type=int, default=10)
    parser.add_argument("--decisions", type=int, default=500)
    parser.add_argument("--keys", type=int, default=50, help="decisions with the keys in Chromium; 0: none")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        service = ReviewService(Path(scratch), options.postgres)
        kind = "postgresql" if options.postgres else "sqlite"
        pages(service, kind, options.rows)
        people(service, kind, options.people, options.decisions)
        if options.keys:
            keys(service, kind, options.keys)
        service.close()


def waiting(service: ReviewService, rows: int) -> Job:
    """A job with this many rows in the queue; their texts are one line of a small file."""
    principal = service.stores.tenants.authenticate(service.key("owner"))
    if principal is None:
        raise RuntimeError("the owner's key is unknown")
    line = json.dumps({"messages": [{"role": "user", "content": "Which knife is best for bread?"}]}).encode()
    file = service.stores.files.create(principal.project_id, "rows.jsonl", "fine-tune", [line + b"\n"])
    spec = JobSpec("tiny", file.id, 1, options=Options(policy="review"))
    job = service.stores.jobs.create(principal.organization_id, principal.project_id, spec, {})
    values = {"text_file": file.id, "text_bytes": len(line), "decision": "review", "part": "messages[0].user"}
    service.stores.reviews.file(job, (filed(n, score=0.3 + n / 1e6, **values) for n in range(1, rows + 1)))
    return job


def pages(service: ReviewService, kind: str, rows: int) -> None:
    """Seconds to render each page, as a client on loopback sees them."""
    job = waiting(service, rows)
    row = service.stores.reviews.list(Filter(job=job.id)).items[0]
    paths = (
        "",
        "/queue",
        f"/queue?job={job.id}",
        "/queue?order=age",
        f"/reviews/{row.id}",
        f"/jobs/{job.id}",
        "/audit",
    )
    with _serving(service.app) as url, httpx.Client(timeout=60) as client:
        # Not a base address: httpx would add a slash to an empty path.
        console = f"{url}/console"
        client.post(f"{console}/sign-in", data={"key": service.key("operator")})
        for path in paths:
            taken, before = [], processor_seconds(service)
            for _ in range(REPEATS):
                started = time.perf_counter()
                client.get(f"{console}{path}").raise_for_status()
                taken.append(time.perf_counter() - started)
            processor_ms = (processor_seconds(service) - before) / REPEATS * 1e3
            p95 = sorted(taken)[int(0.95 * len(taken)) - 1]
            name = path.replace(job.id, "JOB").replace(row.id, "ROW") or "/"
            median_ms = statistics.median(taken) * 1e3
            _print(kind, f"page {name}", rows=rows, median_ms=median_ms, p95_ms=p95 * 1e3, processor_ms=processor_ms)


def processor_seconds(service: ReviewService) -> float:
    """Processor time of this process and of the database's connections, without its parallel workers."""
    database, own = service.stores.database, time.process_time()
    if database.is_sqlite:
        return own
    with database.read() as connection:
        query = text("SELECT pid FROM pg_stat_activity WHERE datname = current_database()")
        pids = connection.execute(query).scalars().all()
    return own + sum(sum(psutil.Process(pid).cpu_times()[:2]) for pid in pids)


def people(service: ReviewService, kind: str, number: int, decisions: int) -> None:
    """Decisions of several people at once: how many were made, how many rows twice, and their rate."""
    job = waiting(service, number * decisions)
    queue, made = service.stores.reviews, [0] * number
    wanted = Filter(job=job.id)

    def work(index: int) -> None:
        me = Reviewer(f"person-{index}", {"type": "session", "session": {"user": str(index)}})
        for _ in range(decisions):
            row = queue.claim(me, wanted)
            if row is not None:
                made[index] += len(queue.decide([row.id], Action.REJECT, "harmful_request", "", me))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(number)]
    before, started = service.stores.audit.verify().entries, time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    taken = time.perf_counter() - started
    decided = len(queue.decided(job.id))
    verification = service.stores.audit.verify()
    _print(
        kind,
        f"{number} people x {decisions} decisions",
        made=sum(made),
        decided=decided,
        twice=sum(made) - decided,
        audit_entries=verification.entries - before,
        fault=verification.fault,
        decisions_per_second=sum(made) / taken,
    )


def keys(service: ReviewService, kind: str, number: int) -> None:
    """Seconds per decision with the key R in Chromium, from the press to the next row."""
    from console.browser_kit import Person, chromium

    with _serving(service.app) as url, chromium() as browser:
        curator = Person(browser, url, service.key("curator"))
        curator.go("/queue")
        curator.key("n")
        taken = []
        for _ in range(number):
            started = time.perf_counter()
            curator.key("r")
            taken.append(time.perf_counter() - started)
        curator.context.close()
    _print(kind, "decision by key", decisions=number, median_ms=statistics.median(taken) * 1e3)


def _print(database: str, what: str, **values: object) -> None:
    shown = {name: round(value, 1) if isinstance(value, float) else value for name, value in values.items()}
    print(json.dumps({"database": database, "what": what, **shown}), flush=True)


if __name__ == "__main__":
    main()
