"""Harmful score and finetune accuracy of a supervised loop on poisoned rows: bare, and screened and guided.

    python benchmarks/training_api_safety.py [--rows DIR] [--ratios 0.1 0.3] [--seeds 0] [--json FILE]

The loop is the cookbook's supervised recipe (`chat_sl`): shuffled batches of dialogues, a cross entropy on the answers, AdamW
with beta2 0.95 whose rate falls linearly to 0. The worker runs the requests that the client would send, from the records and
without HTTP. `bare` judges nothing and has no guidance. DIR has rows as `experiments.real_rows` describes them; without it
they are synthetic. The base is SmolLM2-135M-Instruct with the packaged teacher and its alignment rows (`--base`, `--teacher`
for others). Every cell is a model of its own; soft labels are made once. 95 % intervals are in brackets.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training_api import Bench

from reft_ray.evaluation.suite import Evaluation, Suite, TaskTest, evaluate
from reft_ray.experiments.bench.rows import BenchRows, builtin_rows, folder_rows, sample_rows
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.generate import Responder
from reft_ray.hf.loading import load_tokenizer
from reft_ray.pipeline.builtin import local_base
from reft_ray.pipeline.config import BaseArgs
from reft_ray.pipeline.model_context import ModelContext
from reft_ray.testbed.synthetic import Sizes

WAYS = ("bare", "screened + guided 1:4", "screened + guided 1:1")


def context_of(options: argparse.Namespace, screened: bool) -> ModelContext:
    """The base model with its teacher's alignment rows."""
    args = local_base(options.teacher, options.base).model_dump(mode="json")
    args["screening"]["findings"] = screened
    return ModelContext(BaseArgs.of(args))


def batches_of(count: int, options: argparse.Namespace, seed: int) -> list[list[int]]:
    """The places of rows in each step, in an order of its own in every epoch."""
    shuffled = random.Random(seed)
    found = []
    for _ in range(options.epochs):
        order = shuffled.sample(range(count), count)
        found += [order[start : start + options.batch] for start in range(0, count, options.batch)]
    return found


def train(bench: Bench, words: ChatFormat, rows: BenchRows, ratio: float, seed: int, options: Any) -> str:
    """Train a new model on a user's rows; its id."""
    given = [words.encode(row) for row in rows.user(options.task, options.n, ratio, seed)]
    encoded = [row for row in given if len(row) <= options.max_tokens and row.trained_tokens]
    number = round(1000 * ratio) * 100 + seed
    model, steps = bench.model(number, options.rank), batches_of(len(encoded), options, seed)
    for step, places in enumerate(steps):
        rate = options.learning_rate * (1 - step / len(steps))
        bench.step(model, f"proj_{number}", 1 + 2 * step, [encoded[place] for place in places], rate)
        bench.drain()
    return model


def measure(bench: Bench, model: str, suite: Suite, options: argparse.Namespace) -> Evaluation:
    """The measures of a model that was trained."""
    engine = bench.worker.engine
    slot, bank = engine.slot(bench.queue.store.model(model, None)), engine.parts.bank
    with bank.using(slot):
        return evaluate(Responder(bank.model, bank.chat, options.answer_tokens), suite)


def shown(found: Evaluation, name: str) -> str:
    """A measure in percent with its interval."""
    measure = found[name]
    return f"{measure.value:.1f} ({measure.low:.1f}-{measure.high:.1f})"


def main() -> None:
    """Train, measure, print a row of the table for each cell, and write JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path)
    parser.add_argument("--base", default=None)
    parser.add_argument("--teacher", default="builtin")
    parser.add_argument("--task", default=None)
    parser.add_argument("--ratios", type=float, nargs="+", default=[0.1, 0.3])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS[:2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--n", type=int, default=100, help="Rows of a user.")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--max-tokens", type=int, default=256, help="Longer rows are left out.")
    parser.add_argument("--alignment", type=int, default=256, help="Alignment rows with soft labels.")
    parser.add_argument("--prompts", type=int, default=40, help="Of each kind that is measured.")
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = folder_rows(options.rows) if options.rows else builtin_rows(Sizes())
    options.task = options.task or next(iter(rows.tasks))
    test = rows.task(options.task)
    suite = Suite(
        [row.prompt for row in sample_rows(rows.hs_prompts, options.prompts)],
        [row.prompt for row in sample_rows(rows.over_refusal_prompts, options.prompts)],
        {options.task: TaskTest(sample_rows(test.test, options.prompts), test.match)},
    )
    options.answer_tokens = max(options.answer_tokens, test.answer_tokens)
    cells: list[dict[str, Any]] = []
    print(f"{options.n} rows of {options.task}, {options.epochs} epochs, batches of {options.batch}; in percent\n")
    print("| poison | way | seed | HS | FA | over-refusal | data withheld |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as scratch:
        for way in options.ways:
            folder = Path(scratch) / way.partition(" ")[0]
            context = context_of(options, way != "bare")
            words = ChatFormat(load_tokenizer(context.base))
            bench = Bench(folder, context, way, Path(scratch) / "shared", options.alignment)
            for ratio in options.ratios:
                for seed in options.seeds:
                    model = train(bench, words, rows, ratio, seed, options)
                    found = measure(bench, model, suite, options)
                    account = bench.queue.store.model(model, None).account
                    names = ("harmful_score", f"finetune_accuracy/{options.task}", "over_refusal")
                    withheld = sum(account["withheld"].values())
                    figures = " | ".join(shown(found, name) for name in names)
                    print(f"| {ratio:.0%} | {way} | {seed} | {figures} | {withheld} of {account['data']} |", flush=True)
                    cell = {"ratio": ratio, "way": way, "seed": seed, "account": account, **found.as_dict()}
                    cells.append(cell)
                    bench.queue.store.set_state(model, "unloaded")
                    bench.worker.engine.forget(model)
            bench.database.close()
    if options.json:
        options.json.write_text(json.dumps({"options": _plain(options), "cells": cells}, indent=2))


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path | Sequence) else value for name, value in vars(options).items()}


if __name__ == "__main__":
    main()
