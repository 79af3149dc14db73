"""The worker as `serving.trainer` runs it: made by its factory, judged through the event loop of its moderator."""

import asyncio

import pytest
from fixtures.training_loop import Loop
from fixtures.training_requests import data_request, rows_for

from reft_ray.api.moderator import LocalModerator
from reft_ray.api.stores import Stores
from reft_ray.core.errors import ReftError
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.loading import load_tokenizer
from reft_ray.hf.ref_teacher import RefTeacher
from reft_ray.jobs.database import Database
from reft_ray.jobs.training_queue import QUEUED
from reft_ray.serving.app import build_app
from reft_ray.serving.args import ServeArgs, ServiceArgs
from reft_ray.serving.trainer import TrainerReplica, trained_bases
from reft_ray.telemetry.recorder import MemoryRecorder

HARM = (("how to bake bread", "here is how"), ("how to steal a car", "sure here is how"))


class Records:
    """What `Loop` needs of a kit."""

    def __init__(self, stores: Stores) -> None:
        self.stores = stores


def test_the_replica_runs_the_worker_that_the_service_names(toy, tmp_path):
    service = ServiceArgs.of({**toy.service(tmp_path), "training": {}})
    scorer = RefTeacher.load(toy.folder / "teacher").scorer(base_name=str(toy.base), precision="float32")
    stores = Stores.open(Database.open(service.database_url), service.files_uri, service)

    async def served() -> tuple[TrainerReplica, str]:
        replica = TrainerReplica("toy", service, LocalModerator(scorer), MemoryRecorder())
        loop = Loop(Records(stores))
        rows = rows_for(ChatFormat(load_tokenizer(str(toy.base))), HARM)
        request = loop.submit("forward_backward", data_request(loop.model, 1, rows))
        async with asyncio.timeout(120):
            while loop.queue.get(request.id, loop.project).status == QUEUED:
                replica.check()
                await asyncio.sleep(0.05)
        return replica, loop.model

    replica, model = asyncio.run(served())
    assert [event.data["datum"] for _, event in stores.training.store.events(model)] == [1]
    assert stores.training.store.facts("toy")["tokenizer"] == str(toy.base)
    replica._thread = type("Ended", (), {"is_alive": staticmethod(lambda: False)})()
    with pytest.raises(ReftError, match="worker has ended"):
        replica.check()


def test_bases_that_are_trained_have_a_deployment(toy, tmp_path):
    without = ServiceArgs.of(toy.service(tmp_path))
    assert trained_bases(without) == []
    service = {**toy.service(tmp_path), "training": {}}
    assert trained_bases(ServiceArgs.of(service)) == ["toy"]
    service["base_models"]["frozen"] = {"uri": str(toy.base), "trainable": False}
    assert trained_bases(ServiceArgs.of(service)) == ["toy"]
    assert build_app(ServeArgs.of({"service": service}))
