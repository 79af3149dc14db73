"""The lifecycle of a job, from its files to its model; see `run_job`.

    validating_files   validate, screen, (review by people)     a driver runs
    queued             waits for a slot                         no driver
    running            train, evaluate, export                  a driver runs

A driver may die anywhere. The next one runs `run_job` from the start; finished steps return their recorded results.
"""

from __future__ import annotations

from dataclasses import asdict

from reft_ray.core.errors import StoppedError
from reft_ray.jobs.errors import LeaseLostError
from reft_ray.jobs.job import Event, Options, Status
from reft_ray.jobs.releases import ReleaseState
from reft_ray.jobs.results import Evaluation, Export, Screening, Training, Validation, finite
from reft_ray.jobs.run import JobFailedError, JobRun
from reft_ray.jobs.steps import Steps
from reft_ray.telemetry import catalog
from reft_ray.telemetry.recorder import NullRecorder, Recorder

UNSAFE_DATA = "unsafe_training_data"
INVALID_FILE = "invalid_training_file"
UNSAFE_MODEL = "unsafe_model"
SUITE = "release"
"""The release gate's suite, as a metrics label."""


def run_job(run: JobRun, steps: Steps, recorder: Recorder | None = None, sign_releases: bool = False) -> None:
    """Run the job until it ends. Raises StoppedError when it has to wait.

    With `sign_releases`, a model that fails the gate waits for two people, who release or refuse it.
    """
    recorder = recorder or NullRecorder()
    try:
        validation = run.once(
            "validate", Validation, lambda: steps.validate(run), event_of=_validated, result_files=_report
        )
        refuse_invalid_files(validation, run.job.spec.options)

        screening = run.once(
            "screen",
            Screening,
            lambda: steps.screen(run, validation),
            event_of=_screened,
            result_files=lambda result: [result.report_file, result.quarantine_file],
        )
        if screening.withheld and _reviewed(run):
            before = screening
            if not run.done("review") and run.job.spec.options.policy == "review":
                run.ask_people(_review_requested(screening))
            screening = run.once("review", Screening, lambda: steps.review(run, before), event_of=_screened)
        if screening.lost_rows:
            recorder.count(catalog.UNACCOUNTED_ROWS, screening.lost_rows, where="screening")
        refuse_unsafe_data(screening, run.job.spec.options)

        if run.job.status is Status.VALIDATING:
            run.park(Status.QUEUED, Event("Files validated and screened, job queued"))

        training = run.once(
            "train",
            Training,
            lambda: steps.train(run, screening),
            result_files=lambda result: [result.result_file, result.kept_file],
            trained_tokens=lambda result: result.trained_tokens,
        )

        measured_before = run.done("evaluate")
        try:
            evaluation = run.once(
                "evaluate", Evaluation, lambda: steps.evaluate(run, training), event_of=_evaluated, result_files=_report
            )
        except (StoppedError, LeaseLostError, JobFailedError):
            raise
        except Exception:
            recorder.count(catalog.SAFETY_EVALS, suite=SUITE, outcome="failed")
            recorder.count(catalog.GATE_RESULTS, result="error")
            raise
        if not measured_before:
            recorder.count(catalog.SAFETY_EVALS, suite=SUITE, outcome="completed")
            recorder.count(catalog.GATE_RESULTS, result="passed" if evaluation.passed else "withheld")
        if not evaluation.passed and not (sign_releases and run.await_release().state is ReleaseState.RELEASED):
            withhold_unsafe_model(evaluation)

        export = run.once(
            "export",
            Export,
            lambda: steps.export(run, screening, training, evaluation),
            result_files=lambda result: [result.archive_file],
        )
        run.succeed(export)
    except JobFailedError as failure:
        run.fail(failure.error)


def refuse_invalid_files(validation: Validation, options: Options) -> None:
    """Raise JobFailedError for a file with invalid rows, unless the job skips them; the report lists all of them."""
    if validation.errors and not options.skip_invalid:
        raise JobFailedError(
            INVALID_FILE,
            "The job failed due to an invalid training file. "
            f"{validation.errors} of {validation.rows} examples are invalid{_lines(validation.first_lines)}; "
            f"first error: {validation.first_code or 'unknown'}{_first(validation)}.{_see(validation.report_file)}",
            "training_file",
        )


def refuse_unsafe_data(screening: Screening, options: Options) -> None:
    """Raise JobFailedError above the share of withheld rows at which the kept ones are suspect too."""
    if screening.lost_rows:
        raise RuntimeError(f"screening lost rows: {screening}")
    most = 0.0 if options.policy == "fail" else options.max_reject_ratio
    if screening.reject_ratio > most or screening.kept == 0:
        raise JobFailedError(
            UNSAFE_DATA,
            "The job failed due to an unsafe training file. This training file was blocked because too many examples "
            f"were flagged: {screening.withheld} of {screening.rows} ({screening.blocked} blocked, {screening.review} "
            f"for review, at most {most:.0%} may be){_lines(screening.first_lines)}.{_see(screening.report_file)}",
            "training_file",
        )


def withhold_unsafe_model(evaluation: Evaluation) -> None:
    """Raise JobFailedError for a student above a limit."""
    if not evaluation.passed:
        failed = [check for check in evaluation.checks if not check.holds]
        numbers = "; ".join(
            f"{check.measure} {_number(check.student)} (before: {_number(check.base)}), "
            f"limit: {check.bound.replace('_', ' ')} {check.limit:g}"
            for check in failed
        )
        raise JobFailedError(
            UNSAFE_MODEL,
            f"The fine-tuned model did not pass the release gate and was withheld: {numbers or 'nothing was measured'}."
            f"{_see(evaluation.report_file)}",
        )


def _validated(validation: Validation) -> Event:
    data = {"rows": validation.rows, "tokens": validation.tokens, "errors": validation.errors}
    return Event(f"Validated {validation.rows} examples: {validation.errors} with errors", data=data)


def _screened(screening: Screening) -> Event:
    counts = {name: getattr(screening, name) for name in ("rows", "kept", "review", "blocked", "invalid")}
    return Event(
        f"Screened {screening.rows} examples: {screening.kept} kept, {screening.blocked} blocked, "
        f"{screening.review} for review",
        level="warn" if screening.withheld else "info",
        data={**counts, "report_file": screening.report_file, "teacher": screening.teacher_id},
    )


def _review_requested(screening: Screening) -> Event:
    return Event(
        f"{screening.withheld} examples are withheld for review; the job continues when all of them are decided",
        level="warn",
        data={"withheld": screening.withheld, "quarantine_file": screening.quarantine_file},
    )


def _evaluated(evaluation: Evaluation) -> Event:
    checks = [asdict(check) | {"passed": check.holds} for check in evaluation.checks]
    return Event(
        f"Release gate: {'passed' if evaluation.passed else 'not passed'}",
        level="info" if evaluation.passed else "error",
        type="moderation_checks",
        data=finite({"passed": evaluation.passed, "checks": checks}),
    )


def _report(result: Validation | Evaluation) -> list[str | None]:
    return [result.report_file]


def _reviewed(run: JobRun) -> bool:
    """Whether people decide about this job's rows: under the policy `review`, or because they approved some before.

    Decisions that come after training has begun are for later jobs.
    """
    if run.job.spec.options.policy == "review" or run.done("review"):
        return True
    return run.job.status is Status.VALIDATING and bool(run.decisions())


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:g}"


def _lines(numbers: tuple[int, ...]) -> str:
    return f"; first lines: {', '.join(map(str, numbers[:10]))}" if numbers else ""


def _first(validation: Validation) -> str:
    return f", {validation.first_fault}" if validation.first_fault else ""


def _see(file_id: str | None) -> str:
    return f" All of them are listed in the report file {file_id}." if file_id else ""
