"""A teacher's soft labels on an alignment set as a file: computed once per teacher and set, then memory-mapped.

Layout (safetensors): `ids` [M, K] int32, `logprobs` [M, K] float32, `tail` [M] float32 over all M trained positions,
and `offsets` [rows + 1] int64; the metadata names teacher, alignment set, temperature and K.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from reft_ray.atomic import atomic_write
from reft_ray.core.batch import TokenizedExample, collate, token_batches
from reft_ray.core.errors import ReftError
from reft_ray.core.forward import Forward
from reft_ray.core.targets import SoftTargets, soften


def alignment_key(rows: Sequence[TokenizedExample], teacher_id: str, temperature: float, k: int) -> dict[str, str]:
    """Everything that the labels depend on; runs with the same key share one file."""
    return {"teacher": teacher_id, "rows": rows_key(rows), "temperature": str(temperature), "k": str(k)}


def rows_key(rows: Sequence[TokenizedExample]) -> str:
    """24 hex digits of SHA-256 over alignment rows as tokens, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.ids, row.loss_mask]).encode())
    return digest.hexdigest()[:24]


def key_name(key: dict[str, str]) -> str:
    """The file name of a key."""
    return "targets-" + hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16] + ".safetensors"


@torch.no_grad()
def write_soft_targets(
    path: Path,
    teacher: Forward,
    rows: Sequence[TokenizedExample],
    key: dict[str, str],
    pad_id: int,
    max_tokens: int = 8192,
    device: torch.device | str = "cpu",
    progress: Callable[[float], None] | None = None,
) -> None:
    """Run the teacher once over the alignment rows; write under a temporary name, then rename.

    `progress` receives the share of the tokens done.
    """
    k, temperature = int(key["k"]), float(key["temperature"])
    lengths = torch.tensor([row.trained_tokens for row in rows])
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    total = int(offsets[-1])
    stored: dict[str, Tensor] = {}
    tokens, done = sum(map(len, rows)), 0
    for indices in token_batches([len(row) for row in rows], max_tokens):
        logits_NV = teacher.logits(collate([rows[i] for i in indices], pad_id, device))
        soft = soften(logits_NV, k, temperature).to("cpu")
        if not stored:
            kept = soft.ids_NK.shape[1]
            stored = {
                "ids": torch.empty(total, kept, dtype=torch.int32),
                "logprobs": torch.empty(total, kept),
                "tail": torch.empty(total),
            }
        at = torch.cat([torch.arange(int(offsets[i]), int(offsets[i + 1])) for i in indices])
        stored["ids"][at], stored["logprobs"][at], stored["tail"][at] = soft.ids_NK, soft.logprobs_NK, soft.tail_N
        done += sum(len(rows[i]) for i in indices)
        if progress is not None:
            progress(done / tokens)
    if not stored:
        raise ReftError("the alignment set has no row with an answer: there is nothing to distil")
    with atomic_write(path) as scratch:
        save_file({**stored, "offsets": offsets}, scratch, metadata=key)


class StoredTargets:
    """`core.targets.TargetSource` over a file; only requested rows are read."""

    def __init__(self, path: Path, key: dict[str, str]) -> None:
        if not path.is_file():
            raise ReftError(f"no soft targets at {path}")
        self._file: Any = safe_open(path, framework="pt").__enter__()
        found = dict(self._file.metadata() or {})
        wrong = [f"{name}={found.get(name)}, not {value}" for name, value in key.items() if found.get(name) != value]
        if wrong:
            raise ReftError(f"{path} holds different soft targets: {', '.join(wrong)}; delete it to compute them again")
        self._offsets: list[int] = self._file.get_tensor("offsets").tolist()
        self._slices = {name: self._file.get_slice(name) for name in ("ids", "logprobs", "tail")}

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def rows(self, indices: Sequence[int]) -> SoftTargets:
        """The targets of these alignment rows, concatenated."""
        spans = [(self._offsets[i], self._offsets[i + 1]) for i in indices]

        def gather(name: str) -> Tensor:
            return torch.cat([self._slices[name][a:b] for a, b in spans])

        return SoftTargets(gather("ids"), gather("logprobs"), gather("tail"))
