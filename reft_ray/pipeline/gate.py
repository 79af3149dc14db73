"""The fourth step: the student is measured beside the model before finetuning, and held against the limits."""

from __future__ import annotations

import json
from dataclasses import asdict

from reft_ray.core.errors import StoppedError
from reft_ray.evaluation.gate import Gate
from reft_ray.evaluation.suite import Suite, TaskTest
from reft_ray.finetuning.task import as_task
from reft_ray.jobs.results import Evaluation, GateCheck, Training, finite
from reft_ray.jobs.run import JobRun
from reft_ray.local_ray import ensure_training_ray
from reft_ray.pipeline.measure import Answer, Question, measure
from reft_ray.pipeline.model_context import ModelContext
from reft_ray.pipeline.reading import answered_examples

REPORT = "release_gate.json"
TASK = "validation_file"


def evaluate_student(run: JobRun, context: ModelContext, training: Training, device: str) -> Evaluation:
    """Both models on the operator's prompts and on the validation file, and every limit with its numbers."""
    spec, args = run.job.spec, context.args.gate
    held_out = list(answered_examples(run, spec.validation_file, context.base))
    suite = Suite(context.harmful(), context.harmless(), {TASK: TaskTest(held_out, args.match)} if held_out else {})
    question = Question(suite, held_out, args.max_new_tokens)
    student = _asked(run, context, training.adapter_uri, question, device)
    base = _asked(run, context, None, question, device)
    result = Gate(args.bounds(spec.options.gate, bool(held_out))).check(student.evaluation, base.evaluation)
    report = {"student": student.as_dict(), "base": base.as_dict(), "gate": result.as_dict()}
    return Evaluation(
        tuple(GateCheck(**{**asdict(check), "bound": str(check.bound)}) for check in result.checks),
        run.save_file(REPORT, [json.dumps(finite(report), indent=2).encode()]),
    )


def _asked(run: JobRun, context: ModelContext, student: str | None, question: Question, device: str) -> Answer:
    if run.should_stop():
        raise StoppedError("told to stop")
    resources = context.args.resources
    if resources.workers == 0:
        return measure(context.base, student, question, device)
    ensure_training_ray(keep_sigterm=True)
    return as_task(
        "measuring", measure, context.base, student, question, device, resources=resources, stop=run.should_stop
    )
