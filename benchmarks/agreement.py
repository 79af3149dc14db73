"""Agreement of verdicts: bfloat16 with float32, and float32 with a plain full forward pass.

    python benchmarks/agreement.py TEACHER [--prompts FILE ...] [--rows 10000] [--json FILE]

`TEACHER` is a trained Ref-Teacher: random weights have no margin between the classes. Without `--prompts` (JSONL of
`{"prompt", "label"}` or chat rows) prompts are synthetic.
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


def synthetic_prompts(count: int) -> list[str]:
    """Distinct synthetic prompts of the teacher and the evaluation."""
    found: dict[str, None] = {}
    seed = 1
    while len(found) < count:
        made = SyntheticRows.make(seed)
        rows = [*made.teacher_train, *made.teacher_validation, *made.hs_prompts, *made.over_refusal_prompts]
        found |= dict.fromkeys(row.prompt[-1].content for row in rows)
        seed += 1
    texts = list(found)
    random.Random(0).shuffle(texts)
    return texts[:count]


@torch.inference_mode()
def plain_scores(teacher: RefTeacher, texts: Sequence[str]) -> list[float]:
    """Scores by the method's definition: all layers, one prompt at a time, no cache, no padding, float32."""
    base = teacher.base()
    model = teacher.standalone(base)
    scorer = teacher.scorer(precision="float32", device="cpu")
    scores = []
    for text in texts:
        ids_BT = torch.tensor([scorer.chat.prompt(chat(text))])
        hidden_D = model(input_ids=ids_BT, output_hidden_states=True).hidden_states[scorer.layer][0, -1]
        scores.append(float(teacher.readouts.score({scorer.layer: hidden_D[None]})))
    return scores


def agreement(teacher: RefTeacher, texts: Sequence[str], plain_rows: int = PLAIN_ROWS) -> dict[str, Any]:
    """Compare both number formats on all texts, and float32 with `plain_scores` on the first `plain_rows`."""
    exact, rounded = (
        [item.score for item in teacher.scorer(precision=precision).score(texts)]
        for precision in ("float32", "bfloat16")
    )
    decide = teacher.manifest.thresholds.decide
    differ = [i for i, (a, b) in enumerate(zip(exact, rounded, strict=True)) if decide(a) is not decide(b)]
    first = texts[:plain_rows]
    scorer = teacher.scorer(precision="float32")
    single = [scorer.score([text])[0].score for text in first]
    fits = [len(ids) <= scorer.window_tokens for ids in scorer.prompt_ids(first)]
    short = [i for i, fit in enumerate(fits) if fit]
    plain = dict(zip(short, plain_scores(teacher, [first[i] for i in short]), strict=True))
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
    """Measure, print, and write JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("teacher", type=Path, help="a Ref-Teacher's directory")
    parser.add_argument("--prompts", type=Path, nargs="*", default=[], help="JSONL files of prompts")
    parser.add_argument("--rows", type=int, default=10_000, help="the most prompts")
    parser.add_argument("--json", type=Path, help="write the report to this file")
    options = parser.parse_args()
    if options.prompts:
        rows = [row.prompt[-1].content for path in options.prompts for row in read_labelled(path)]
        texts = list(dict.fromkeys(rows))[: options.rows]
    else:
        texts = synthetic_prompts(options.rows)
    report = agreement(RefTeacher.load(options.teacher), texts)
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
