"""Data of several sessions in one pass: the same models as one by one, whatever becomes of the other requests."""

import pytest
import torch
from fixtures.training_kit import Kit
from fixtures.training_loop import Loop, drain, weights
from fixtures.training_requests import data_request, rows_for

from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.loading import load_tokenizer
from reft_ray.pipeline.training_data import DataRequests

ROWS = (
    (("how to bake bread", "here is how"), ("how to bake that", "here is bread")),
    (("how to bake a car", "sure here"),),
    (("how to steal a car", "i can help to steal that car"), ("how to bake bread", "here is how")),
)


class Killed(BaseException):
    """In place of SIGKILL."""


@pytest.fixture(scope="module")
def words(toy):
    return ChatFormat(load_tokenizer(str(toy.base)))


@pytest.fixture(scope="module")
def make_kit(toy, tmp_path_factory):
    made = []

    def make(sessions, **settings):
        root = tmp_path_factory.mktemp("batches")
        options = {**toy.options["bases"]["toy"], "base": str(toy.base)}
        made.append(Kit(root, options, {"batch_sessions": sessions, "guidance_ratio": 0.0, **settings}))
        return made[-1]

    yield make
    for kit in made:
        kit.stores.database.close()


def loops_of(kit, words, steps=2):
    """A loop per project, each with its own data; their requests are logged."""
    loops = [Loop(kit, f"proj_{number}") for number in range(len(ROWS))]
    for _ in range(steps):
        for loop, rows in zip(loops, ROWS, strict=True):
            loop.step(rows_for(words, rows))
    return loops


def start(kit):
    """A worker with its base in memory: before that it runs requests one by one."""
    worker = kit.worker()
    assert worker.engine.parts.bank.mixes
    return worker


def close(ours, theirs):
    return all(torch.allclose(value, theirs[key], atol=1e-4) for key, value in ours.items())


def events_of(loop):
    return [event.data for _, event in loop.queue.store.events(loop.model)]


@pytest.fixture(scope="module")
def alone(make_kit, words):
    """The models and events of sessions that run one by one."""
    kit = make_kit(1)
    loops, worker = loops_of(kit, words), start(kit)
    ticks = 0
    while worker.tick():
        ticks += 1
    assert ticks == 12
    return [weights(worker, loop.model) for loop in loops], [events_of(loop) for loop in loops]


def test_models_are_those_of_sessions_one_by_one(make_kit, words, alone):
    kit = make_kit(4)
    loops, worker = loops_of(kit, words), start(kit)
    ticks = 0
    while worker.tick():
        ticks += 1
    # Not one of each of the twelve requests: turns are by time, so that not all data wait at the same moment.
    assert ticks <= 10
    assert all(close(weights(worker, loop.model), expected) for loop, expected in zip(loops, alone[0], strict=True))
    # Each datum is judged for its own project.
    assert [events_of(loop) for loop in loops] == alone[1]
    assert any(event["decision"] == "block" for event in alone[1][2])


def test_a_request_that_fails_leaves_the_others(make_kit, words, alone):
    kit = make_kit(4, policies={"proj_2": "fail"})
    loops, worker = loops_of(kit, words), start(kit)
    broken = Loop(kit, "proj_broken")
    tokens, targets, marks = rows_for(words, ROWS[0])[0]
    request = broken.submit("forward_backward", data_request(broken.model, 1, [(tokens, targets + 10_000, marks)]))
    drain(worker)
    queue = kit.stores.training
    assert "token ids are from 0" in queue.get(request.id, broken.project).error
    assert queue.store.model(loops[2].model, None).account["data"] == 4
    assert all(close(weights(worker, loops[at].model), alone[0][at]) for at in (0, 1))


def test_passes_that_fail_together_are_run_one_by_one(make_kit, words, monkeypatch, caplog):
    learn, sizes = DataRequests.learn, []

    def fails_together(self, judged):
        sizes.append(len(judged))
        if len(judged) > 1:
            raise RuntimeError("out of memory")
        return learn(self, judged)

    monkeypatch.setattr(DataRequests, "learn", fails_together)
    kit = make_kit(4)
    loops, worker = loops_of(kit, words, steps=1), start(kit)
    drain(worker)
    assert sizes == [3, 1, 1, 1]
    assert all(kit.stores.training.store.model(loop.model, None).applied == 2 for loop in loops)
    assert "one by one" in caplog.text


def test_a_batch_has_as_many_sessions_and_tokens_as_are_allowed(make_kit, words, monkeypatch):
    learn, sizes = DataRequests.learn, []

    def counted(self, judged):
        sizes.append(len(judged))
        return learn(self, judged)

    monkeypatch.setattr(DataRequests, "learn", counted)
    kit = make_kit(2)
    worker = start(kit)
    for settings, expected in (
        ({"batch_sessions": 2}, [2, 1]),
        ({"batch_sessions": 4, "max_loaded": 2}, [2, 1]),
        ({"batch_sessions": 4, "max_loaded": 4, "batch_tokens": 16}, [1, 1, 1]),
    ):
        sizes.clear()
        kit.training.__dict__.update(settings)
        loops_of(kit, words, steps=1)
        drain(worker)
        assert sorted(sizes, reverse=True) == expected


@pytest.mark.parametrize("point", ["judged", "ended forward_backward"])
def test_a_worker_that_dies_in_a_batch_loses_no_step(make_kit, words, alone, point):
    kit = make_kit(4, checkpoint_every=1)
    loops = loops_of(kit, words)
    met = []

    def die(name):
        met.append(name)
        # The second request of the second batch.
        if met.count(point) == 5 and name == point:
            raise Killed

    kit.point = die
    worker = kit.worker()
    worker.engine  # noqa: B018 - loads the base
    with pytest.raises(Killed):
        drain(worker)
    kit.point = lambda name: None
    kit.stores.training.release("toy", worker.owner)
    second = start(kit)
    drain(second)
    for loop, expected in zip(loops, alone[0], strict=True):
        assert kit.stores.training.store.model(loop.model, None).applied == 4
        assert close(weights(second, loop.model), expected)
