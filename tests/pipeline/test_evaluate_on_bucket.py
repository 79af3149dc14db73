"""The release gate with files in a bucket: the measuring worker may run on another machine than the driver."""

import json

import pytest
from pyarrow import fs

from reft_ray.jobs.artefacts import put_folder
from reft_ray.jobs.results import Training
from reft_ray.pipeline import evaluate
from reft_ray.pipeline.base_figures import BaseFigures
from reft_ray.pipeline.measure import measure
from reft_ray.pipeline.model_context import ModelContext
from reft_ray.pipeline.steps import StepsConfig

moto = pytest.importorskip("moto.server", reason="moto is not installed")


@pytest.fixture
def bucket():
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    query = f"?scheme=http&endpoint_override={host}:{port}&region=us-east-1&allow_bucket_creation=true"
    filesystem, _ = fs.FileSystem.from_uri(f"s3://key:secret@files{query}")
    filesystem.create_dir("files")
    yield f"s3://key:secret@files/{{}}{query}"
    server.stop()


def test_the_worker_fetches_the_student_from_the_bucket(harness, toy, bucket, tmp_path, monkeypatch) -> None:
    uri = put_folder(toy.folder / "teacher" / "adapter", bucket.format("adapter"))
    students, answers = [], []

    def elsewhere(base, student, request, device):
        students.append(student)
        answers.append(measure(base, student, request, device))
        return answers[-1]

    monkeypatch.setattr(evaluate, "measure", elsewhere)
    context = ModelContext(StepsConfig.of(toy.options).base("toy"))
    run = harness.run(harness.job())
    found = evaluate.evaluate_student(run, context, Training(uri, 1, 1), "cpu", BaseFigures(tmp_path))
    # A local copy would exist on the driver's machine only.
    assert students == [uri, None]
    assert json.loads(harness.content(found.report_file))["student"] == answers[0].as_dict()
    where = str(toy.folder / "teacher" / "adapter")
    harmful, harmless = ([row.prompt for row in rows] for rows in (context.harmful(), context.harmless()))
    request = evaluate.MeasureRequest(evaluate.Suite(harmful, harmless), (), 4)
    assert measure(context.base, where, request, "cpu").as_dict() == answers[0].as_dict()
    assert answers[0].as_dict() != answers[1].as_dict()
