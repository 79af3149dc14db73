"""Sessions of the training API in the records."""

from dataclasses import replace

import pytest

from reft_ray.jobs.errors import InvalidError
from reft_ray.jobs.tenants import LOCAL
from reft_ray.jobs.training import ABSENT_FACTOR, ABSENT_SECONDS, TrainingStore


def test_models_of_a_loop_that_was_killed_leave_their_places_to_others(database, clock):
    store = TrainingStore(database, max_project_bytes=1 << 30, max_models=2)
    caller = replace(LOCAL, project_id="proj")
    killed = store.open_session(caller, {}, None)

    def model(session, number):
        with database.write() as connection:
            return store.create_model_in(connection, session, number, "base", {}, {}, LOCAL.actor, 0)

    made = [model(killed, number) for number in range(2)]
    alive = store.open_session(caller, {}, None)
    clock.advance(ABSENT_SECONDS - 1)
    store.seen(alive.id, "proj")
    with pytest.raises(InvalidError, match="has 2 models in training"):
        model(alive, 0)
    clock.advance(2)
    assert model(alive, 0).session_id == alive.id
    assert store.model(made[0].id, "proj").state == "active", "its loop may come back"
    store.seen(killed.id, "proj")
    with pytest.raises(InvalidError, match="has 2 models in training"):
        model(alive, 1)


def test_sessions_that_come_and_go_leave_a_limited_number_of_models(database, clock):
    store = TrainingStore(database, max_project_bytes=1 << 30, max_models=1)

    def begin_and_leave():
        session = store.open_session(replace(LOCAL, project_id="proj"), {}, None)
        with database.write() as connection:
            store.create_model_in(connection, session, 0, "base", {}, {}, LOCAL.actor, 0)
        clock.advance(ABSENT_SECONDS + 1)

    for _ in range(ABSENT_FACTOR):
        begin_and_leave()
    with pytest.raises(InvalidError, match="has 1 models in training"):
        begin_and_leave()
