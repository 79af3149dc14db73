"""Screening files as they appear in a directory or bucket, each of them once."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import orjson

from reft_ray.core.errors import BlockedByPolicyError, UsageError
from reft_ray.core.scoring import Scorer
from reft_ray.screening.config import ScorerFactory, ScreenConfig
from reft_ray.screening.dataset import screen
from reft_ray.screening.guards import Teacher
from reft_ray.screening.metrics import ScreeningMetrics
from reft_ray.screening.outputs import Output
from reft_ray.screening.report import REPORT
from reft_ray.screening.sources import files_at, source_of, stamp_of

REFUSED = "refused.json"
"""Why a file cannot be read; it is read again when it changes."""
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class Seen:
    """One file that is done: its output, and why it or its dataset was refused (empty where it passed)."""

    name: str
    out: str
    refused: str = ""


def watch(
    inputs: Sequence[str],
    out: str,
    scorer_factory: ScorerFactory,
    config: ScreenConfig,
    done: Callable[[Seen], None],
    *,
    every: float = 5.0,
    stop: Callable[[], bool] = lambda: False,
    metrics: ScreeningMetrics | None = None,
) -> None:
    """Screen every file of the inputs that is there or appears, until `stop`, and call `done` after each.

    Each version of a file has an output directory of its own in `out`, whose report is written last: a watch that was
    killed resumes the file at which it was, and no file is screened twice. A file is taken once its size and time of
    change were the same `every` seconds before. Files that cannot be read are refused with the reason and kept apart
    from the others. Raises ReftError where the scorer fails.
    """
    factory = KeptScorer(scorer_factory)
    before: dict[str, tuple[int, int]] = {}
    while not stop():
        now: dict[str, tuple[int, int]] = {}
        for uri, name in (file for item in inputs for file in files_at(item)):
            now[uri] = stamp_of(uri)
            folder = Output(out).uri_of(folder_of(uri, name, now[uri]))
            if before.get(uri) == now[uri] and not _is_done(folder) and not stop():
                done(_screened(uri, name, folder, factory, config, metrics))
        before = now
        if not stop():
            time.sleep(every)


def folder_of(uri: str, name: str, stamp: tuple[int, int]) -> str:
    """The name of a file's output directory; another version of the file has another one."""
    version = hashlib.sha256(f"{uri}\n{stamp}".encode()).hexdigest()[:12]
    return f"{_UNSAFE.sub('_', name.rpartition('/')[2])[:80]}-{version}"


def _is_done(folder: str) -> bool:
    output = Output(folder)
    return any(output.has(name) for name in (REPORT, REFUSED))


def _screened(
    uri: str, name: str, folder: str, factory: ScorerFactory, config: ScreenConfig, metrics: ScreeningMetrics | None
) -> Seen:
    try:
        screen([source_of(uri, name, config.container)], folder, factory, config, metrics=metrics)
    except BlockedByPolicyError as refusal:
        return Seen(name, folder, str(refusal))
    except UsageError as fault:
        Output(folder).write(REFUSED, orjson.dumps({"file": name, "reason": str(fault)}))
        return Seen(name, folder, str(fault))
    return Seen(name, folder)


class KeptScorer:
    """A scorer factory that loads its scorer once in a process, for one file after the other."""

    def __init__(self, factory: ScorerFactory) -> None:
        self._factory = factory
        self._scorer: Scorer | Teacher | None = None

    def __call__(self) -> Scorer | Teacher:
        if self._scorer is None:
            self._scorer = self._factory()
        return self._scorer

    def __reduce__(self) -> tuple[type[KeptScorer], tuple[ScorerFactory]]:
        return KeptScorer, (self._factory,)
