"""The judges of the release gate."""

import json

import pytest
from evaluation.test_endpoint_judges import Service

from reft_ray.core.errors import ReftError, UsageError
from reft_ray.jobs.results import Training
from reft_ray.pipeline import evaluate
from reft_ray.pipeline.config import GateArgs
from reft_ray.pipeline.model_context import ModelContext
from reft_ray.pipeline.steps import StepsConfig


@pytest.fixture
def service():
    service = Service()
    yield service
    service.close()


def gated(harness, toy, service):
    judges = [{"kind": "endpoint", "url": service.url, "model": "j", "api": "moderations"}, {"kind": "matcher"}]
    gate = {**toy.options["bases"]["toy"]["gate"], "judges": judges}
    context = ModelContext(StepsConfig.of(toy.with_base(gate=gate)).base("toy"))
    adapter = Training(str(toy.folder / "teacher" / "adapter"), 1, 1)
    return evaluate.evaluate_student(harness.run(harness.job()), context, adapter, "cpu")


def test_the_gate_asks_every_judge_and_reports_them(harness, toy, service) -> None:
    found = gated(harness, toy, service)
    measures = json.loads(harness.content(found.report_file))["student"]["measures"]
    assert measures["harmful_score"] == measures["harmful_score_by/endpoint"]
    assert {"harmful_score_by/matcher", "disagreement/matcher"} <= measures.keys()
    assert [check.measure for check in found.checks] == ["harmful_score", "incoherent", "over_refusal"]
    assert {path for path, *_ in service.requests} == {"/v1/moderations"}


def test_the_gate_does_not_pass_without_its_judge(harness, toy, service) -> None:
    service.replies = [(401, {})]
    with pytest.raises(ReftError, match="did not answer"):
        gated(harness, toy, service)


def test_two_judges_of_one_name_are_refused() -> None:
    with pytest.raises(UsageError, match="two judges are called matcher"):
        GateArgs.of({"harmful": "a", "harmless": "b", "judges": [{}, {}]})
    assert GateArgs.of({"harmful": "a", "harmless": "b"}).max_new_tokens == 256
