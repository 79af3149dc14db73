"""`reft-ray eval`: harmful score, over-refusal and task accuracy of a base model or a student."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reft_ray.cli.common import JsonOption, print_json, user_errors


def evaluate(
    base: Annotated[str, typer.Option(help="Base model: a directory or a hub id.")],
    adapter: Annotated[Path | None, typer.Option(help="Finetuned adapter; default: the base model itself.")] = None,
    harmful: Annotated[Path | None, typer.Option(help="Harmful prompts, JSONL: harmful score.")] = None,
    harmless: Annotated[Path | None, typer.Option(help="Harmless prompts, JSONL: over-refusal.")] = None,
    task: Annotated[Path | None, typer.Option(help="Answered test rows, JSONL of chat messages: accuracy.")] = None,
    match: Annotated[str, typer.Option(help="How task answers are compared: label, number or exact.")] = "label",
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 64,
    as_json: JsonOption = False,
) -> None:
    """Evaluate a model with the refusal matcher as judge; all figures with 95 % intervals."""
    with user_errors():
        from reft_ray.core.conversation import Label
        from reft_ray.core.errors import UsageError
        from reft_ray.evaluation.suite import Suite, TaskTest
        from reft_ray.evaluation.suite import evaluate as run
        from reft_ray.evaluation.task_accuracy import Match
        from reft_ray.finetuning.prompts import read_labelled
        from reft_ray.hf.generate import load_responder

        if match not in set(Match):
            raise UsageError(f"--match {match}: one of {', '.join(Match)}")
        if not (harmful or harmless or task):
            raise UsageError("name at least one of --harmful, --harmless and --task")
        suite = Suite(
            harmful=[row.prompt for row in read_labelled(harmful, Label.HARMFUL)] if harmful else (),
            harmless=[row.prompt for row in read_labelled(harmless, Label.HARMLESS)] if harmless else (),
            tasks={"task": TaskTest(read_labelled(task, Label.HARMLESS), Match(match))} if task else {},
        )
        found = run(load_responder(base, adapter, max_new_tokens), suite).as_dict()
        if as_json:
            print_json(found)
            return
        for name, measure in found["measures"].items():
            low, high = measure["interval"]
            typer.echo(f"{name:<24} {measure['value']:6.2f} %  ({low:.2f}-{high:.2f}, n {measure['n']})")
