"""Guards next to the Ref-Teacher judge the rows of jobs."""

import json

import pytest
from evaluation.test_endpoint_judges import Service

from reft_ray.core.errors import ReftError
from reft_ray.pipeline.model_context import ModelContext
from reft_ray.pipeline.screen import screen_file
from reft_ray.pipeline.steps import StepsConfig


@pytest.fixture
def service():
    service = Service()
    yield service
    service.close()


def test_a_row_that_only_a_guard_flags_is_withheld_and_named(harness, toy, service) -> None:
    cascade = {"guards": [{"format": "moderations", "url": service.url, "name": "words"}]}
    context = ModelContext(StepsConfig.of(toy.with_base(screening={"cascade": cascade})).base("toy"))
    turns = [[{"role": "user", "content": f"how to bake a {thing}"}] for thing in ("car", "bread", "me") * 4]
    turns.append([{"role": "user", "content": "Step 1 bake bread"}])
    rows = [{"messages": [*turn, {"role": "assistant", "content": "sure"}]} for turn in turns]
    found = screen_file(harness.run(harness.job(rows)), context)
    assert (found.rows, found.kept, found.blocked) == (13, 12, 1)
    summary, row = map(json.loads, harness.content(found.report_file).splitlines())
    assert (row["line"], row["decision"], row["decided_by"]) == (13, "block", "words")
    assert row["teacher"].startswith("rt-")
    assert row["id"].startswith("row-")
    assert row["policy"] == summary["judges"]["policy"]
    service.replies = [(401, {})]
    with pytest.raises(ReftError, match="guard words"):
        screen_file(harness.run(harness.job(rows)), context)
