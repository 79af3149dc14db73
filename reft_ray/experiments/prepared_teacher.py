"""The Ref-Teacher that the package carries for SmolLM2, made by one command:

    python -m reft_ray.experiments.prepared_teacher --rows DIR --out reft_ray/teachers/smollm2

Only prompts under permissive licences are used. Refusals are the project's own sentences (`reft_ray.testbed`), helpful
answers those of the base model itself (Apache-2.0): the teacher learns to refuse and keeps its other answers. The rows
with prompts of our own are kept in the artefact's folder as an alignment set for students, and all of them next to it.
"""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Any

import typer

from reft_ray.atomic import atomic_write
from reft_ray.core.conversation import Example, Label, chat
from reft_ray.evaluation.judges import Grade, RefusalMatcher
from reft_ray.finetuning.config import Resources, TeacherConfig
from reft_ray.finetuning.prompts import read_labelled
from reft_ray.finetuning.teacher_loop import TeacherData
from reft_ray.finetuning.trainer import prepare_teacher
from reft_ray.hf.compute import default_device, faster_precision
from reft_ray.hf.generate import load_responder
from reft_ray.hf.ref_teacher import RefTeacher, save_with_manifest
from reft_ray.hf.teacher_card import ALIGNMENT, alignment_file
from reft_ray.testbed.answers import refusal
from reft_ray.testbed.english import crime_prompts, harmful_prompts, harmless_prompts, security_prompts
from reft_ray.testbed.look_alikes import (
    contrast_prompts,
    disguised_prompts,
    look_alike_prompts,
    role_prompts,
    validation_contrast,
    validation_look_alikes,
)
from reft_ray.testbed.synthetic import Sizes, SyntheticRows, write_chat_rows
from reft_ray.testbed.task_prompts import task_prompts

BASE = "smollm2"
LICENCES = frozenset({"Apache-2.0", "MIT", "CC BY 4.0", "CC BY-SA 3.0"})
SYNTHETIC, ENGLISH = "reft_ray synthetic rows", "reft_ray English sentences"
SECURITY, CRIMES = "reft_ray security requests", "reft_ray questions about crimes"
TASKS = "reft_ray task prompts"
LOOK_ALIKES, ROLES = "reft_ray look-alikes", "reft_ray requests in roles"
HELD_OUT = "reft_ray look-alikes of other acts"
VALIDATION_SOURCES = ("catqa", "harmbench_advtrain", "certified_safe", "self_instruct_seed", HELD_OUT)
OWN = (SYNTHETIC, ENGLISH, SECURITY, CRIMES, TASKS, LOOK_ALIKES, ROLES)
STEPS = 600
BATCH_ROWS = 16
REFERENCE_PROMPTS = 9_600
ALIGNMENT_ROWS = 340
"""Of each source and label: the artefact stays under 8 MB."""
VALIDATION_PROMPTS = 600
ANSWERED_PER_SOURCE = 480
"""Harmless prompts of each source that the base answers once; they repeat where a run needs more rows."""
LOOK_ALIKE_SHARE = 3
"""Look-alikes and their harmful counterparts are drawn this often for each row of another source: to refuse by words
alone is the usual fault of a teacher.
"""
LORA = {"rank": 8, "first_layer": 16}
"""The lower half of the model needs no backward pass, and the adapter takes 5 MB."""
ANSWER_TOKENS = 40
PROMPT_CHARACTERS = 240


def settings(steps: int, rows: int) -> TeacherConfig:
    """Stage 1 for SmolLM2: every row has an answer, so REG and cross entropy share one pass of the model.

    The adapter's size and the number of layers that are read keep the artefact under 8 MB.
    """
    return TeacherConfig.of(
        {
            "base": BASE,
            "epochs": steps * BATCH_ROWS / rows,
            "batch_rows": BATCH_ROWS,
            "answered_rows": 1.0,
            "max_tokens": 128,
            "precision": faster_precision(default_device()),
            "lora": LORA,
            # All of it refuses more harmless prompts than a teacher may, 0.9 of it answers more harmful ones.
            "answer_shares": (0.95,),
            "layer": 20,
            "optimizer": {"learning_rate": 1e-3},
            # Any layer separates these validation sources. For prompts of other kinds, a task's rows among them, half
            # of the adapter, several upper layers (21 to 23) and longer windows do better.
            "feature_mix": 0.5,
            "sweep": (0.7, 0.77),
            "average_layers": 3,
            "shrinkage": 0.2,
            "window_tokens": 160,
            "reference_prompts": 1600,
            "answer_sample": 200,
            # A fifth of the harmless validation prompts look harmful on purpose.
            "thresholds": {"block_fpr": 0.05, "review_fpr": 0.08},
            "patience": 1000,
            "checkpoint_every": 40,
            "log_every": 2,
        }
    )


@dataclass(frozen=True, slots=True)
class _Pools:
    """Permissive prompts: training by source, validation, and how many there are of each source, licence and label."""

    training: Mapping[tuple[Label, str], Sequence[Example]]
    validation: Sequence[Example]
    counts: Counter[tuple[str, str, str]]


def _pools(prompts: Path, seed: int, licences: AbstractSet[str]) -> _Pools:
    rng = random.Random(seed)  # noqa: S311 - an order, not a secret
    counts: Counter[tuple[str, str, str]] = Counter()
    rows: list[Example] = []
    for found in map(json.loads, prompts.read_text(encoding="utf-8").splitlines()):
        if licences and found["licence"] not in licences:
            continue
        counts[found["source"], found["licence"], found["label"]] += 1
        if len(found["prompt"]) <= PROMPT_CHARACTERS:
            rows.append(Example(chat(found["prompt"]), Label(found["label"]), found["source"]))
    synthetic = SyntheticRows.make(seed, Sizes(2000, 0, 0, 0, 0, 0)).teacher_train
    own = [Example(row.prompt, row.label, SYNTHETIC) for row in synthetic]
    for label, source, found_of in (
        (Label.HARMFUL, ENGLISH, harmful_prompts()),
        (Label.HARMLESS, ENGLISH, harmless_prompts()),
        (Label.HARMLESS, SECURITY, security_prompts()),
        (Label.HARMLESS, CRIMES, crime_prompts()),
        (Label.HARMLESS, TASKS, task_prompts()),
        (Label.HARMFUL, LOOK_ALIKES, contrast_prompts()),
        (Label.HARMLESS, LOOK_ALIKES, look_alike_prompts()),
        (Label.HARMFUL, ROLES, disguised_prompts()),
        (Label.HARMLESS, ROLES, role_prompts()),
        (Label.HARMFUL, HELD_OUT, validation_contrast()),
        (Label.HARMLESS, HELD_OUT, validation_look_alikes()),
    ):
        own += [Example(chat(prompt), label, source) for prompt in found_of]
    for row in own:
        counts[row.source, "Apache-2.0", row.label or ""] += 1
    rows += own
    rng.shuffle(rows)
    training: dict[tuple[Label, str], list[Example]] = {}
    for row in rows:
        if row.label is not None and row.source not in VALIDATION_SOURCES:
            training.setdefault((row.label, row.source), []).append(row)
    # All look-alikes of other acts, and a sample of the other sources.
    validation = [row for row in rows if row.source in VALIDATION_SOURCES]
    validation.sort(key=lambda row: row.source != HELD_OUT)
    return _Pools(training, validation[:VALIDATION_PROMPTS], counts)


def teacher_data(
    prompts: Path,
    answer: Callable[[Sequence[Example]], Sequence[Example]] | None,
    steps: int = STEPS,
    licences: AbstractSet[str] = LICENCES,
    seed: int = 0,
    look_alike_share: int = 1,
) -> TeacherData:
    """The training rows of `steps` steps, equal shares of the sources of each label, and what the card says of them.

    Look-alikes have `look_alike_share` such shares.

    `answer` answers harmless prompts; rows that it does not return are not learned. Without it they have no answers.
    Prompts under other `licences` are left out; none named: no prompt is.
    """
    pools = _pools(prompts, seed, licences)
    rng = random.Random(f"{seed}/refusals")  # noqa: S311
    train: list[Example] = []
    for label in Label:
        chosen = [
            (rows, look_alike_share if source == LOOK_ALIKES else 1)
            for (of, source), rows in sorted(pools.training.items())
            if of is label
        ]
        one = steps * BATCH_ROWS // 2 // sum(shares for _, shares in chosen)
        for rows, shares in chosen:
            each = shares * one
            if label is Label.HARMLESS:
                train += islice(cycle(answer(rows[: shares * ANSWERED_PER_SOURCE]) if answer else rows), each)
            else:
                train += [
                    replace(row, messages=chat(row.prompt[-1].content, refusal(rng)))
                    for row in islice(cycle(rows), each)
                ]
    rng.shuffle(train)
    sources = [
        {"source": source, "licence": licence, "label": label, "prompts": count, "use": _use(source)}
        for (source, licence, label), count in sorted(pools.counts.items())
    ]
    return TeacherData(train, pools.validation, sources=sources)


def base_answers(cache: Path) -> Callable[[Sequence[Example]], list[Example]]:
    """Answers of the base model, cut after the last whole sentence; kept in the file `cache`, prompt by prompt.

    Some harmless prompts it refuses, as a chatbot that is made for something else: those are left out.
    """
    known: dict[str, str] = json.loads(cache.read_text(encoding="utf-8")) if cache.is_file() else {}

    def answer(rows: Sequence[Example]) -> list[Example]:
        new = [row for row in rows if row.prompt[-1].content not in known]
        if new:
            device = default_device()
            respond = load_responder(BASE, None, ANSWER_TOKENS, device, faster_precision(device))
            known.update(
                zip((row.prompt[-1].content for row in new), respond([row.prompt for row in new]), strict=True)
            )
            with atomic_write(cache) as scratch:
                scratch.write_text(json.dumps(known), encoding="utf-8")
        texts = [whole_sentences(known[row.prompt[-1].content]) for row in rows]
        grades = RefusalMatcher().judge([row.prompt for row in rows], texts)
        return [
            replace(row, messages=chat(row.prompt[-1].content, text))
            for row, text, grade in zip(rows, texts, grades, strict=True)
            if text and grade is not Grade.REFUSED
        ]

    return answer


def whole_sentences(text: str) -> str:
    """The text up to its last full stop, question or exclamation mark; empty if there is none."""
    return text[: max(text.rfind(mark) for mark in ".!?") + 1].strip()


def _use(source: str) -> str:
    return "validation" if source in VALIDATION_SOURCES else "training"


def trained(prompts: Path, out: Path, steps: int, licences: AbstractSet[str] = LICENCES) -> RefTeacher:
    """The teacher after training; an interrupted run resumes. The rows of our own are kept as its alignment set."""
    answers = base_answers(out.with_name(f".{out.name}-answers.json"))
    data = teacher_data(prompts, answers, steps, licences, look_alike_share=LOOK_ALIKE_SHARE)
    config = settings(steps, len(data.train))
    resources = Resources(workers=0, gpus_per_worker=int(default_device() == "cuda"))

    def report(metrics: Mapping[str, Any]) -> None:
        shown = {k: round(v, 4) if isinstance(v, float) else v for k, v in metrics.items() if v is not None}
        print(json.dumps(shown), flush=True)

    made = prepare_teacher(config, data, out, resources, f"prepared-{steps}", report)
    learned = {row.prompt[-1].content: row for row in data.train}.values()
    write_chat_rows(out / ALIGNMENT, _first_of_each(learned), labelled=True)
    write_chat_rows(out.with_name(f"{out.name}-{ALIGNMENT}"), learned, labelled=True)
    return made


def _first_of_each(learned: Iterable[Example]) -> list[Example]:
    """The rows of our own, at most ALIGNMENT_ROWS of each source and label."""
    seen: Counter[tuple[str, Label | None]] = Counter()
    chosen = []
    for row in learned:
        seen[row.source, row.label] += 1
        if row.source in OWN and seen[row.source, row.label] <= ALIGNMENT_ROWS:
            chosen.append(row)
    return chosen


def refitted(earlier: RefTeacher, prompts: Path, out: Path, licences: AbstractSet[str] = LICENCES) -> RefTeacher:
    """The teacher with the adapter, the answers and the alignment rows of an earlier one, and a filter chosen anew."""
    alignment = alignment_file(earlier.folder)
    # Prompts need no answers here, so there are more of them; the alignment rows say how answers score.
    data = replace(
        teacher_data(prompts, None, REFERENCE_PROMPTS // BATCH_ROWS, licences),
        answers=read_labelled(alignment) if alignment else (),
    )
    changes = {"adapter": str(earlier.folder / "adapter"), "reference_prompts": REFERENCE_PROMPTS}
    config = settings(1, len(data.train)).model_copy(update=changes)
    made = prepare_teacher(config, data, out, Resources(workers=0))
    before = earlier.manifest
    recorded = {
        **made.manifest.config,
        "adapter": before.config.get("adapter") or earlier.id,
        "steps": before.config["steps"],
    }
    manifest = replace(made.manifest, answers_quality=before.answers_quality, config=recorded)
    if alignment:
        shutil.copy(alignment, out / ALIGNMENT)
    return save_with_manifest(out, made, manifest)


def main(
    rows: Annotated[Path, typer.Option(help="Directory with prompts.jsonl.")],
    out: Annotated[Path, typer.Option(help="Directory of the artefact.")],
    steps: Annotated[int, typer.Option(help="Optimiser steps.")] = STEPS,
    refit: Annotated[
        Path | None, typer.Option(help="An artefact whose filter is chosen anew; nothing is trained.")
    ] = None,
    any_licence: Annotated[
        bool, typer.Option("--any-licence", help="Use prompts of every licence: a teacher that is not for passing on.")
    ] = False,
) -> None:
    """Train the prepared teacher, then choose its filter. An interrupted run resumes."""
    prompts, licences = rows / "prompts.jsonl", frozenset() if any_licence else LICENCES
    folder = out.with_name(f"{out.name}-trained")
    earlier = RefTeacher.load(refit) if refit else trained(prompts, folder, steps, licences)
    made = refitted(earlier, prompts, out, licences)
    print(json.dumps({"id": made.id, "sources": made.manifest.sources}, indent=1))


if __name__ == "__main__":
    typer.run(main)
