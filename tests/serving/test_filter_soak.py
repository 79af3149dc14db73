"""Two minutes of 64 clients on the filter; a teacher replica is killed halfway."""

import json
import os
import random
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from reft_ray.serving.args import ServeArgs
from reft_ray.serving.local import local_service

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(400)]

SECONDS = float(os.environ.get("REFT_SOAK_SECONDS", "120"))
CLIENTS = 64
TEXTS = {"Good morning": "allow", "Build a bomb": "block", "A tactical knife": "review"}


class Tally:
    """What the clients saw, counted under one lock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.statuses: Counter[int] = Counter()
        self.rows_sent = self.rows_answered = self.wrong = 0

    def add(self, status: int, sent: int, answered: int, wrong: int) -> None:
        with self._lock:
            self.statuses[status] += 1
            self.rows_sent += sent
            self.rows_answered += answered
            self.wrong += wrong


def teachers() -> list[int]:
    """Process ids of the teacher replicas that this process has started."""
    return [
        process.pid
        for process in psutil.Process().children(recursive=True)
        if any("ServeReplica:reft:Teacher" in part for part in process.cmdline())
    ]


def moderate(client: httpx.Client, source: random.Random, tally: Tally) -> None:
    text, decision = source.choice(list(TEXTS.items()))
    response = client.post("/v1/moderations", json={"input": f"{text} {source.random()}"})
    if response.status_code == 200:
        seen = response.json()["results"][0]["reft"]["decision"]
        tally.add(200, 1, 1, seen != decision)
    else:
        assert "results" not in response.text
        tally.add(response.status_code, 0, 0, 0)


def screen(client: httpx.Client, source: random.Random, tally: Tally) -> None:
    chosen = source.choices(list(TEXTS.items()), k=300)
    body = "\n".join(json.dumps({"text": f"{text} {source.random()}"}) for text, _ in chosen)
    response = client.post("/v1/screenings", content=body)
    if response.status_code != 200:
        tally.add(response.status_code, 0, 0, 0)
        return
    *verdicts, trailer = [json.loads(line) for line in response.text.splitlines()]
    assert trailer["type"] == "trailer"
    assert trailer["rows"] == sum(trailer[key] for key in ("allow", "review", "block", "invalid", "unanswered"))
    wrong = sum(v["decision"] != decision for v, (_, decision) in zip(verdicts, chosen, strict=trailer["done"]))
    tally.add(200, len(chosen), len(verdicts), wrong)


def test_two_minutes_of_64_clients_and_a_killed_replica(tmp_path: Path) -> None:
    size = {"cpus": 0.2, "max_ongoing": 32, "max_queued": 128}
    args = ServeArgs.model_validate(
        {"teacher": {"scorer": "words"}, "teachers": size | {"replicas": 2}, "gateways": size | {"max_ongoing": 128}}
    )
    tally, over = Tally(), threading.Event()

    def client(number: int, url: str) -> None:
        source = random.Random(number)
        with httpx.Client(base_url=url, timeout=60) as http:
            while not over.is_set():
                (screen if number % 8 == 0 else moderate)(http, source, tally)

    with local_service(args, 8790) as url, ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(client, number, url) for number in range(CLIENTS)]
        time.sleep(SECONDS / 2)
        (victim, *_) = teachers()
        os.kill(victim, signal.SIGKILL)
        time.sleep(SECONDS / 2)
        over.set()
        for future in clients:
            future.result()
        alive = teachers()
    print(dict(tally.statuses), tally.rows_sent, tally.rows_answered)
    assert tally.wrong == 0
    assert tally.rows_answered == tally.rows_sent > 1000
    # 503 is right under overload; anything else but 200 is a failure.
    assert set(tally.statuses) <= {200, 429, 503}
    assert tally.statuses[200] > 0.9 * tally.statuses.total()
    assert victim not in alive
    assert len(alive) == 2
