"""Findings over the data of training loops: those of screened files, over the last data of a session and a project.

A loop has no file: its dataset is what it has sent. Nothing is kept of a datum but its signals and a hash.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reft_ray.core.conversation import Conversation
from reft_ray.core.decoding import readings
from reft_ray.core.errors import UsageError
from reft_ray.jobs.training_signals import DATA_KEPT, SLACK, DataSignals
from reft_ray.screening.findings import CONCERNS, FINDINGS, Finding, Severity, Totals, check_names, findings_of
from reft_ray.screening.signals import Inspector

Load = Callable[[str, str | None], Iterable[DataSignals]]
"""The stored signals of a project, or of one of its sessions."""

FOUND, REASON = "dataset.finding", "finding:"
DATUM_TOKENS = 32
"""Odd tokens of a datum that are counted, the first ones by edge and frequency."""
SCOPE_TOKENS = 2000
SCOPES = 32
"""Sessions and projects whose sums are in memory; the others are summed again from their stored signals."""
SKETCHES = 500
"""Data of a scope among which near-duplicates are searched, the last different ones: the search takes the most time."""
FRESH = 0.5
"""The share of them that must be new before they are searched again."""
_SEVERITIES = list(Severity)


def check_withheld(names: Collection[str]) -> None:
    """Raise UsageError unless these are findings whose data are known one by one."""
    check_names(names)
    if unknown := set(names) - set(CONCERNS):
        raise UsageError(
            f"the data of {', '.join(sorted(unknown))} cannot be withheld; those of {', '.join(CONCERNS)} can"
        )


@dataclass(frozen=True, slots=True)
class Found:
    """What the findings say of a request's data.

    `reasons` are the findings of severity medium or higher that concern each datum and withhold it; `standing` has
    every finding's severity and share by name, `events` those that are new or more severe than before.
    """

    reasons: Sequence[str | None]
    standing: Mapping[str, Mapping[str, Any]]
    events: Sequence[tuple[str, Mapping[str, Any]]]
    signals: DataSignals


class _Scope:
    """The sum of the signals of one session or project."""

    def __init__(self, name: str, stored: Iterable[DataSignals]) -> None:
        self.name = name
        self.totals = Totals(SCOPE_TOKENS)
        self.reported: dict[str, str] = {}
        self.sent = 0
        self._seen: set[str] = set()
        self._near: Finding | None = None
        self._fresh = 0
        for request in stored:
            for signals in request.data:
                self.add(signals)
            self.reported |= {finding: severity for scope, finding, severity in request.reported if scope == name}

    def add(self, signals: Mapping[str, Any]) -> None:
        """Add a datum. One that was there before is not a new row: a loop may have several epochs."""
        self.sent += 1
        if signals["hash"] in self._seen:
            marks = {mark: found for mark, found in signals["marks"].items() if not mark.startswith("language:")}
            nothing: dict[str, Any] = {"lengths": {}, "longest": [], "tokens": {}, "sketches": {}}
            self.totals.add({**signals, **nothing, "marks": marks, "scanned": 0})
            return
        self._seen.add(signals["hash"])
        (packed,) = signals["sketches"].values()
        self.totals.add({**signals, "sketches": {self.sent: packed}})
        self._fresh += 1
        sketches = self.totals.sketches
        while len(sketches) > SKETCHES:
            del sketches[next(iter(sketches))]

    def findings(self, off: Collection[str]) -> dict[str, Finding]:
        """The findings by name."""
        found = {finding.name: finding for finding in findings_of(self.totals, {*off, "near_duplicates"})}
        if "near_duplicates" not in off:
            sketches = self.totals.sketches
            if self._fresh and self._fresh >= FRESH * len(sketches):
                self._fresh = 0
                near = findings_of(replace(self.totals, scanned=len(sketches)), set(FINDINGS) - {"near_duplicates"})
                self._near = near[0] if near else None
            if self._near is not None:
                found["near_duplicates"] = self._near
        return found


class DataFindings:
    """Findings of the loops on one base model. Not thread-safe.

    `withhold` are the names of findings whose data have no gradient, `off` those that are not looked for.
    """

    def __init__(
        self,
        load: Load,
        withhold: Collection[str] = (),
        off: Collection[str] = (),
        languages: frozenset[str] = frozenset({"en"}),
    ) -> None:
        check_withheld(withhold)
        check_names(off)
        self._load, self._withhold, self._off = load, frozenset(withhold) - frozenset(off), frozenset(off)
        self._inspector = Inspector(languages, readings)
        self._scopes: OrderedDict[tuple[str, str | None], _Scope] = OrderedDict()

    def add(self, project: str, session: str, conversations: Sequence[Conversation]) -> Found:
        """Add a request's data to those of its session and project; what the findings over both say of them."""
        data = [self._signals(conversation) for conversation in conversations]
        scopes = [self._scope(project, session), self._scope(project, None)]
        for scope in scopes:
            for signals in data:
                scope.add(signals)
        reasons: list[str | None] = [None] * len(data)
        standing: dict[str, dict[str, Any]] = {}
        events, reported = [], []
        # A project with one session has the same data twice.
        for scope in scopes[:1] if scopes[0].sent == scopes[1].sent else scopes:
            for name, finding in scope.findings(self._off).items():
                severity = str(finding.severity)
                known = standing.get(name)
                if known is None or _rank(severity) > _rank(known["severity"]):
                    standing[name] = {"severity": severity, "share": round(finding.share, 4), "scope": scope.name}
                if name not in scope.reported or _rank(severity) > _rank(scope.reported[name]):
                    scope.reported[name] = severity
                    reported.append((scope.name, name, severity))
                    events.append((FOUND, {"finding": name, "count": finding.count, **_shown(finding, scope)}))
                if name in self._withhold and _rank(severity) >= _rank(Severity.MEDIUM):
                    for place, signals in enumerate(data):
                        if reasons[place] is None and CONCERNS[name](scope.totals, signals):
                            reasons[place] = f"{REASON}{name}"
        if scopes[1].sent > SLACK * DATA_KEPT:
            # What is stored is cut to the last data now: sum them again.
            self._scopes.clear()
        return Found(reasons, standing, events, DataSignals(session, data, reported))

    def _signals(self, conversation: Conversation) -> dict[str, Any]:
        texts = "\0".join(f"{turn.role}\0{turn.content}" for turn in conversation)
        signals = self._inspector.signals([(0, conversation)])
        tokens = sorted(signals["tokens"].items(), key=lambda item: (-item[1][1], -item[1][0], item[0]))
        signals["tokens"] = dict(tokens[:DATUM_TOKENS])
        signals["hash"] = hashlib.sha256(texts.encode("utf-8", "replace")).hexdigest()[:16]
        return signals

    def _scope(self, project: str, session: str | None) -> _Scope:
        key = (project, session)
        if key not in self._scopes:
            name = "project" if session is None else "session"
            self._scopes[key] = _Scope(name, self._load(project, session))
        self._scopes.move_to_end(key)
        while len(self._scopes) > SCOPES:
            self._scopes.popitem(last=False)
        return self._scopes[key]


def _rank(severity: str) -> int:
    return _SEVERITIES.index(Severity(severity))


def _shown(finding: Finding, scope: _Scope) -> dict[str, Any]:
    return {
        "severity": str(finding.severity),
        "share": round(finding.share, 4),
        "scope": scope.name,
        "summary": finding.summary,
    }
