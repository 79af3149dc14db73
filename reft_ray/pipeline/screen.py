"""Screen the training file; report withheld rows to their owner and keep them for review."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from typing import Any

from reft_ray.core.errors import BlockedByPolicyError, StoppedError
from reft_ray.guards.settings import load_guards
from reft_ray.hf.ref_teacher import load_scorer
from reft_ray.hf.row_check import TemplateCheck
from reft_ray.jobs.results import REJECTED_SECONDS, Screening
from reft_ray.jobs.review import State
from reft_ray.jobs.run import JobRun
from reft_ray.pipeline.model_context import ModelContext
from reft_ray.pipeline.review_rows import file_for_review, json_line, parts_of, withheld_lines
from reft_ray.pipeline.run_config import thresholds_of
from reft_ray.pipeline.uploaded_rows import control_tokens, uploaded
from reft_ray.rows.format import Format
from reft_ray.screening.config import Policy, ScreenConfig
from reft_ray.screening.dataset import Progress, screen
from reft_ray.screening.kept_rows import kept_hash
from reft_ray.screening.metrics import ScreeningMetrics
from reft_ray.screening.report import load_report
from reft_ray.screening.reviews import Action, Reviews
from reft_ray.screening.reviews import Review as ReviewedRow

REPORT = "screening_report.jsonl"
QUARANTINE = "quarantine.jsonl"
FIRST_LINES = 10
_SHOWN = (
    "line", "id", "decision", "reason", "part", "span", "encoding", "score", "threshold", "teacher", "decided_by",
    "guard_score", "categories", "hazards", "policy",
)  # fmt: skip


def screening_folder(run: JobRun) -> str:
    """A job's screening output, which is deleted when the job ends."""
    return f"{run.scratch}/screening"


def screen_file(run: JobRun, context: ModelContext) -> Screening:
    """Screen the training file with the base model's teacher; resumes after a crash."""
    spec, args = run.job.spec, context.args.screening
    config = ScreenConfig(
        format=Format(spec.options.format) if spec.options.format else None,
        columns=spec.options.columns,
        speakers=spec.options.speakers,
        control_tokens=control_tokens(context.base),
        row_check=partial(TemplateCheck, context.base),
        thresholds=thresholds_of(spec.options, context.teacher.manifest.thresholds),
        # `jobs.lifecycle` applies the job's policy; here it only decides whether rows wait for review.
        policy=Policy.REVIEW if spec.options.policy == "review" else Policy.FILTER,
        job_threshold=args.job_threshold,
        job_threshold_floor=args.job_threshold_floor,
        guards=partial(load_guards, args.cascade.guards) if args.cascade.guards else None,
        guard_combine=args.cascade.combine,
        guard_order=args.cascade.order,
        findings=args.findings,
        batch_rows=args.batch_rows,
        small_rows=args.small_rows,
        actors=args.actors,
        cpus_per_actor=args.cpus_per_actor,
        gpus_per_actor=args.gpus_per_actor,
    )

    def check_stop(_: Progress) -> None:
        if run.should_stop():
            raise StoppedError("stop requested")

    folder = screening_folder(run)
    metrics = ScreeningMetrics(run.recorder, run.job.project_id, context.teacher.manifest.histogram)
    source = uploaded(run, spec.training_file)
    # The output is complete in this case too; `jobs.lifecycle` decides what follows.
    with suppress(BlockedByPolicyError):
        screen(
            [source], folder, partial(load_scorer, context.teacher.folder, context.base), config, check_stop, metrics
        )
    result = _result(run, context)
    file_for_review(run, folder, result.quarantine_file, args.kept_sample)
    return result


def review_decisions(run: JobRun, context: ModelContext) -> Screening:
    """Add the rows that people approved to the kept ones, with who approved them and why."""
    folder = screening_folder(run)
    Reviews(folder).record(
        ReviewedRow(
            time=datetime.fromtimestamp(review.decided_at or 0.0, UTC).isoformat(timespec="seconds"),
            row_number=review.row_number,
            id=review.content_id,
            action=Action.APPROVE if review.state is State.APPROVED else Action.REJECT,
            reviewer=" and ".join(filter(None, (review.first_by, review.reviewer))),
            reason=f"{review.code}: {review.comment} ({review.id})",
        )
        for review in run.decisions()
    )
    return _result(run, context)


def _result(run: JobRun, context: ModelContext) -> Screening:
    folder = screening_folder(run)
    report = load_report(folder)
    approved = [row for row in Reviews(folder).items(True) if row["review"]["action"] == Action.APPROVE]
    released = {name: sum(row["decision"] == name for row in approved) for name in ("review", "block")}
    quarantine = None
    if report.counts.withheld and context.args.screening.withheld == "text":
        quarantine = run.save_file(
            QUARANTINE, withheld_lines(folder), parent_id=run.job.spec.training_file, expires_after=REJECTED_SECONDS
        )
    return Screening(
        rows=report.rows,
        kept=report.kept + len(approved),
        review=report.review - released["review"],
        blocked=report.blocked - released["block"],
        invalid=report.invalid,
        kept_uri=folder,
        first_lines=tuple(islice((row["line"] for row in _not_approved(folder)), FIRST_LINES)),
        report_file=run.save_file(REPORT, _report_lines(folder)),
        quarantine_file=quarantine,
        teacher_id=str(report.judges.get("teacher", "")),
        kept_sha256=kept_hash(folder),
    )


def _not_approved(folder: str) -> Iterator[dict[str, Any]]:
    for row in Reviews(folder).items():
        if row["review"] is None or row["review"]["action"] != Action.APPROVE:
            yield row


def _report_lines(folder: str) -> Iterator[bytes]:
    """A summary, then one line per row that is not kept: numbers and codes, never text."""
    report = load_report(folder)
    counts = {name: getattr(report, name) for name in ("rows", "kept", "review", "blocked", "invalid")}
    findings = [{"name": found.name, "severity": str(found.severity), "rows": found.rows} for found in report.findings]
    summary: dict[str, Any] = {"summary": counts, "judges": dict(report.judges), "findings": findings}
    summary["histogram"] = list(report.histogram)
    if (found := report.job_threshold) is not None:
        summary["job_threshold"] = {"own": found.own, "fallback": found.fallback, "rows": found.rows}
        summary["histogram"] = list(found.histogram)
    yield json_line(summary)
    for output, part in parts_of(folder):
        if part.startswith("quarantine/"):
            yield from (json_line(row) for row in output.table(part, _SHOWN).to_pylist())
        elif part.startswith("invalid/"):
            for row in output.table(part, ("line", "code", "path")).to_pylist():
                shown = {"line": row["line"], "decision": "invalid", "reason": row["code"], "part": row["path"]}
                yield json_line(shown)
