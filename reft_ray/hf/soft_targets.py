"""A teacher's soft labels on an alignment set on disk: computed once per teacher and set, then memory-mapped.

A directory with `index.json` (what the labels depend on, and how many rows; written last) and parts of `PART_ROWS`
rows, which are computed one by one, by as many processes as there are. A part is a safetensors file over its M trained
positions, each with its most likely tokens until what is left of the K has less than `OMITTED` mass, E tokens in all:

| tensor | type | contains |
|---|---|---|
| `offsets` | int64 [rows + 1] | the first position of each row |
| `kept` | uint8 [M], uint16 for K > 255 | tokens kept; `low` and `logprobs` are in the order of positions |
| `low` | uint16 [E] | the low 16 bits of the ids, which ascend in a position |
| `high` | as `kept`, [M, ids >> 16] | how many of a position's ids have the upper bits 0, 1, ..., but for the last |
| `logprobs` | float16 [E] | natural log-probabilities |
| `log_tail` | float16 [M] | the logarithm of the mass of all other tokens |

Each position's mass is 1 again when it is read. docs/benchmarks.md has the error and the size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from reft_ray.atomic import atomic_write
from reft_ray.core.batch import TokenizedExample, indexed_batches
from reft_ray.core.errors import ReftError
from reft_ray.core.forward import Forward
from reft_ray.core.targets import ABSENT, SoftTargets, soften

PART_ROWS = 1024
OMITTED = 1e-4
"""A position's least likely tokens with together less than this mass are part of the tail."""

_INDEX = "index.json"
_OPEN_PARTS = 64
Array = npt.NDArray[Any]


def alignment_key(rows: Sequence[TokenizedExample], teacher_id: str, temperature: float, k: int) -> dict[str, str]:
    """Everything that the labels depend on; runs with the same key share one directory."""
    return {"teacher": teacher_id, "rows": rows_key(rows), "temperature": str(temperature), "k": str(k)}


def rows_key(rows: Sequence[TokenizedExample]) -> str:
    """24 hex digits of SHA-256 over alignment rows as tokens, in order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps([row.ids, row.loss_mask]).encode())
    return digest.hexdigest()[:24]


def key_name(key: dict[str, str]) -> str:
    """The directory's name for a key."""
    return "targets-" + hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]


def is_complete(path: Path) -> bool:
    """Whether all soft labels of a directory are written."""
    return (path / _INDEX).is_file()


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
    share: tuple[int, int] = (0, 1),
    packed: bool = False,
) -> None:
    """Run the teacher once over the alignment rows and write what is missing of their labels.

    `share` (rank, processes) writes every n-th part; the process that finds all parts written completes the directory.
    `progress` receives the share of this process's tokens that are done. Holds the labels of one part in memory.
    """
    if not any(row.trained_tokens for row in rows):
        raise ReftError("the alignment set has no row with an answer: there is nothing to distil")
    rank, processes = share
    parts = range(rank, -(-len(rows) // PART_ROWS), processes)
    chosen = [rows[part * PART_ROWS : (part + 1) * PART_ROWS] for part in parts]
    total, done = sum(len(row) for part in chosen for row in part), 0
    for number, part in zip(parts, chosen, strict=True):
        if not _part(path, number).is_file():
            found: list[SoftTargets | None] = [None] * len(part)
            for indices, batch in indexed_batches(part, max_tokens, pad_id, device, packed):
                predictions = teacher.predictions(batch)
                soft = soften(predictions, int(key["k"]), float(key["temperature"])).to("cpu")
                for index, row in zip(indices, _by_row(soft, [part[i].trained_tokens for i in indices]), strict=True):
                    found[index] = row
                done += sum(len(part[i]) for i in indices)
                if progress is not None:
                    progress(done / total)
            with atomic_write(_part(path, number)) as scratch:
                save_file(_packed([row for row in found if row is not None], predictions.vocabulary), scratch)
        else:
            done += sum(map(len, part))
    complete(path, len(rows), key)


def complete(path: Path, rows: int, key: dict[str, str]) -> None:
    """Write the index if every part is there."""
    if all(_part(path, number).is_file() for number in range(-(-rows // PART_ROWS))):
        with atomic_write(path / _INDEX) as scratch:
            scratch.write_text(json.dumps({"key": key, "rows": rows}), encoding="utf-8")


class StoredTargets:
    """`core.targets.TargetSource` over a directory; only requested rows are read."""

    def __init__(self, path: Path, key: dict[str, str]) -> None:
        if not is_complete(path):
            raise ReftError(f"no soft targets at {path}")
        index = json.loads((path / _INDEX).read_text(encoding="utf-8"))
        found = index["key"]
        wrong = [f"{name}={found.get(name)}, not {value}" for name, value in key.items() if found.get(name) != value]
        if wrong:
            raise ReftError(f"{path} holds different soft targets: {', '.join(wrong)}; delete it to compute them again")
        self._rows: int = index["rows"]
        self._opened = lru_cache(_OPEN_PARTS)(lambda number: _StoredPart(_part(path, number)))

    def __len__(self) -> int:
        return self._rows

    def rows(self, indices: Sequence[int]) -> SoftTargets:
        """The targets of these alignment rows, concatenated; positions that keep fewer tokens have ABSENT ones."""
        found = [self._opened(index // PART_ROWS).row(index % PART_ROWS) for index in indices]
        kept, ids, logprobs, tail = (np.concatenate(arrays) for arrays in zip(*found, strict=True))
        places = np.arange(int(kept.max(initial=1)))[None, :] < kept[:, None]
        ids_NK = np.zeros(places.shape, np.int32)
        logprobs_NK = np.full(places.shape, ABSENT, np.float32)
        ids_NK[places], logprobs_NK[places] = ids, logprobs
        return SoftTargets(torch.from_numpy(ids_NK), torch.from_numpy(logprobs_NK), torch.from_numpy(tail))


class _StoredPart:
    """One part's file, memory-mapped."""

    def __init__(self, path: Path) -> None:
        self._file: Any = safe_open(path, framework="np").__enter__()
        self._offsets: list[int] = self._file.get_tensor("offsets").tolist()
        starts = np.concatenate([[0], self._file.get_tensor("kept").cumsum(dtype=np.int64)])
        # Where each row begins among the tokens.
        self._token_offsets: list[int] = starts[self._offsets].tolist()
        self._slices = {name: self._file.get_slice(name) for name in ("kept", "low", "high", "logprobs", "log_tail")}

    def row(self, index: int) -> tuple[Array, Array, Array, Array]:
        """(tokens kept [n], their ids and log-probabilities in one array each, the tails' mass [n]) of n positions."""
        first, last = self._offsets[index], self._offsets[index + 1]
        tokens = slice(self._token_offsets[index], self._token_offsets[index + 1])
        kept = self._slices["kept"][first:last].astype(np.int64)
        below = self._slices["high"][first:last].astype(np.int64).cumsum(axis=1)
        position = np.repeat(np.arange(len(kept)), kept)
        place = np.arange(len(position)) - np.repeat(kept.cumsum() - kept, kept)
        high = (place[:, None] >= below[position]).sum(axis=1)
        ids = (high << 16) + self._slices["low"][tokens]
        logprobs = self._slices["logprobs"][tokens].astype(np.float32)
        tail = np.exp(self._slices["log_tail"][first:last].astype(np.float32))
        mass = np.bincount(position, np.exp(logprobs), len(kept)).astype(np.float32) + tail
        return kept, ids, logprobs - np.log(mass)[position], tail / mass


def _part(path: Path, number: int) -> Path:
    return path / f"part-{number:05d}.safetensors"


def _by_row(soft: SoftTargets, lengths: Sequence[int]) -> Iterator[SoftTargets]:
    tensors = (soft.ids_NK, soft.logprobs_NK, soft.tail_N)
    for ids_NK, logprobs_NK, tail_N in zip(*(tensor.split(list(lengths)) for tensor in tensors), strict=True):
        yield SoftTargets(ids_NK, logprobs_NK, tail_N)


def _packed(rows: Sequence[SoftTargets], vocabulary: int) -> dict[str, Array]:
    """The tensors of a part."""
    ids_MK = torch.cat([row.ids_NK for row in rows]).numpy()
    logprobs_MK = torch.cat([row.logprobs_NK for row in rows]).numpy()
    tail_M = torch.cat([row.tail_N for row in rows]).numpy()
    mass_MK = np.exp(logprobs_MK.astype(np.float64))
    # Most likely first: what a token and all after it have together.
    rest_MK = mass_MK[:, ::-1].cumsum(axis=1)[:, ::-1]
    keeps_MK = rest_MK >= OMITTED
    keeps_MK[:, 0] = True
    omitted_M = (mass_MK * ~keeps_MK).sum(axis=1)
    kept_M = keeps_MK.sum(axis=1)
    absent = np.iinfo(np.int32).max
    order_MK = np.where(keeps_MK, ids_MK, absent).argsort(axis=1)
    ids_MK = np.take_along_axis(np.where(keeps_MK, ids_MK, absent), order_MK, axis=1)
    logprobs_MK = np.take_along_axis(logprobs_MK, order_MK, axis=1)
    places_MK = np.arange(ids_MK.shape[1])[None, :] < kept_M[:, None]
    uppers = range((vocabulary - 1) >> 16)
    high = [((ids_MK >> 16 == upper) & places_MK).sum(axis=1) for upper in uppers]
    count = np.uint8 if ids_MK.shape[1] <= 255 else np.uint16
    with np.errstate(divide="ignore"):
        log_tail = np.log(tail_M + omitted_M)
    offsets = np.concatenate([[0], np.cumsum([len(row.tail_N) for row in rows])])
    return {
        "offsets": offsets.astype(np.int64),
        "kept": kept_M.astype(count),
        "low": (ids_MK[places_MK] & 0xFFFF).astype(np.uint16),
        "high": np.stack(high, axis=1).astype(count) if high else np.zeros((len(kept_M), 0), count),
        "logprobs": logprobs_MK[places_MK].astype(np.float16),
        "log_tail": np.ascontiguousarray(log_tail.astype(np.float16)),
    }
