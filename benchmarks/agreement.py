"""Whether the cheap verdict is the right one: bfloat16 against float32, and both against the plain full forward.

    python benchmarks/agreement.py TEACHER [--prompts FILE ...] [--rows 10000] [--json FILE]

`TEACHER` is a trained Ref-Teacher: random weights have no margin between their classes, so they would measure nothing.
Without `--prompts` (JSONL of `{"prompt", "label"}` or chat rows) prompts of the built-in world are drawn.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from reft_ray.core.conversation import chat
from reft_ray.finetuning.prompts import read_labelled
from reft_ray.hf.ref_teacher import RefTeacher
from reft_ray.testbed.synthetic import SyntheticRows

PLAIN_ROWS = 1000


def built_in_prompts(count: int) -> list[str]:
    """Distinct prompts of the built-in world: of its teacher's split, of the evaluation's, and of users."""
    found: dict[str, None] = {}
    seed = 1
    while len(found) < count:
        world = SyntheticRows.make(seed)
        rows = [*world.teacher_train, *world.teacher_validation, *world.hs_prompts, *world.over_refusal_prompts]
        found |= dict.fromkeys(row.prompt[-1].content for row in rows)
        seed += 1
    texts = list(found)
    random.Random(0).shuffle(texts)
    return texts[:count]


@torch.inference_mode()
def plain_scores(teacher: RefTeacher, texts: Sequence[str]) -> list[float]:
    """What the method's definition gives: all layers, one prompt at a time, no cache, no padding, float32."""
    base = teacher.base()
    model = teacher.standalone(base)
    scorer = teacher.scorer(precision="float32", device="cpu")
    scores = []
    for text in texts:
        ids_BT = torch.tensor([scorer.chat.prompt(chat(text))])
        hidden_D = model(input_ids=ids_BT, output_hidden_states=True).hidden_states[scorer.layer][0, -1]
        scores.append(float(torch.cosine_similarity(hidden_D, teacher.refusal_D, dim=0)))
    return scores


def agreement(teacher: RefTeacher, texts: Sequence[str], plain_rows: int = PLAIN_ROWS) -> dict[str, Any]:
    """Verdicts and scores of both number formats over all texts, and of float32 over the first ones plainly."""
    exact, rounded = (
        [item.score for item in teacher.scorer(precision=precision).score(texts)]
        for precision in ("float32", "bfloat16")
    )
    decide = teacher.manifest.thresholds.decide
    differ = [i for i, (a, b) in enumerate(zip(exact, rounded, strict=True)) if decide(a) is not decide(b)]
    mixed = texts[:plain_rows]
    alone = teacher.scorer(precision="float32")
    single = [alone.score([text])[0].score for text in mixed]
    fits = [len(ids) <= alone.window_tokens for ids in alone.prompt_ids(mixed)]
    short = [i for i, fit in enumerate(fits) if fit]
    plain = dict(zip(short, plain_scores(teacher, [mixed[i] for i in short]), strict=True))
    return {
        "teacher": teacher.id,
        "rows": len(texts),
        "bfloat16_verdicts_equal": 1 - len(differ) / len(texts),
        "bfloat16_verdicts_different": len(differ),
        "bfloat16_largest_score_difference": max(abs(a - b) for a, b in zip(exact, rounded, strict=True)),
        "plain_rows": len(plain),
        "float32_largest_difference_from_plain": max(abs(exact[i] - score) for i, score in plain.items()),
        "float32_largest_difference_alone_or_in_company": max(abs(exact[i] - score) for i, score in enumerate(single)),
    }


def main() -> None:
    """Measure, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, help="a Ref-Teacher's directory")
    parser.add_argument("--prompts", type=Path, nargs="*", default=[], help="JSONL files of prompts")
    parser.add_argument("--rows", type=int, default=10_000, help="how many prompts at most")
    parser.add_argument("--json", type=Path, help="write the report to this file")
    options = parser.parse_args()
    if options.prompts:
        rows = [row.prompt[-1].content for path in options.prompts for row in read_labelled(path)]
        texts = list(dict.fromkeys(rows))[: options.rows]
    else:
        texts = built_in_prompts(options.rows)
    report = agreement(RefTeacher.load(options.teacher), texts)
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
