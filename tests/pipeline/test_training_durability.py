"""What a loop was acknowledged survives the death of its worker, at every point; and projects take turns."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fixtures.training_kit import Kit
from fixtures.training_loop import Loop, drain, weights
from fixtures.training_requests import data_request, rows_for
from sqlalchemy import select, update

from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.loading import load_tokenizer
from reft_ray.hf.lora import weight_deltas
from reft_ray.jobs import training_queue
from reft_ray.jobs.errors import InvalidError, LeaseLostError, NotFoundError
from reft_ray.jobs.training_queue import DONE, Outcome, TrainingRequest
from reft_ray.jobs.training_tables import training_requests, training_workers
from reft_ray.pipeline.training_worker import FairTurns

POINTS = ("claimed optim_step", "judged", "ran optim_step", "ended optim_step", "saved")
STEPS = 5


class Killed(BaseException):
    """In place of SIGKILL: nothing of the worker runs after it."""


@pytest.fixture
def make_kit(toy, tmp_path):
    made = []

    def make(name: str, **finetune) -> Kit:
        root = tmp_path / name
        root.mkdir()
        options = toy.options["bases"]["toy"]
        options = {**options, "base": str(toy.base), "finetune": {**options["finetune"], **finetune}}
        made.append(Kit(root, options, {"checkpoint_every": 2}))
        return made[-1]

    yield make
    for kit in made:
        kit.stores.database.close()


def test_a_worker_that_dies_at_any_point_loses_no_step(make_kit, words_of):
    reference_kit = make_kit("reference")
    rows = rows_for(words_of(reference_kit))
    loop = Loop(reference_kit)
    for _ in range(STEPS):
        loop.step(rows)
    worker = reference_kit.worker()
    drain(worker)
    reference = weights(worker, loop.model)
    kit = make_kit("killed")
    for point in POINTS:
        loop = Loop(kit)
        for _ in range(STEPS):
            loop.step(rows)
        met = []

        def die(name, point=point, met=met):
            met.append(name)
            # In the middle of the loop, after a saved state.
            if name == point and met.count(point) == (1 if point == "saved" else 4):
                raise Killed

        kit.point = die
        worker = kit.worker()
        with pytest.raises(Killed):
            drain(worker)
        kit.point = lambda name: None
        kit.stores.training.release("toy", worker.owner)
        second = kit.worker()
        second.engine._made = 7  # adapters have other names than before
        drain(second)
        assert kit.stores.training.store.model(loop.model, None).applied == 2 * STEPS
        found = weights(second, loop.model)
        assert all(torch.equal(value, found[key]) for key, value in reference.items()), point
        kit.stores.training.release("toy", second.owner)


def test_models_begin_with_the_teacher_where_jobs_do_and_stay_so(make_kit, words_of):
    kit = make_kit("aligned", init="aligned")
    loop = Loop(kit)
    worker = kit.worker()
    loop.submit("forward", data_request(loop.model, 1, rows_for(words_of(kit))))
    drain(worker)
    begun, teacher = weights(worker, loop.model), kit.context.teacher.folder / "adapter"
    deltas = weight_deltas(teacher)
    assert deltas
    for name, delta in deltas.items():
        a, b = (begun[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
        assert torch.allclose(2.0 * (b @ a), delta, atol=1e-6), name
    kit.stores.training.release("toy", worker.owner)
    second = kit.worker()
    second.tick()
    # Whatever its teacher is.
    second.engine.parts = replace(second.engine.parts, start=None)
    loop.step(rows_for(words_of(kit)))
    drain(second)
    assert second.engine.forget(loop.model) is None
    continued = weights(second, loop.model)
    reference = make_kit("reference", init="aligned")
    other = Loop(reference)
    other.submit("forward", data_request(other.model, 1, rows_for(words_of(kit))))
    other.step(rows_for(words_of(kit)))
    alone = reference.worker()
    drain(alone)
    expected = weights(alone, other.model)
    assert all(torch.allclose(value, expected[key], atol=1e-6) for key, value in continued.items())
    assert not all(torch.allclose(value, begun[key], atol=1e-4) for key, value in continued.items())


def test_idle_models_are_on_disk_and_continue(make_kit, words_of):
    kit = make_kit("idle")
    rows = rows_for(words_of(kit))
    kit.training.__dict__["max_loaded"] = 1
    one, two = Loop(kit), Loop(kit)
    for _ in range(2):
        for loop in (one, two):
            loop.step(rows)
    worker = kit.worker()
    drain(worker)
    assert len(worker.engine.loaded) == 1
    assert all(torch.equal(value, weights(worker, two.model)[key]) for key, value in weights(worker, one.model).items())


def test_only_one_worker_records(make_kit, words_of):
    kit = make_kit("lease")
    loop = Loop(kit)
    loop.step(rows_for(words_of(kit)))
    first, second = kit.worker(), kit.worker()
    assert first.tick()
    assert not second.tick()
    queue = kit.stores.training
    with kit.stores.database.write() as connection:
        connection.execute(update(training_workers).values(until=0.0))
    assert second.tick()
    with pytest.raises(LeaseLostError):
        queue.end(queue.get(_first(queue, loop), loop.project), first.owner, Outcome(b"{}"))
    assert queue.runnable("toy") == []


def _first(queue, loop):
    with queue.database.read() as connection:
        return connection.execute(
            select(training_requests.c.id).where(
                training_requests.c.target == loop.model, training_requests.c.number == 1
            )
        ).scalar()


def test_payloads_go_once_a_state_is_saved(make_kit, words_of):
    kit = make_kit("payloads")
    loop = Loop(kit)
    for _ in range(3):
        loop.step(rows_for(words_of(kit)))
    drain(kit.worker())
    with kit.stores.database.read() as connection:
        kept = connection.execute(
            select(training_requests.c.number).where(
                training_requests.c.payload.is_not(None), training_requests.c.number > 0
            )
        ).scalars()
        assert sorted(kept) == [5, 6]
    model = kit.stores.training.store.model(loop.model, None)
    assert (model.saved, model.applied) == (4, 6)


def test_projects_take_turns():
    turns, order = FairTurns(), []

    def request(project, number, kind="optim_step"):
        return TrainingRequest(
            f"{project}{number}", "m", number, kind, project, "toy", "queued", None, False, None, 0, None
        )

    waiting = [request("many", n) for n in range(6)] + [request("one", 0), request("gated", 0, "gate")]
    while waiting:
        chosen = turns.choose(waiting)
        waiting.remove(chosen)
        turns.spend(chosen.project_id, 1.0)
        order.append(chosen.project_id)
    assert order.index("one") <= 1
    assert order[-1] == "gated"


def test_who_was_away_has_saved_no_time_up():
    turns = FairTurns()

    def request(project):
        return TrainingRequest(project, "m", 1, "optim_step", project, "toy", "queued", None, False, None, 0, None)

    for _ in range(10):
        turns.choose([request("busy")])
        turns.spend("busy", 1.0)
    chosen = []
    for _ in range(6):
        found = turns.choose([request("busy"), request("back")])
        turns.spend(found.project_id, 1.0)
        chosen.append(found.project_id)
    assert chosen.count("back") <= 4


@pytest.fixture(scope="session")
def words_of():
    return lambda kit: ChatFormat(load_tokenizer(kit.context.base))


def test_a_request_of_a_number_that_was_used_is_refused(make_kit):
    loop = Loop(make_kit("numbers"))
    first = loop.submit("optim_step", b'{"a": 1}')
    again = loop.queue.submit(loop.model, 1, "optim_step", loop.project, "toy", b'{"a": 1}')
    assert again.id == first.id
    with pytest.raises(InvalidError, match="was another one"):
        loop.queue.submit(loop.model, 1, "optim_step", loop.project, "toy", b'{"a": 2}')


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_sigkill_in_front_of_the_real_client(toy, tmp_path, point):
    tinker = pytest.importorskip("tinker", reason="the public training client is not installed")
    from tinker import types

    (tmp_path / "kit.json").write_text(json.dumps({**toy.options["bases"]["toy"], "base": str(toy.base)}))
    (tmp_path / "point").write_text(point)
    port = 18_000 + POINTS.index(point)
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent)])}
    command = [sys.executable, "-m", "fixtures.training_kit", str(tmp_path), str(port)]
    service = subprocess.Popen(command, env=environment)
    restarts = 0

    def up() -> None:
        nonlocal service, restarts
        if service.poll() is not None:
            assert service.returncode == -signal.SIGKILL
            service, restarts = subprocess.Popen(command, env=environment), restarts + 1

    try:
        client = tinker.ServiceClient(base_url=f"http://127.0.0.1:{port}/v1/training", api_key="tml-none")
        training = client.create_lora_training_client(base_model="toy", rank=4, seed=1).result(200)
        chat = ChatFormat(load_tokenizer(str(toy.base)))
        data = [
            types.Datum(types.ModelInput.from_ints(tokens.tolist()), {"target_tokens": targets, "weights": marks})
            for tokens, targets, marks in rows_for(chat)
        ]
        futures = []
        for _ in range(STEPS):
            futures.append(training.forward_backward(data, "cross_entropy"))
            futures.append(training.optim_step(types.AdamParams(learning_rate=5e-3)))
        end = time.monotonic() + 280
        while not all(future.future().done() for future in futures):
            up()
            assert time.monotonic() < end
            time.sleep(0.2)
        losses = [future.result().metrics["loss:sum"] for future in futures[::2]]
        assert restarts == 1
        assert losses == sorted(losses, reverse=True)
        assert np.isfinite(losses).all()
    finally:
        service.kill()
        service.wait()


def Kit_context(toy):
    from types import SimpleNamespace

    return SimpleNamespace(context=SimpleNamespace(base=str(toy.base)))


def test_results_are_kept_for_their_client(make_kit, words_of, monkeypatch):
    kit = make_kit("results")
    loop = Loop(kit)
    request = loop.submit("forward_backward", data_request(loop.model, 1, rows_for(words_of(kit))))
    drain(kit.worker())
    queue = kit.stores.training
    assert queue.get(request.id, loop.project).status == DONE
    assert queue.result(request.id)
    monkeypatch.setattr(training_queue, "RESULT_SECONDS", -1.0)
    queue.sweep()
    with pytest.raises(NotFoundError):
        queue.result(request.id)
