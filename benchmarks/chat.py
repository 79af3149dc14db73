"""Speed of chat completions: one by one, in one continuous batch, and with several adapters in a batch.

    python benchmarks/chat.py [--quick] [--shape small|medium|8b] [--json FILE]
    python benchmarks/chat.py --base smollm2 --adapters 100 --rows 32 --tokens 16 --rounds 2

All contenders take turns in one run with the same replica, prompts and number of tokens; ratios are comparable between
machines, rates are not. With random weights no answer ends before its token limit.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from random_teacher import SHAPES, prompts, save_base

from reft_ray.api.chat_model import Target
from reft_ray.core.completion import Sampling
from reft_ray.core.conversation import chat
from reft_ray.hf.loading import load_base
from reft_ray.hf.lora import LoraSettings, attach, save_adapter
from reft_ray.serving.args import ChatArgs
from reft_ray.serving.student import StudentReplica

BASE = Target("base", "base", "base")


async def completed(student: StudentReplica, target: Target, prompt: str, sampling: Sampling) -> tuple[int, float]:
    """Tokens of one completion, and the seconds to its first piece."""
    started, first, tokens = time.perf_counter(), 0.0, 0
    async with aclosing(student.generate(target, chat(prompt), sampling)) as pieces:
        async for piece in pieces:
            first = first or time.perf_counter() - started
            tokens += piece.tokens
    return tokens, first


async def one_by_one(student: StudentReplica, asked: Sequence[tuple[Target, str]], sampling: Sampling) -> list[Any]:
    """One completion after another."""
    return [await completed(student, target, prompt, sampling) for target, prompt in asked]


async def together(student: StudentReplica, asked: Sequence[tuple[Target, str]], sampling: Sampling) -> list[Any]:
    """All completions at once."""
    return list(await asyncio.gather(*(completed(student, target, prompt, sampling) for target, prompt in asked)))


def resident_mb() -> int:
    """Memory of this process now."""
    return psutil.Process().memory_info().rss >> 20


def made_adapters(base: str, folder: Path, number: int) -> list[Target]:
    """Targets with random adapters on the base."""
    model = load_base(base).model
    targets = []
    for seed in range(number):
        name = f"a{seed}"
        model = attach(model, name, LoraSettings(rank=16), seed)
        for key, parameter in model.named_parameters():
            if f"lora_B.{name}." in key:
                torch.nn.init.normal_(parameter, std=0.02)
        save_adapter(model, name, folder / name, "base")
        targets.append(replace(BASE, name=name, adapter_uri=str(folder / name)))
    return targets


def measured(student: StudentReplica, adapters: list[Target], rows: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Tokens per second of every contender (median over rounds), and their ratios."""
    sampling = Sampling(tokens, temperature=1.0, seed=0)
    mixed = [adapters[index % len(adapters)] for index in range(rows)]
    contenders = {
        "base_one_by_one": (one_by_one, [BASE] * rows),
        "base_together": (together, [BASE] * rows),
        "one_adapter_together": (together, adapters[:1] * rows),
        "mixed_adapters_together": (together, mixed),
        "mixed_adapters_one_by_one": (one_by_one, mixed),
    }
    rates: dict[str, list[float]] = {name: [] for name in contenders}
    firsts: dict[str, list[float]] = {name: [] for name in contenders}
    # Load all adapters before measuring.
    asyncio.run(together(student, [(target, "warm up") for target in (BASE, *adapters)], Sampling(2)))
    for turn in range(rounds):
        texts = prompts(rows, seed=turn)
        for name, (run, targets) in contenders.items():
            started = time.perf_counter()
            done = asyncio.run(run(student, list(zip(targets, texts, strict=True)), sampling))
            rates[name].append(sum(count for count, _ in done) / (time.perf_counter() - started))
            firsts[name].append(statistics.median(first for _, first in done))
    rate = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "tokens_per_second": {name: round(value, 1) for name, value in rate.items()},
        "median_seconds_to_first_piece": {name: round(statistics.median(v), 3) for name, v in firsts.items()},
        "together_vs_one_by_one": round(rate["base_together"] / rate["base_one_by_one"], 2),
        "mixed_together_vs_one_by_one": round(rate["mixed_adapters_together"] / rate["mixed_adapters_one_by_one"], 2),
        "mixed_vs_one_adapter": round(rate["mixed_adapters_together"] / rate["one_adapter_together"], 2),
        "one_adapter_vs_base": round(rate["one_adapter_together"] / rate["base_together"], 2),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer and shorter completions")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small")
    parser.add_argument("--base", help="a model, instead of random weights of a shape")
    parser.add_argument("--adapters", type=int, default=4)
    parser.add_argument("--rows", type=int, help="completions at once")
    parser.add_argument("--tokens", type=int, help="of each completion")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    default = (8, 16, 3) if options.quick else (16, 64, 5)
    rows, tokens, rounds = (
        given or usual for given, usual in zip((options.rows, options.tokens, options.rounds), default, strict=True)
    )
    with tempfile.TemporaryDirectory() as scratch:
        base = options.base or str(Path(scratch) / "base")
        if not options.base:
            save_base(Path(base), options.shape)
        adapters = made_adapters(base, Path(scratch), options.adapters)
        waiting = max(64, options.adapters)
        student = StudentReplica(base, ChatArgs(max_rows=rows, max_adapters=options.adapters, max_waiting=waiting))
        before = resident_mb()
        try:
            report = measured(student, adapters, rows, tokens, rounds)
            report["memory_mb"] = {"before_adapters": before, "after": resident_mb()}
        finally:
            student.close()
        device = str(student.engine.base.device)
    report |= {"base": options.base or options.shape, "device": device, "threads": torch.get_num_threads()}
    report |= {"rows": rows, "tokens": tokens, "rounds": rounds, "adapters": options.adapters}
    text = json.dumps(report, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
