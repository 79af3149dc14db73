"""The fourth step: the student is measured beside the model before finetuning, and held against the limits."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict

import ray

from reft_ray.evaluation.gate import Gate
from reft_ray.evaluation.suite import Suite, TaskTest
from reft_ray.finetuning.config import Resources
from reft_ray.jobs.errors import StoppedError
from reft_ray.jobs.run import JobRun
from reft_ray.jobs.steps import Evaluation, GateCheck, Training, finite
from reft_ray.service.measure import Answer, Question, measure
from reft_ray.service.reading import answered_examples
from reft_ray.service.surroundings import Surroundings
from reft_ray.service.train import connect

REPORT = "release_gate.json"
TASK = "validation_file"
_POLL_SECONDS = 0.5


def evaluate_student(run: JobRun, world: Surroundings, training: Training, device: str) -> Evaluation:
    """Both models on the operator's prompts and on the validation file, and every limit with its numbers."""
    spec, args = run.job.spec, world.args.gate
    held_out = list(answered_examples(run, spec.validation_file, world.base))
    suite = Suite(world.harmful(), world.harmless(), {TASK: TaskTest(held_out, args.match)} if held_out else {})
    question = Question(suite, held_out, args.max_new_tokens)
    student = _asked(run, world, training.adapter_uri, question, device)
    base = _asked(run, world, None, question, device)
    result = Gate(args.bounds(spec.options.gate, bool(held_out))).check(student.evaluation, base.evaluation)
    report = {"student": student.as_dict(), "base": base.as_dict(), "gate": result.as_dict()}
    return Evaluation(
        tuple(GateCheck(**{**asdict(check), "bound": str(check.bound)}) for check in result.checks),
        run.save_file(REPORT, [json.dumps(finite(report), indent=2).encode()]),
    )


def _asked(run: JobRun, world: Surroundings, student: str | None, question: Question, device: str) -> Answer:
    if run.should_stop():
        raise StoppedError("told to stop")
    resources = world.args.resources
    if resources.workers == 0:
        return measure(world.base, student, question, device)
    return _on_ray(lambda: run.should_stop(), resources, world.base, student, question, device)


def _on_ray(
    stop: Callable[[], bool], resources: Resources, base: str, student: str | None, question: Question, device: str
) -> Answer:
    """The same in a task with the resources of one training worker, ended at once when the job is stopped."""
    connect()
    task = ray.remote(measure).options(
        num_cpus=resources.cpus_per_worker, num_gpus=resources.gpus_per_worker, max_retries=resources.max_failures
    )
    future = task.remote(base, student, question, device)
    while not ray.wait([future], timeout=_POLL_SECONDS)[0]:
        if stop():
            ray.cancel(future, force=True)
            raise StoppedError("told to stop")
    answer: Answer = ray.get(future)
    return answer
