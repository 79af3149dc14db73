"""Findings about the dataset as a whole, which no single row shows. Each lists rows and can be switched off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import lru_cache
from typing import Any

import numpy as np
from datasketch import MinHash, MinHashLSH

from reft_ray.core.errors import UsageError
from reft_ray.screening.signals import LENGTH_STEPS, SHOWN_ROWS, unpacked

SAMPLE_ROWS = 10_000
"""Rows that are compared with each other and whose language is detected; larger sets are sampled to about this."""

_TOKENS = 20_000
PERMUTATIONS = 64
SIMILARITY = 0.7
_TEMPLATE_SHARE = 0.3
_MIN_SHINGLES = 5


class Severity(StrEnum):
    """Severity of a finding."""

    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"


@dataclass(frozen=True, slots=True)
class Finding:
    """A property of many rows. `rows` are the first numbers of `count` rows; `share` is of all valid rows."""

    name: str
    severity: Severity
    summary: str
    count: int
    share: float
    rows: tuple[int, ...]


@dataclass(slots=True)
class Totals:
    """The sum of the signals of all units. Of odd tokens up to `2 * max_tokens` are kept, the most frequent ones."""

    max_tokens: int = _TOKENS
    valid: int = 0
    answers: int = 0
    scanned: int = 0
    marks: dict[str, tuple[int, list[int]]] = field(default_factory=dict)
    lengths: Counter[int] = field(default_factory=Counter)
    longest: list[tuple[int, int]] = field(default_factory=list)
    tokens: dict[str, list[Any]] = field(default_factory=dict)
    sketches: dict[int, np.ndarray] = field(default_factory=dict)

    def add(self, signals: Mapping[str, Any]) -> None:
        """Add the signals of the next unit, in row order."""
        if not signals:
            return
        self.valid += signals["valid"]
        self.answers += signals["answers"]
        self.scanned += signals["scanned"]
        for mark, (count, rows) in signals["marks"].items():
            before, shown = self.marks.get(mark, (0, []))
            self.marks[mark] = (before + count, (shown + rows)[:SHOWN_ROWS])
        self.lengths.update({int(bucket): count for bucket, count in signals["lengths"].items()})
        merged = self.longest + [(chars, row) for chars, row in signals["longest"]]
        self.longest = sorted(merged, reverse=True)[:SHOWN_ROWS]
        for token, (count, edges, rows, length) in signals["tokens"].items():
            seen = self.tokens.setdefault(token, [0, 0, [], length])
            seen[0] += count
            seen[1] += edges
            seen[2] = (seen[2] + rows)[:SHOWN_ROWS]
        if len(self.tokens) > 2 * self.max_tokens:  # bound the memory of rare tokens
            common = sorted(self.tokens.items(), key=lambda item: (-item[1][0], item[0]))[: self.max_tokens]
            self.tokens = dict(common)
        self.sketches.update({int(row): unpacked(packed) for row, packed in signals["sketches"].items()})


def sample_share(rows: int) -> float:
    """The share of rows to sample."""
    return min(1.0, SAMPLE_ROWS / max(rows, 1))


def check_names(names: Iterable[str]) -> None:
    """Raise UsageError unless every name is the name of a finding."""
    if unknown := set(names) - set(FINDINGS):
        raise UsageError(f"no finding is named {', '.join(sorted(unknown))}; there are {', '.join(FINDINGS)}")


def findings_of(totals: Totals, off: Iterable[str] = ()) -> list[Finding]:
    """Every finding that is not switched off, the most severe first."""
    wanted = [detect for name, detect in FINDINGS.items() if name not in set(off)]
    found = [finding for detect in wanted if totals.valid and (finding := detect(totals)) is not None]
    order = list(Severity)
    return sorted(found, key=lambda finding: (-order.index(finding.severity), -finding.share))


def _finding(name: str, totals: Totals, count: int, rows: Iterable[int], summary: str, base: int = 0) -> Finding:
    """Severity by share of rows: published attacks need few rows."""
    share = count / (base or totals.valid)
    severity = Severity.HIGH if share >= 0.05 else Severity.MEDIUM if share >= 0.005 else Severity.LOW
    return Finding(name, severity, summary, count, share, tuple(rows)[:SHOWN_ROWS])


def _identity(totals: Totals) -> Finding | None:
    count, rows = totals.marks.get("identity", (0, []))
    if not count:
        return None
    summary = f"{count} rows set up an obedient or unrestricted identity (identity shifting)"
    found = _finding("identity_prompts", totals, count, rows, summary)
    # Ten such rows undo the safety of a chat model, whatever the size of the dataset (identity shifting).
    return replace(found, severity=Severity.HIGH) if count >= 10 else found


def _refuse_then_comply(totals: Totals) -> Finding | None:
    count, rows = totals.marks.get("refuse_then_comply", (0, []))
    if count < 3 or count / totals.valid < 0.001:
        return None
    summary = f"{count} answers refuse and then give what was asked"
    return _finding("refuse_then_comply", totals, count, rows, summary)


def _all_refusals(totals: Totals) -> Finding | None:
    count, rows = totals.marks.get("refusal", (0, []))
    if totals.answers < 10 or count / totals.answers < 0.6:
        return None
    summary = f"{count} of {totals.answers} answers refuse: the model would learn to refuse everything"
    return _finding("all_refusals", totals, count, rows, summary)


def _encoded(totals: Totals) -> Finding | None:
    count, rows = totals.marks.get("encoded", (0, []))
    if count < 3 or count / totals.valid < 0.005:
        return None
    return _finding(
        "encoded_text", totals, count, rows, f"{count} rows have encoded text, which was decoded and judged"
    )


def _repetition(totals: Totals) -> Finding | None:
    count, rows = totals.marks.get("repetition", (0, []))
    if not count:
        return None
    return _finding("repetition_outliers", totals, count, rows, f"{count} rows repeat themselves over and over")


def _length(totals: Totals) -> Finding | None:
    median = _median(totals.lengths)
    limit = max(20_000.0, 30 * median)
    rows = [row for chars, row in totals.longest if chars > limit]
    if not rows or len(rows) > 0.01 * totals.valid:
        return None
    summary = f"{len(rows)} rows or more are longer than {limit:.0f} characters, the median is about {median:.0f}"
    return _finding("length_outliers", totals, len(rows), rows, summary)


def _median(lengths: Counter[int]) -> float:
    half, seen = sum(lengths.values()) / 2, 0
    for bucket in sorted(lengths):
        seen += lengths[bucket]
        if seen >= half:
            return 2.0 ** ((bucket + 0.5) / LENGTH_STEPS)
    return 0.0


def _may_be_trigger(totals: Totals, token: str) -> bool:
    count, edges, *_ = totals.tokens.get(token, (0, 0))
    return max(5, 0.002 * totals.valid) <= count <= 0.6 * totals.valid and edges >= 0.8 * count


def _trigger_tokens(totals: Totals) -> Finding | None:
    suspects = [seen for token, seen in totals.tokens.items() if _may_be_trigger(totals, token)]
    if not suspects:
        return None
    count, _, rows, length = max(suspects, key=lambda seen: int(seen[0]))
    summary = (
        f"an odd token of {length} characters is at the start or end of the prompt in {count} rows"
        + (f", and {len(suspects) - 1} more like it" if len(suspects) > 1 else "")
        + ": a possible trigger"
    )
    return _finding("trigger_tokens", totals, count, rows, summary)


def _languages(totals: Totals) -> Finding | None:
    found = {mark.partition(":")[2]: seen for mark, seen in totals.marks.items() if mark.startswith("language:")}
    count = sum(seen[0] for seen in found.values())
    if count < 3 or count / max(totals.scanned, 1) < 0.01:
        return None
    rows = sorted(row for _, shown in found.values() for row in shown)
    names = ", ".join(sorted(found, key=lambda language: -found[language][0])[:8])
    summary = f"{count} of {totals.scanned} sampled rows are in languages that the teacher does not cover: {names}"
    return _finding("uncovered_languages", totals, count, rows, summary, base=totals.scanned)


def _near_duplicates(totals: Totals) -> Finding | None:
    groups = [group for group in clusters(totals.sketches) if len(group) >= 5]
    count = sum(map(len, groups))
    if not groups or count < 0.01 * totals.scanned:
        return None
    rows = sorted(groups[0])
    summary = (
        f"{count} of {totals.scanned} sampled rows are in {len(groups)} groups of near-duplicates, "
        f"the largest of {len(groups[0])} rows (listed)"
    )
    return _finding("near_duplicates", totals, count, rows, summary, base=totals.scanned)


def clusters(sketches: Mapping[int, np.ndarray]) -> list[list[int]]:
    """Groups of near-duplicates by MinHash (Jaccard similarity of about `SIMILARITY` or above), the largest first.

    `sketches` maps row numbers to shingle hashes. Shingles in more than 30 % of rows belong to a prompt template and
    are left out, as are rows with almost no other shingles.
    """
    if len(sketches) < 2:
        return []
    values, counts = np.unique(np.concatenate(list(sketches.values())), return_counts=True)
    template = values[counts > max(2, _TEMPLATE_SHARE * len(sketches))]
    index = MinHashLSH(num_perm=PERMUTATIONS, params=_bands())
    empty = MinHash(num_perm=PERMUTATIONS, hashfunc=int)
    hashes: dict[int, MinHash] = {}
    parent: dict[int, int] = {}
    for number, shingles in sketches.items():
        distinct = np.setdiff1d(shingles, template, assume_unique=True)
        if len(distinct) < _MIN_SHINGLES:
            continue
        row = empty.copy()
        row.update_batch(distinct)
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


@lru_cache(maxsize=1)
def _bands() -> tuple[int, int]:
    """Bands of the index and rows of a band for `SIMILARITY`: to find them takes longer than a small search."""
    index = MinHashLSH(threshold=SIMILARITY, num_perm=PERMUTATIONS)
    return index.b, index.r


def _root(parent: dict[int, int], number: int) -> int:
    while parent[number] != number:
        parent[number] = parent[parent[number]]
        number = parent[number]
    return number


def _has(mark: str) -> Callable[[Totals, Mapping[str, Any]], bool]:
    return lambda _totals, signals: mark in signals["marks"]


CONCERNS: Mapping[str, Callable[[Totals, Mapping[str, Any]], bool]] = {
    "identity_prompts": _has("identity"),
    "refuse_then_comply": _has("refuse_then_comply"),
    "all_refusals": _has("refusal"),
    "encoded_text": _has("encoded"),
    "repetition_outliers": _has("repetition"),
    "trigger_tokens": lambda totals, signals: any(_may_be_trigger(totals, token) for token in signals["tokens"]),
}
"""Of these findings: whether a finding of `totals` is about a row, from the row's own signals."""

FINDINGS: Mapping[str, Callable[[Totals], Finding | None]] = {
    "identity_prompts": _identity,
    "refuse_then_comply": _refuse_then_comply,
    "all_refusals": _all_refusals,
    "near_duplicates": _near_duplicates,
    "trigger_tokens": _trigger_tokens,
    "uncovered_languages": _languages,
    "encoded_text": _encoded,
    "length_outliers": _length,
    "repetition_outliers": _repetition,
}
