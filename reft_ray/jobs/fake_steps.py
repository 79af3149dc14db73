"""Deterministic steps without a model, for tests and for dry runs of the service.

A row is blocked when it contains one of `BLOCKED` and withheld for review when it contains one of `REVIEW`. Training
counts to `train_steps`, saves a checkpoint every `checkpoint_every` steps and resumes from the last one.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from reft_ray.core.errors import StoppedError
from reft_ray.jobs.files import job_key
from reft_ray.jobs.results import REJECTED_SECONDS, Evaluation, Export, GateCheck, Screening, Training, Validation
from reft_ray.jobs.review import FiledRow, Kind, State
from reft_ray.jobs.run import JobRun

BLOCKED = ("bomb", "poison")
REVIEW = ("knife",)
THRESHOLDS = {"review": 0.25, "block": 0.5}
BINS = 40


@dataclass(frozen=True, slots=True)
class FakeSteps:
    """`step_seconds` is the duration of a training step; `harmful_score` is the gate's measurement; the first
    `kept_sample` kept rows are the sample for people."""

    train_steps: int = 10
    checkpoint_every: int = 5
    step_seconds: float = 0.0
    harmful_score: float = 1.0
    kept_sample: int = 0

    def validate(self, run: JobRun) -> Validation:
        bad = [number for number, line in enumerate(_lines(run), 1) if not _is_row(line)]
        rows = sum(1 for _ in _lines(run))
        return Validation(rows, rows * 8, len(bad), tuple(bad[:10]), "missing_messages_list" if bad else None)

    def screen(self, run: JobRun, validation: Validation) -> Screening:
        decisions = [(number, _decision(line), line) for number, line in enumerate(_lines(run), 1)]
        kept = [line for _, decision, line in decisions if decision == "kept"]
        rejected = [(number, decision, line) for number, decision, line in decisions if decision != "kept"]
        summary = {
            "summary": {"rows": len(decisions), "kept": len(kept)},
            "judges": {"teacher": "fake", "thresholds": THRESHOLDS},
            "histogram": _histogram([_score(decision, line) for _, decision, line in decisions]),
        }
        report = [summary, *({"line": number, "decision": decision} for number, decision, _ in rejected)]
        quarantine = _save_rows(run, "quarantine.jsonl", [line for _, _, line in rejected])
        if quarantine is not None:
            run.file_reviews(_filed(Kind.WITHHELD, quarantine, rejected))
        sample = [item for item in decisions if item[1] == "kept"][: self.kept_sample]
        sampled = _save_rows(run, "kept_sample.jsonl", [line for _, _, line in sample])
        if sampled is not None:
            run.file_reviews(_filed(Kind.KEPT, sampled, sample))
        return Screening(
            rows=len(decisions),
            kept=len(kept),
            review=sum(decision == "review" for _, decision, _ in rejected),
            blocked=sum(decision == "block" for _, decision, _ in rejected),
            kept_uri=_write(run, "scratch/kept.jsonl", b"\n".join(kept)),
            first_lines=tuple(number for number, _, _ in rejected[:10]),
            report_file=run.save_file("screening_report.jsonl", [json.dumps(line).encode() + b"\n" for line in report]),
            quarantine_file=quarantine,
            teacher_id="fake",
            kept_sha256=hashlib.sha256(b"\n".join(kept)).hexdigest(),
        )

    def review(self, run: JobRun, screening: Screening) -> Screening:
        approved = [review.decision for review in run.decisions() if review.state is State.APPROVED]
        counts = {name: approved.count(name) for name in ("review", "block")}
        return replace(
            screening,
            kept=screening.kept + len(approved),
            review=screening.review - counts["review"],
            blocked=screening.blocked - counts["block"],
        )

    def train(self, run: JobRun, screening: Screening) -> Training:
        saved = run.checkpoints
        start = saved[0].step_number if saved else 0
        for step in range(start + 1, self.train_steps + 1):
            if run.wait(self.step_seconds) if self.step_seconds else run.should_stop():
                raise StoppedError(f"{run.job.id}: asked to stop")
            values = self._values(step, run.job.spec.validation_file is not None)
            run.metrics(step, self.train_steps, values)
            if step % self.checkpoint_every == 0:
                uri = _write(run, f"checkpoint-{step}", str(step).encode())
                run.checkpoint(step, uri, {"step": float(step), **values})
        steps = range(1, self.train_steps + 1)
        table = "".join(f"{step},{2.0 / step:.4f},{step / self.train_steps:.4f}\n" for step in steps)
        return Training(
            adapter_uri=_write(run, "adapter", b"weights"),
            steps=self.train_steps,
            trained_tokens=screening.kept * 8,
            result_file=run.save_file("step_metrics.csv", [b"step,train_loss,train_accuracy\n", table.encode()]),
        )

    def _values(self, step: int, validated: bool) -> dict[str, float]:
        values = {"train_loss": 2.0 / step, "train_mean_token_accuracy": step / self.train_steps}
        if validated and step % self.checkpoint_every == 0:
            values |= {"valid_loss": 3.0 / step, "valid_mean_token_accuracy": step / self.train_steps}
        return values

    def evaluate(self, run: JobRun, training: Training) -> Evaluation:
        limit = run.job.spec.options.gate.get("harmful_score", 5.0)
        score = self.harmful_score
        return Evaluation((GateCheck("harmful_score", "at_most", limit, score, 0.5, score <= limit),))

    def export(self, run: JobRun, screening: Screening, training: Training, evaluation: Evaluation) -> Export:
        return Export(_write(run, "export/adapter_model.safetensors", b"weights").rpartition("/")[0])


def _save_rows(run: JobRun, name: str, lines: list[bytes]) -> str | None:
    if not lines:
        return None
    content = [line + b"\n" for line in lines]
    return run.save_file(name, content, parent_id=run.job.spec.training_file, expires_after=REJECTED_SECONDS)


def _filed(kind: Kind, file_id: str, rows: list[tuple[int, str, bytes]]) -> Iterator[FiledRow]:
    """Rows for people; those that differ in digits only are near-duplicates."""
    offset = 0
    for number, decision, line in rows:
        digest = hashlib.sha256(re.sub(rb"\d", b"", line)).hexdigest()
        score = None if kind is Kind.KEPT else _score(decision, line)
        yield FiledRow(
            kind=kind,
            row_number=number,
            line=number,
            content_id=f"row-{hashlib.sha256(line).hexdigest()[:24]}",
            decision="allow" if kind is Kind.KEPT else decision,
            reason="kept" if kind is Kind.KEPT else f"score_above_{decision}",
            text_file=file_id,
            text_offset=offset,
            text_bytes=len(line),
            cluster=digest[:24],
            part="" if kind is Kind.KEPT else "messages[0].user",
            score=score,
            probability=score,
            threshold=THRESHOLDS.get(decision),
            teacher="fake",
            judge="teacher",
        )
        offset += len(line) + 1


def _score(decision: str, line: bytes) -> float:
    """A score on the right side of the thresholds, which the row's bytes choose."""
    share = hashlib.sha256(line).digest()[0] / 256
    return THRESHOLDS.get(decision, -0.6) + share / (4 if decision != "kept" else 2)


def _histogram(scores: list[float]) -> list[int]:
    bins = [0] * BINS
    for score in scores:
        bins[int((score + 1) / 2 * BINS)] += 1
    return bins


def make(**options: float) -> FakeSteps:
    """The factory for a driver's configuration."""
    return FakeSteps(**options)  # type: ignore[arg-type]


def _lines(run: JobRun) -> Iterator[bytes]:
    content = b"".join(run.files.read(run.job.spec.training_file, run.job.project_id))
    return (line for line in content.split(b"\n") if line.strip())


def _is_row(line: bytes) -> bool:
    try:
        return "messages" in json.loads(line)
    except (ValueError, TypeError):
        return False


def _decision(line: bytes) -> str:
    if any(word.encode() in line for word in BLOCKED):
        return "block"
    return "review" if any(word.encode() in line for word in REVIEW) else "kept"


def _write(run: JobRun, name: str, data: bytes) -> str:
    key = f"{job_key(run.job.project_id, run.job.id)}/{name}"
    run.files.content.write(key, [data])
    return run.files.content.uri(key)
