"""Seconds of a training step on short chat rows with a common system prompt, on one CPU thread.

    python benchmarks/short_rows.py [--rows 9] [--shared 32] [--own 21] [--rounds 5] [--json FILE]

The model has random weights in the shape of SmolLM2-135M; its upper half has a LoRA adapter of rank 8, as the students of
the quickstart. Padded and packed rows, float32 and bfloat16 take turns in every round; packed rows share their prompt.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import torch
from gpu_models import SHAPES, build

from reft_ray.core.batch import TokenizedExample, micro_batches
from reft_ray.core.guided import guided_step
from reft_ray.hf.forward import ModelForward, recompute_above
from reft_ray.hf.lora import LoraSettings, attach
from reft_ray.hf.training import Speed, make_ready

_SHAPE = "135m"
_MICRO_BATCH = 8192
_ANSWER = 10


def chat_rows(count: int, shared: int, own: int) -> list[TokenizedExample]:
    """Rows of `shared` common tokens and `own` others, the last of them learned."""
    source = random.Random(0)
    prefix, *rest = (
        [source.randrange(SHAPES[_SHAPE][5]) for _ in range(length)] for length in (shared, *[own] * count)
    )
    prompt = shared + own - _ANSWER
    mask = [False] * prompt + [True] * _ANSWER
    return [TokenizedExample(prefix + tokens, mask, prompt - 1, index=i) for i, tokens in enumerate(rest)]


def main() -> None:
    """Measure, print a table, and write JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 9), ("shared", 32), ("own", 21), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = chat_rows(options.rows, options.shared, options.own)
    students = {}
    for dtype in (torch.float32, torch.bfloat16):
        for packed in (False, True):
            model = attach(build(_SHAPE, torch.device("cpu"), dtype), "student", LoraSettings(rank=8, first_layer=16))
            recompute_above(model, _MICRO_BATCH)
            reads_packed = make_ready(model, speed=Speed(packed))
            batches = micro_batches(rows, _MICRO_BATCH, 0, "cpu", reads_packed)
            students[f"{dtype}".removeprefix("torch."), "packed" if packed else "padded"] = ModelForward(model), batches
    seconds: dict[tuple[str, str], list[float]] = {way: [] for way in students}
    for turn in range(options.rounds + 1):
        for way, (student, batches) in students.items():
            started = time.perf_counter()
            guided_step(student, batches)
            # The first turn warms up.
            seconds[way] += [time.perf_counter() - started] if turn else []
    print(
        f"| {options.rows} rows, {options.shared} shared and {options.own} own tokens each | seconds | tokens computed |"
    )
    print("|---|---|---|")
    for way, found in seconds.items():
        tokens = sum(batch.ids_BT.numel() for batch in students[way][1])
        print(f"| {', '.join(way)} | {statistics.median(found):.2f} ({min(found):.2f}-{max(found):.2f}) | {tokens} |")
    if options.json:
        found = [{"way": way, "seconds": times} for way, times in seconds.items()]
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
