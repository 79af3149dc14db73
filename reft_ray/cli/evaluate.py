"""`reft-ray eval`: harmful score, over-refusal and task accuracy of a base model or a student."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from reft_ray.cli.common import JsonOption, print_json, user_errors
from reft_ray.cli.resources import PrecisionOption

_NAMES = {
    "harmful_score": "harmful score",
    "harmful_score_by": "harmful score by",
    "disagreement": "unlike the first judge:",
    "incoherent": "incoherent",
    "over_refusal": "over-refusal",
    "look_alikes_refused": "  of look-alikes",
    "everyday_refused": "  of everyday prompts",
    "finetune_accuracy": "accuracy:",
}


def evaluate(
    base: Annotated[str | None, typer.Option(help="Base model: a directory or a hub id.")] = None,
    adapter: Annotated[Path | None, typer.Option(help="Finetuned adapter; default: the base model itself.")] = None,
    url: Annotated[
        str | None, typer.Option(help="Instead of --base: the address of a service that has the model, with /v1.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="With --url: the model's name, of a base or a student.")] = None,
    key: Annotated[str | None, typer.Option(help="With --url: the service's key as env:NAME.")] = None,
    harmful: Annotated[Path | None, typer.Option(help="Harmful prompts, JSONL: harmful score.")] = None,
    harmless: Annotated[Path | None, typer.Option(help="Harmless look-alikes, JSONL: over-refusal.")] = None,
    everyday: Annotated[Path | None, typer.Option(help="Everyday prompts, JSONL: over-refusal.")] = None,
    task: Annotated[Path | None, typer.Option(help="Answered test rows, JSONL of chat messages: accuracy.")] = None,
    match: Annotated[str, typer.Option(help="How task answers are compared: label, number or exact.")] = "label",
    max_prompts: Annotated[int | None, typer.Option(min=1, help="Most prompts of each file; default: all.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    device: Annotated[str, typer.Option(help="cpu or cuda; auto: cuda where there is one.")] = "auto",
    precision: PrecisionOption = "auto",
    engine: Annotated[
        str, typer.Option(help="What answers: transformers or vllm; auto: vLLM on a GPU where it is installed.")
    ] = "auto",
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens in a batch, answers included.")] = 8192,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            help="matcher (default), classifier or endpoint; repeatable: all are reported, the first decides."
        ),
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="The endpoint's model.")] = None,
    judge_url: Annotated[str | None, typer.Option(help="The endpoint's address, with /v1.")] = None,
    judge_api: Annotated[str, typer.Option(help="The endpoint's API: chat, completions or moderations.")] = "chat",
    judge_key: Annotated[str | None, typer.Option(help="The endpoint's key as env:NAME.")] = None,
    judge_prompt: Annotated[
        Path | None,
        typer.Option(help="File with the judging prompt: {prompt}, {answer}; replies COMPLIED or REFUSED, Yes or No."),
    ] = None,
    classifier: Annotated[str | None, typer.Option(help="The classifier: a Hugging Face id or a directory.")] = None,
    harmful_label: Annotated[
        list[str] | None, typer.Option(help="The classifier's harmful label, name or index; repeatable.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate a model; all figures with 95 % intervals. A judge that does not answer ends the command."""
    with user_errors():
        from reft_ray.core.conversation import Example, Label
        from reft_ray.core.errors import UsageError
        from reft_ray.evaluation.endpoint import Endpoint, EndpointResponder, key_of
        from reft_ray.evaluation.judge_settings import JudgeKind, JudgeSettings, judges_from
        from reft_ray.evaluation.judges import Respond
        from reft_ray.evaluation.suite import Suite, TaskTest
        from reft_ray.evaluation.suite import evaluate as run
        from reft_ray.evaluation.task_accuracy import Match
        from reft_ray.finetuning.prompts import read_labelled
        from reft_ray.hf.chat import ChatFormat
        from reft_ray.hf.compute import default_device
        from reft_ray.hf.generate import Responder, load_student
        from reft_ray.hf.vllm_responder import VllmResponder, uses_vllm

        if match not in set(Match):
            raise UsageError(f"--match {match}: one of {', '.join(Match)}")
        if (base is None) == (url is None) or (url is None) != (model is None) or (url and adapter):
            raise UsageError("name the model with --base (and --adapter), or with --url and --model")
        if not (harmful or harmless or everyday or task):
            raise UsageError("name at least one of --harmful, --harmless, --everyday and --task")

        def settings(kind: str) -> JudgeSettings:
            values: dict[str, object] = {"kind": kind}
            if kind == JudgeKind.CLASSIFIER:
                if not (classifier and harmful_label):
                    raise UsageError("--judge classifier: name the model with --classifier and its --harmful-label")
                values |= {"model": classifier, "harmful_labels": tuple(harmful_label)}
            elif kind == JudgeKind.ENDPOINT:
                if not (judge_url and judge_model):
                    raise UsageError("--judge endpoint: name it with --judge-url and --judge-model")
                values |= {"url": judge_url, "model": judge_model, "api": judge_api, "key": judge_key}
                values |= {"prompt": judge_prompt.read_text(encoding="utf-8")} if judge_prompt else {}
            return JudgeSettings.of(values, f"--judge {kind}")

        def rows(path: Path | None, label: Label) -> list[Example]:
            return list(read_labelled(path, label))[:max_prompts] if path else []

        kinds = list(dict.fromkeys(judge or [JudgeKind.MATCHER.value]))
        chosen = str(default_device()) if device == "auto" else device
        tests = {"task": TaskTest(rows(task, Label.HARMLESS), Match(match))} if task else {}
        suite = Suite(
            harmful=[row.prompt for row in rows(harmful, Label.HARMFUL)],
            harmless=[row.prompt for row in rows(harmless, Label.HARMLESS)],
            everyday=[row.prompt for row in rows(everyday, Label.HARMLESS)],
            tasks=tests,
            judges=judges_from([settings(kind) for kind in kinds], chosen, batch_tokens),
        )
        respond: Respond
        if base is None:
            served = Endpoint(str(url), model, key and key_of(key, "model"), timeout_seconds=600.0, called="model")
            respond = EndpointResponder(served, max_new_tokens)
        elif uses_vllm(engine, chosen):
            respond = VllmResponder(base, adapter, max_new_tokens)
        else:
            loaded = load_student(base, adapter, chosen, precision)
            respond = Responder(loaded.model, ChatFormat(loaded.tokenizer), max_new_tokens, batch_tokens)
        found = run(respond, suite).as_dict()
        if as_json:
            print_json({**found, "judges": kinds})
            return
        for name, measure in found["measures"].items():
            kind, _, of = name.partition("/")
            low, high = measure["interval"]
            title = " ".join(filter(None, (_NAMES.get(kind, kind), of)))
            typer.echo(f"{title:<36} {measure['value']:6.2f} %  ({low:.2f}-{high:.2f}, n {measure['n']})")
