"""Evaluate the student and its base model, and check the release gate."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

from reft_ray.core.errors import StoppedError
from reft_ray.evaluation.gate import Gate
from reft_ray.evaluation.suite import Suite, TaskTest
from reft_ray.finetuning.ray_runtime import as_task
from reft_ray.jobs.results import Evaluation, GateCheck, Training, finite
from reft_ray.jobs.run import JobRun
from reft_ray.local_ray import ensure_training_ray
from reft_ray.pipeline.base_figures import BaseFigures
from reft_ray.pipeline.measure import Measurement, MeasureRequest, measure
from reft_ray.pipeline.model_context import ModelContext
from reft_ray.pipeline.uploaded_rows import answered_examples

REPORT = "release_gate.json"
TASK = "validation_file"


def evaluate_student(
    run: JobRun, context: ModelContext, training: Training, device: str, figures: BaseFigures
) -> Evaluation:
    """Measure both models on the gate prompts and the validation file, and compare them with every limit.

    The base model is asked the gate prompts once for all jobs: `figures` keeps what it answered.
    """
    spec, args = run.job.spec, context.args.gate
    held_out = list(answered_examples(run, spec.validation_file, context.base))
    harmful, harmless = context.harmful(), context.harmless()
    suite = Suite(
        [row.prompt for row in harmful],
        [row.prompt for row in harmless],
        categories=[row.category for row in harmful],
    )
    gate = MeasureRequest(suite, (), args.max_new_tokens, args.batch_tokens, args.judges)
    tasks = {TASK: TaskTest(held_out, args.match)} if held_out else {}
    whole = replace(gate, suite=replace(suite, tasks=tasks), loss_rows=held_out)
    student = _measure(run, context, training.adapter_uri, whole, device)
    fingerprint = context.teacher.manifest.base_fingerprint
    base = Measurement(
        figures.of(fingerprint, gate, lambda: _measure(run, context, None, gate, device).evaluation), None
    )
    if held_out:
        own = _measure(run, context, None, replace(gate, suite=Suite(tasks=tasks), loss_rows=held_out), device)
        # Where both have a measure, as of over-refusal, it is that of the gate prompts.
        measures = {**own.evaluation.measures, **base.evaluation.measures}
        base = Measurement(replace(base.evaluation, measures=measures), own.held_out)
    result = Gate(args.bounds(spec.options.gate, bool(held_out))).check(student.evaluation, base.evaluation)
    report = {"student": student.as_dict(), "base": base.as_dict(), "gate": result.as_dict()}
    return Evaluation(
        tuple(GateCheck(**{**asdict(check), "bound": str(check.bound)}) for check in result.checks),
        run.save_file(REPORT, [json.dumps(finite(report), indent=2).encode()]),
    )


def _measure(
    run: JobRun, context: ModelContext, student: str | None, request: MeasureRequest, device: str
) -> Measurement:
    if run.should_stop():
        raise StoppedError("stop requested")
    resources = context.args.resources
    if resources.workers == 0:
        return measure(context.base, student, request, device)
    ensure_training_ray(keep_sigterm=True)
    return as_task(
        "measuring", measure, context.base, student, request, device, resources=resources, stop=run.should_stop
    )
