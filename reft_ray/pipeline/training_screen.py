"""Screening of the training API: every datum is judged as the dialogue that it is before its gradient counts.

What was decided is a JSON record without text. It is stored with the request, and a run after a restart follows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from reft_ray.api.training_wire import Datum
from reft_ray.core.cascade import GuardedVerdict
from reft_ray.core.conversation import Conversation, Message
from reft_ray.core.errors import ReftError
from reft_ray.core.job_threshold import JobThresholdRule
from reft_ray.core.loss_inputs import LEARNED, LossName
from reft_ray.core.verdict import Decision, Thresholds, Verdict
from reft_ray.hf.datum_text import DatumReader, Dialogue
from reft_ray.jobs.training_signals import DataSignals
from reft_ray.pipeline.training_findings import REASON, DataFindings

Judge = Callable[[Sequence[Conversation]], Sequence[Verdict]]
"""A verdict per conversation, in order. Raises where there is none: then nothing counts."""

Record = Mapping[str, Any]
Array = npt.NDArray[Any]
WITHHELD, MASKED = "datum.withheld", "datum.masked"


@dataclass(frozen=True, slots=True)
class Screening:
    """The verdicts on a request's data: the record to store, the scores of its project, its events and signals."""

    record: Record
    scores: Sequence[float]
    events: Sequence[tuple[str, Mapping[str, Any]]]
    signals: DataSignals | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """Whose data are judged: with the data of this session and project before, whose scores are `scores`."""

    project: str
    session: str
    scores: Sequence[float] = ()


class Screen:
    """Judges data; `rule` finds outliers among the project's own scores, None for the operator's thresholds alone.

    `findings` looks at all data of a loop together; None for each datum alone.
    """

    def __init__(
        self,
        reader: DatumReader,
        judge: Judge,
        thresholds: Thresholds,
        rule: JobThresholdRule | None = None,
        findings: DataFindings | None = None,
    ) -> None:
        self._reader, self._judge = reader, judge
        self._thresholds, self._rule, self._findings = thresholds, rule, findings

    def screen(self, data: Sequence[Datum], loss: LossName, source: Source, policy: str) -> Screening:
        """The verdicts on `data`."""
        dialogues = [self.read(datum, loss) for datum in data]
        verdicts = self._verdicts([dialogue.conversation for dialogue in dialogues])
        scores = [score for verdict in verdicts if (score := self._score(verdict)) is not None]
        own = None
        if self._rule is not None:
            own = self._rule.apply([*source.scores, *scores], self._thresholds).own
        found = None
        if self._findings is not None:
            found = self._findings.add(source.project, source.session, [each.conversation for each in dialogues])
        entries: dict[str, Any] = {}
        events = []
        for index, (verdict, dialogue) in enumerate(zip(verdicts, dialogues, strict=True)):
            single = self._reason(verdict, own)
            reason = single or (found and found.reasons[index])
            if not reason:
                continue
            # A finding is about the whole datum.
            spans = self._masked(dialogue, own) if policy == "mask" and single else None
            score = round(verdict.score, 4)
            entries[str(index)] = {"score": score, "reason": reason, "spans": spans}
            data_of = {"datum": index, "score": score, "reason": reason, "decision": str(verdict.decision)}
            events.append((WITHHELD if spans is None else MASKED, data_of))
        record = {
            "judged": len(data),
            "withheld": entries,
            "highest": max((verdict.score for verdict in verdicts), default=-1.0),
            "policy": policy,
        }
        if found is None:
            return Screening(record, scores, events)
        record["findings"] = found.standing
        return Screening(record, scores, [*events, *found.events], found.signals)

    def read(self, datum: Datum, loss: LossName) -> Dialogue:
        """A datum as turns."""
        marks = datum.inputs.get(LEARNED[loss])
        learned = [True] * len(datum) if marks is None else [bool(mark) for mark in marks != 0]
        return self._reader.dialogue(datum.tokens.tolist(), datum.targets.tolist(), learned)

    def refuse_sample(self, prompt: Sequence[int], completions: Sequence[Sequence[int]] = ()) -> None:
        """Raise ReftError for a prompt, or for completions of it, that would be withheld from a chat."""
        asked = self._reader.dialogue(prompt, [*prompt[1:], prompt[-1]], [False] * len(prompt)).conversation
        rows = {"the prompt": asked}
        for index, tokens in enumerate(completions):
            rows[f"sample {index}"] = (*asked, Message("assistant", self._reader.text(tokens)))
        for name, verdict in zip(rows, self._verdicts(list(rows.values())), strict=True):
            if verdict.decision is not Decision.ALLOW:
                raise ReftError(f"{name} is withheld ({verdict.reason}, score {verdict.score:.2f}) by chat_moderation")

    def _verdicts(self, conversations: Sequence[Conversation]) -> Sequence[Verdict]:
        verdicts = self._judge(conversations) if conversations else []
        if len(verdicts) != len(conversations):
            raise RuntimeError(f"{len(verdicts)} verdicts for {len(conversations)} data: nothing counts")
        return verdicts

    def _score(self, verdict: Verdict) -> float | None:
        """The score on the scale of prompts; None where there was no text."""
        if isinstance(verdict, GuardedVerdict):
            return verdict.prompt_score
        return verdict.score_as_prompt(verdict.threshold - self._thresholds.block)

    def _reason(self, verdict: Verdict, own: float | None) -> str | None:
        """Why a datum is withheld: no person decides in a loop, so that what needs review is withheld as well."""
        if verdict.decision is not Decision.ALLOW:
            return verdict.reason
        score = self._score(verdict)
        return "job_threshold" if own is not None and score is not None and score > own else None

    def _masked(self, dialogue: Dialogue, own: float | None) -> list[list[int]] | None:
        """The positions of the turns that are withheld, with the answers to them; None to withhold all of it."""
        turns, spans = dialogue.conversation, dialogue.spans
        found = self._verdicts([(turn,) for turn in turns])
        withheld = [self._reason(verdict, own) is not None for verdict in found]
        if not any(withheld) or any(bad and span is None for bad, span in zip(withheld, spans, strict=True)):
            return None
        masked, asked_for_harm = [], False
        for turn, bad, span in zip(turns, withheld, spans, strict=True):
            if turn.role != "assistant":
                asked_for_harm = bad
            if span is not None and (bad or (turn.role == "assistant" and asked_for_harm)):
                # Position t predicts token t + 1: from the one before the turn to its last.
                masked.append([max(0, span[0] - 1), span[1]])
        return masked


def kept_tokens(record: Record, data: Sequence[Datum]) -> list[Array]:
    """Per datum 1 for each position that counts. Raises RuntimeError for a record of other data."""
    if record["judged"] != len(data):
        raise RuntimeError("the stored verdicts are of other data: nothing counts")
    kept = [np.ones(len(datum), np.float32) for datum in data]
    for index, entry in record["withheld"].items():
        if entry["spans"] is None:
            kept[int(index)][:] = 0
        for first, last in entry["spans"] or ():
            kept[int(index)][first:last] = 0
    return kept


def refuse_if_asked(record: Record) -> None:
    """Raise ReftError for withheld data under the policy `fail`."""
    if record["policy"] == "fail" and record["withheld"]:
        index, entry = next(iter(record["withheld"].items()))
        others = len(record["withheld"]) - 1
        raise ReftError(
            f"data[{index}] is withheld ({entry['reason']}, score {entry['score']:.2f})"
            + (f", and {others} more" if others else "")
            + ": nothing of this request was learned"
        )


def metrics_of(record: Record, kept: Sequence[Array]) -> dict[str, float]:
    """The verdicts in the client's metrics; `unjudged_tokens` is what no verdict covers, and always 0."""
    whole = [entry for entry in record["withheld"].values() if entry["spans"] is None]
    total, unjudged = sum(map(len, kept)), sum(map(len, kept[record["judged"] :]))
    findings = record.get("findings", {})
    return {
        "judged_data:sum": float(record["judged"]),
        "withheld_data:sum": float(len(whole)),
        "masked_data:sum": float(len(record["withheld"]) - len(whole)),
        "withheld_tokens:sum": float(total - sum(float(each.sum()) for each in kept)),
        "unjudged_tokens:sum": float(unjudged),
        "highest_score:max": float(record["highest"]),
        # The client drops what not every part of a split request has: these are always there.
        "findings:max": float(len(findings)),
        "finding_data:sum": float(sum(entry["reason"].startswith(REASON) for entry in record["withheld"].values())),
        **{f"finding_{name}:max": found["share"] for name, found in findings.items()},
    }


def account_of(record: Record, kept: Sequence[Array]) -> dict[str, Any]:
    """What a request adds to its model's account."""
    metrics = metrics_of(record, kept)
    reasons: dict[str, dict[str, int]] = {"withheld": {}, "masked": {}}
    for entry in record["withheld"].values():
        counted = reasons["withheld" if entry["spans"] is None else "masked"]
        counted[entry["reason"]] = counted.get(entry["reason"], 0) + 1
    return {
        "data": record["judged"],
        "tokens": sum(map(len, kept)),
        "withheld_tokens": int(metrics["withheld_tokens:sum"]),
        "unjudged_tokens": int(metrics["unjudged_tokens:sum"]),
        "findings": {name: found["severity"] for name, found in record.get("findings", {}).items()},
        **reasons,
    }
