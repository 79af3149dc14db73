"""What `/v1/moderations` adds to the model, through Serve's own proxy and through HAProxy, in turns in one run.

    python benchmarks/moderation_path.py [--rounds 2] [--requests 200] [--clients 32] [--json FILE]

Each turn starts a cluster with one teacher (random weights, `--shape`) and one gateway; texts are new in each. HAProxy
listens on every interface, so every turn runs in a network namespace that has loopback alone, which takes root.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WAYS = {"proxy": "0", "HAProxy": "1"}
ALONE = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--", "sh", "-c", 'ip link set lo up && exec "$@"', "-"]


def turn(teacher: Path, seed: int, count: int, clients: int) -> dict[str, Any]:
    """Overhead with one client and rate with many, of one cluster."""
    import httpx
    from filter import PORT, requests, seconds, service_args, summary
    from random_teacher import prompts

    from reft_ray.hf.ref_teacher import RefTeacher
    from reft_ray.serving.local import local_service

    scorer = RefTeacher.load(teacher).scorer()
    scorer.score(prompts(32, seed=99))
    with local_service(service_args(teacher), PORT) as url, httpx.Client(base_url=url, timeout=600) as client:
        requests(client, prompts(50, seed=98), 1)
        texts = prompts(count, seed=seed)
        single = requests(client, texts, 1)
        own = [seconds(lambda: scorer.score([text])) for text in texts]  # noqa: B023 - called at once
        requests(client, prompts(clients, seed=97), clients)
        together = requests(client, prompts(20 * clients, seed=seed + 1), clients)
    one, many = summary(single, own), summary(together, own)
    overhead = round(one["p50_ms"] - one["model_p50_ms"], 2)
    return {"overhead_p50_ms": overhead, "one_client": one, "many_clients": many}


def main() -> None:
    """Measure, print, and write JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--shape", default="small", help="the model's shape")
    parser.add_argument("--json", type=Path, help="write the report to this file")
    parser.add_argument("--turn", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.turn:
        print(json.dumps(turn(options.turn, options.seed, options.requests, options.clients)))
        return
    from random_teacher import save_random_teacher

    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as scratch:
        teacher = save_random_teacher(Path(scratch), options.shape)
        for number in range(options.rounds):
            for way, enabled in WAYS.items():
                command = [*ALONE, sys.executable, __file__, "--turn", str(teacher.folder), "--seed", str(10 * number)]
                command += ["--requests", str(options.requests), "--clients", str(options.clients)]
                environment = os.environ | {"RAY_SERVE_ENABLE_HA_PROXY": enabled, "RAY_TMPDIR": scratch}
                done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
                found[way].append(json.loads(done.stdout.splitlines()[-1]))
                print(way, json.dumps(found[way][-1]), flush=True)
    report = {
        way: {
            "overhead_p50_ms": statistics.median(turn["overhead_p50_ms"] for turn in turns),
            "rows_per_second": statistics.median(turn["many_clients"]["rows_per_second"] for turn in turns),
        }
        for way, turns in found.items()
    }
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps({"turns": found, "medians": report}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
