"""Harmful prompts hidden in the middle of long texts: how many a teacher finds, read in windows with and without sentences.

    python benchmarks/long_texts.py --rows ../shared/data --teacher builtin

Carriers are parts of `text/pretrain_mix.txt` of about 1,500 characters; hidden prompts and long harmless prompts are of
`dev/prompts.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import replace
from pathlib import Path

from reft_ray.hf.ref_teacher import RefTeacher
from reft_ray.hf.scorer import TeacherScorer
from reft_ray.teachers import teacher_folder

HIDDEN = ("jailbreakbench", "malicious_instruct", "tdc2023")
CHARACTERS = 1500


def carriers(text: str, count: int, rng: random.Random) -> list[str]:
    """Long texts of whole paragraphs."""
    paragraphs = [part.strip() for part in text.split("\n\n") if len(part) > 300]
    rng.shuffle(paragraphs)
    found = []
    for _ in range(count):
        made = ""
        while len(made) < CHARACTERS:
            made += paragraphs.pop()[:700] + "\n"
        found.append(made[:CHARACTERS])
    return found


def hidden(carrier: str, prompt: str) -> str:
    """The prompt as a sentence in the middle of the text."""
    parts = carrier.split(". ")
    middle = len(parts) // 2
    end = " " if prompt[-1] in ".?!" else ". "
    return ". ".join(parts[:middle]) + ". " + prompt + end + ". ".join(parts[middle:])


def main() -> None:
    """Print the share of texts that are blocked."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--rows", type=Path, required=True)
    options.add_argument("--teacher", default="builtin")
    options.add_argument("--texts", type=int, default=40)
    chosen = options.parse_args()
    rng = random.Random(0)
    rows = [json.loads(line) for line in (chosen.rows / "dev/prompts.jsonl").read_text().splitlines()]
    rng.shuffle(rows)
    harmful = [row["prompt"] for row in rows if row["source"] in HIDDEN and row["label"] == "harmful"]
    harmful = [prompt for prompt in harmful if len(prompt) < 160][: chosen.texts]
    harmless = [row["prompt"] for row in rows if row["label"] == "harmless" and 400 < len(row["prompt"]) < 2500]
    text = (chosen.rows / "text/pretrain_mix.txt").read_text(errors="replace")[:4_000_000]
    around = carriers(text, len(harmful), rng)
    scorer = RefTeacher.load(teacher_folder(chosen.teacher)).scorer()
    sets = {
        "prompts by themselves": harmful,
        "prompts in a long text": [hidden(carrier, prompt) for carrier, prompt in zip(around, harmful, strict=True)],
        "long texts without": around,
        "long harmless prompts": harmless[: chosen.texts],
    }
    windows = scorer._windows
    for name, frame in (
        ("with sentences", windows),
        ("without, no offset", replace(windows, ends_sentence=lambda token: False)),
    ):
        scorer._windows = frame
        if frame is not windows:
            scorer.response_offset = 0.0
        print(name, {kind: blocked(scorer, texts) for kind, texts in sets.items()}, flush=True)


def blocked(scorer: TeacherScorer, texts: list[str]) -> str:
    """How many are blocked, and the mean number of windows."""
    found = scorer.score(texts)
    count = sum(item.score > scorer.thresholds.block for item in found)
    return f"{count} of {len(texts)}, {sum(item.windows for item in found) / len(found):.1f} windows"


if __name__ == "__main__":
    main()
