"""Near-duplicates among a sample of rows: MinHash over the shingles that are not the template of the whole set."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from datasketch import MinHash, MinHashLSH

PERMUTATIONS = 64
SIMILARITY = 0.7
_TEMPLATE_SHARE = 0.3
_MIN_SHINGLES = 5


def clusters(sketches: Mapping[int, np.ndarray]) -> list[list[int]]:
    """Groups of two and more rows whose Jaccard similarity is about `SIMILARITY` or above, the largest first.

    `sketches` holds shingle hashes by row number. Shingles in more than 30 % of rows belong to a prompt template and
    are left out; a row with almost nothing else has nothing to compare.
    """
    if len(sketches) < 2:
        return []
    values, counts = np.unique(np.concatenate(list(sketches.values())), return_counts=True)
    template = values[counts > max(2, _TEMPLATE_SHARE * len(sketches))]
    index = MinHashLSH(threshold=SIMILARITY, num_perm=PERMUTATIONS)
    empty = MinHash(num_perm=PERMUTATIONS, hashfunc=int)
    hashes: dict[int, MinHash] = {}
    parent: dict[int, int] = {}
    for number, shingles in sketches.items():
        own = np.setdiff1d(shingles, template, assume_unique=True)
        if len(own) < _MIN_SHINGLES:
            continue
        row = empty.copy()
        row.update_batch(own)
        parent[number] = number
        for other in index.query(row):
            if hashes[other].jaccard(row) >= SIMILARITY:
                parent[_root(parent, number)] = _root(parent, other)
        index.insert(number, row)
        hashes[number] = row
    groups: dict[int, list[int]] = {}
    for number in parent:
        groups.setdefault(_root(parent, number), []).append(number)
    return sorted(
        (sorted(group) for group in groups.values() if len(group) > 1), key=lambda group: (-len(group), group)
    )


def _root(parent: dict[int, int], number: int) -> int:
    while parent[number] != number:
        parent[number] = parent[parent[number]]
        number = parent[number]
    return number
