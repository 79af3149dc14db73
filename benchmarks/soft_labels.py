"""Size and error of stored soft labels: `python benchmarks/soft_labels.py --base smollm2 --answers answers.jsonl`.

Rows are (prompt, response) in JSONL. The error is that of the divergence from a student, per position in nats, against
the same K labels in float32. Students are the teacher's logits with normal noise, and those of the position before.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import torch

from reft_ray.core.batch import collate, numbered
from reft_ray.core.conversation import Label
from reft_ray.core.losses import divergence_sum
from reft_ray.core.targets import ABSENT, SoftTargets, soften
from reft_ray.finetuning.prompts import read_labelled
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.forward import ModelForward
from reft_ray.hf.loading import load_base
from reft_ray.hf.soft_targets import StoredTargets, alignment_key, write_soft_targets

BYTES_UNPACKED = 64 * (4 + 4) + 4


def one(targets: SoftTargets, n: int) -> SoftTargets:
    """One position."""
    where = slice(n, n + 1)
    return SoftTargets(targets.ids_NK[where], targets.logprobs_NK[where], targets.tail_N[where])


@torch.no_grad()
def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="smollm2")
    parser.add_argument("--answers", nargs="+", required=True)
    parser.add_argument("--rows", type=int, default=40, help="rows that the model reads; all rows are counted")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    base = load_base(args.base)
    chat = ChatFormat(base.tokenizer)
    every = [row for path in args.answers for row in read_labelled(path, Label.HARMLESS)]
    random.Random(0).shuffle(every)
    encoded = [chat.encode(row, max_tokens=base.context) for row in every[:1000]]
    tokens = sum(row.trained_tokens for row in encoded) / len(encoded)
    rows = numbered(row for row in encoded[: args.rows])
    forward, key = ModelForward(base.model), alignment_key(rows, "teacher", 1.0, 64)
    errors, kept = [], []
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "labels"
        started = time.perf_counter()
        write_soft_targets(path, forward, rows, key, chat.pad_id, 1024)
        seconds = time.perf_counter() - started
        stored = StoredTargets(path, key)
        size = sum(file.stat().st_size for file in path.iterdir())
        for row in rows:
            logits_NV = forward.logits(collate([row], chat.pad_id))
            whole, read = soften(logits_NV, 64), stored.rows([row.index])
            kept.append((read.logprobs_NK > ABSENT).sum(1).float())
            for student_NV in (logits_NV + torch.randn(logits_NV.shape, generator=generator), logits_NV.roll(1, 0)):
                for n in range(len(logits_NV)):
                    pair = [float(divergence_sum(one(t, n), student_NV[n : n + 1])) for t in (read, whole)]
                    errors.append(pair[0] - pair[1])
    error, positions = torch.tensor(errors), sum(row.trained_tokens for row in rows)
    found = {
        "positions": positions,
        "learned tokens per row": tokens,
        "tokens kept of 64, mean": float(torch.cat(kept).mean()),
        "bytes per learned token": size / positions,
        "bytes as int32 and float32": BYTES_UNPACKED,
        "GB for 100,000 rows": 1e5 * tokens * size / positions / 1e9,
        "error in nats, mean": float(error.abs().mean()),
        "error in nats, 99th percentile": float(error.abs().quantile(0.99)),
        "error in nats, largest": float(error.abs().max()),
        "seconds": seconds,
    }
    for name, value in found.items():
        print(f"{name:<34} {value:.4g}")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
