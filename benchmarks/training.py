"""Seconds and memory of a training step on CPU, before and after losses in parts and packed rows, side by side.

    python benchmarks/training.py [--shape 135m] [--tokens 1024] [--rounds 3] [--json FILE]

The model has random weights in the shape of SmolLM2-135M and a LoRA adapter of rank 16; a step has `--tokens` tokens of
user rows of very different lengths and, where it is guided, a quarter as many of alignment rows with cached soft labels.
Each way runs in a process of its own, which takes two steps; the ways take turns in every round. Seconds are those of the
processor for one step, which other work on the machine hardly changes, and the memory is what the process needed at most
beyond the loaded model.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from gpu import training
from gpu_models import SHAPES, Setting, Sizes, build

WAYS = {
    "whole logits, padded": Setting(packed=False, whole_logits=True),
    "losses in parts, padded": Setting(packed=False),
    "whole logits, packed": Setting(whole_logits=True),
    "losses in parts, packed": Setting(),
}
SHARES = {"sft": 0.0, "guided 1:4": 0.25}


def one(shape: str, way: str, kind: str, tokens: int) -> dict[str, float]:
    """Two steps in this process."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))
    device = torch.device("cpu")
    model = build(shape, device, torch.float32)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sizes = Sizes((shape,), shape, tokens, tokens, 1, 0, 0, 0, 0)
    started = time.process_time()
    training(model, shape, sizes, WAYS[way], SHARES[kind], "cached", 1.0)
    seconds = (time.process_time() - started) / 2
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "tokens/s": tokens * (1 + SHARES[kind]) / seconds, "MB": (peak - before) / 1024}


def main() -> None:
    """Measure, print a table, and write JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="135m", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of user rows in a step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    pairs = [(kind, way) for kind in SHARES for way in WAYS]
    runs: dict[tuple[str, str], list[dict[str, float]]] = {pair: [] for pair in pairs}
    # A fork has loaded the packages already; each child runs one way and ends.
    with multiprocessing.get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        for _ in range(options.rounds):
            for kind, way in pairs:
                runs[kind, way].append(pool.apply(one, (options.shape, way, kind, options.tokens)))
    table: list[dict[str, Any]] = []
    print(f"| {options.shape}, {options.tokens} tokens a step | CPU seconds a step | tokens/s | MB |")
    print("|---|---|---|---|")
    for (kind, way), found in runs.items():
        seconds = sorted(run["seconds"] for run in found)
        rate, memory = (statistics.median(run[name] for run in found) for name in ("tokens/s", "MB"))
        table.append({"kind": kind, "way": way, "runs": found})
        print(f"| {kind}, {way} | {seconds[0]:.2f}-{seconds[-1]:.2f} | {rate:.0f} | {memory:,.0f} |")
    if options.json:
        options.json.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
