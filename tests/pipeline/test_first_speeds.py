"""The estimate before the first job: each stage measured in a small run, in a process that the service starts."""

import json

import httpx
import pytest

from reft_ray.api.chat_model import EchoChat
from reft_ray.api.moderator import LocalModerator
from reft_ray.api.service_app import create_service_app
from reft_ray.api.stores import Stores
from reft_ray.core.errors import ReftError
from reft_ray.jobs.content import ContentStore
from reft_ray.jobs.database import Database
from reft_ray.jobs.estimate import FirstSpeeds, Speed
from reft_ray.pipeline.config import BaseArgs
from reft_ray.pipeline.model_context import ModelContext
from reft_ray.pipeline.speed import measure_speed
from reft_ray.serving.args import ServiceArgs
from reft_ray.serving.finetuning_service import start_measuring
from reft_ray.testbed.word_scorer import WordScorer

ROWS = [
    {"messages": [{"role": "user", "content": f"how to bake a bread {n}"}, {"role": "assistant", "content": "sure"}]}
    for n in range(12)
]


def jsonl(rows):
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def test_a_speed_is_kept_for_any_name_of_a_model(tmp_path):
    content = ContentStore(str(tmp_path))
    speed = Speed(training_tokens=10.0, screening_rows=2.0)
    kept = FirstSpeeds(content)
    for name in ("tiny", "org/large:latest \u00fc", "../escape"):
        assert kept.of(name) is None
        kept.put(name, speed)
        assert kept.of(name) == speed
    for path in tmp_path.rglob("*.json"):
        path.write_text("no")
    assert kept.of("tiny") is None


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_service_estimates_before_its_first_job(toy, tmp_path, serving):
    service = ServiceArgs.of({**toy.service(tmp_path), "measure_speed": True})
    stores = Stores.open(Database.open(service.database_url), service.files_uri, service)
    process = start_measuring(service, stores)
    assert process is not None
    with serving(create_service_app(LocalModerator(WordScorer()), stores, EchoChat())) as url:
        file = stores.files.create("proj_local", "train.jsonl", "fine-tune", [jsonl(ROWS)]).id
        body = {"model": "toy", "training_file": file}

        def estimated():
            return httpx.post(f"{url}/v1/fine_tuning/jobs/estimate", json=body).json()

        assert estimated()["seconds"] is None
        assert process.wait() == 0, (tmp_path / "logs" / "speed.log").read_text()[-2000:]
        found = estimated()
        speed = stores.first_speeds.of("toy")
        assert found["seconds"] > speed.start_seconds > 1
        assert found["device_hours"] == pytest.approx(found["seconds"] / 3600)
        assert start_measuring(service, stores) is None
        stored = json.loads(speed.model_dump_json())
        assert {stored["devices"], stored["overhead"]} == {1, 0.0}


def test_without_alignment_rows_there_is_nothing_to_measure_with(toy, tmp_path):
    empty = tmp_path / "rows.jsonl"
    empty.write_bytes(jsonl([{"prompt": "how to bake", "label": "harmless"}]))
    base = {**toy.options["bases"]["toy"], "alignment": {"default": {"labelled": [str(empty)]}}}
    with pytest.raises(ReftError, match="nothing to measure with"):
        measure_speed(ModelContext(BaseArgs.of(base)), tmp_path)
