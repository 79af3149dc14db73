"""The pages of training sessions: who sees which, what they count, and that nothing of a client is more than text."""

import json
from dataclasses import replace

import pytest
from console.test_console_pages import ROLES, Person
from fastapi.testclient import TestClient
from fixtures.review_service import ReviewService

from reft_ray.api.settings import TrainingSettings
from reft_ray.jobs.tenants import LOCAL
from reft_ray.jobs.training_queue import Outcome
from reft_ray.jobs.training_records import TrainingCheckpoint, checkpoint_path

HOSTILE = '<script>alert("knife")</script>'


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    service = ReviewService(tmp_path_factory.mktemp("service"), training=TrainingSettings())
    yield service
    service.close()


@pytest.fixture(scope="module")
def client(service):
    with TestClient(service.app, follow_redirects=False, base_url="http://127.0.0.1") as client:
        yield client


@pytest.fixture
def person(service, client):
    return lambda role, name="ann", project="one": Person(service, client, role, name, project)


def add_session(service, name="ann", project="one"):
    """A session of this owner whose loop made two steps, with one datum withheld and one masked."""
    principal = service.stores.tenants.authenticate(service.key("owner", name, project))
    queue = service.stores.training
    store = queue.store
    session = store.open_session(replace(LOCAL, project_id=principal.project_id), {}, HOSTILE)
    model = f"{session.id}:train:0"
    queue.submit(
        model, 0, "create_model", session.project_id, "tiny", b"",
        lambda connection: store.create_model_in(connection, session, 0, "tiny", {"rank": 4}, {}, LOCAL.actor, 0),
        Outcome(b"{}"),
    )  # fmt: skip
    assert queue.acquire("tiny", "worker", {})
    account = {
        "data": 8,
        "tokens": 900,
        "withheld_tokens": 130,
        "unjudged_tokens": 0,
        "withheld": {"refusal_score": 1},
        "masked": {"finding:identity_prompts": 1},
        "findings": {"identity_prompts": "high"},
    }
    events = [
        ("datum.withheld", {"datum": 3, "score": 0.912, "reason": "refusal_score", "decision": "block"}),
        ("dataset.finding", {"finding": "identity_prompts", "severity": "high", "scope": "session", "count": 1,
                             "share": 0.125, "summary": "1 rows set up an obedient identity"}),
    ]  # fmt: skip
    for step in range(2):
        request = queue.submit(model, 2 * step + 1, "forward_backward", session.project_id, "tiny", b"x")
        queue.judged(request, "worker", {"judged": 8}, [], events if step == 0 else [], account)
        queue.end(request, "worker", Outcome(b"{}"))
        request = queue.submit(model, 2 * step + 2, "optim_step", session.project_id, "tiny", b"x")
        queue.end(request, "worker", Outcome(b"{}"))
    with service.stores.database.write() as connection:
        for name, gate in (("good", "passed"), ("bad", "failed")):
            path = checkpoint_path(model, "sampler_weights", name)
            checks = ["harmful_score 41.0 <= 10 failed", "over_refusal 1.0 <= 5 passed"] if gate == "failed" else []
            store.add_checkpoint_in(connection, TrainingCheckpoint(
                path, model, session.id, session.project_id, "sampler_weights", name, "key", 2_000_000, {}, False,
                gate, checks, 0.0, None,
            ))  # fmt: skip
    return session


@pytest.fixture(scope="module")
def ours(service):
    return add_session(service)


@pytest.mark.parametrize("role", ROLES)
def test_each_role_sees_sessions_under_a_strict_policy(person, ours, role):
    someone = person(role)
    for path in ("/console/training", f"/console/training/{ours.id}"):
        page = someone.get(path)
        assert page.status_code == 200
        assert ours.id in page.text
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert "style=" not in page.text
        assert "<script>" not in page.text
        # An owner knows their project, the others are shown it.
        assert (ours.project_id in page.text) == (role != "owner")


def test_a_page_has_the_account_and_the_gate(person, ours):
    text = " ".join(person("owner").get(f"/console/training/{ours.id}").text.split())
    for shown in (
        "<dt>Steps</dt><dd>2</dd>",
        "<dt>Judged</dt><dd>16</dd>",
        "<dt>Withheld: refusal score</dt><dd>2</dd>",
        "<dt>Masked: finding:identity prompts</dt><dd>2</dd>",
        "<dt>With a verdict</dt><dd>1800</dd>",
        "<dt>Without a verdict</dt><dd>0</dd>",
        "<dt>Withheld</dt><dd>260</dd>",
        '<td class="number">0.912</td><td>refusal score</td>',
        "1 rows set up an obedient identity, in this session",
        "harmful_score 41.0 &lt;= 10 failed",
        "2.0 MB",
        "&lt;script&gt;",
    ):
        assert shown in text, shown
    assert "over_refusal" not in text
    row = " ".join(person("operator").get("/console/training").text.split())
    for shown in ("identity prompts", '<span class="badge passed">passed</span> 1', ">16<", ">1800<", ">4<"):
        assert shown in row, shown


def test_a_customer_sees_only_their_own(service, client, person, ours):
    eve = person("owner", "eve", "two")
    assert eve.get(f"/console/training/{ours.id}").status_code == 404
    assert ours.id not in eve.get("/console/training").text
    theirs = add_session(service, "eve", "two")
    assert theirs.id in eve.get("/console/training").text
    assert theirs.id not in person("owner").get("/console/training").text
    client.cookies.clear()
    assert client.get("/console/training").headers["location"].startswith("/console/sign-in")


def test_older_sessions_are_on_the_next_page(service, person, ours):
    store = service.stores.training.store
    caller = replace(LOCAL, project_id="proj_many")
    made = [store.open_session(caller, {}, None).id for _ in range(5)]
    first, more = store.recent("proj_many", None, 3)
    assert ([session.id for session in first], more) == (made[:1:-1], True)
    second, more = store.recent("proj_many", first[-1].id, 3)
    assert ([session.id for session in second], more) == (made[1::-1], False)
    operator = person("operator")
    page = operator.get("/console/training").text
    assert all(session in page for session in made)
    assert ours.id in operator.get(f"/console/training?after={made[0]}").text


def test_queries_of_a_page_use_indexes(service, ours):
    store = service.stores.training.store
    plans = []
    with store.database.read() as connection:
        for query in (
            "SELECT * FROM training_sessions WHERE project_id = 'p' ORDER BY seq DESC LIMIT 51",
            "SELECT * FROM training_models WHERE session_id IN ('a', 'b') ORDER BY seq",
            "SELECT * FROM training_checkpoints WHERE session_id IN ('a', 'b') ORDER BY seq DESC",
            "SELECT * FROM training_events WHERE model_id IN ('a') ORDER BY seq DESC LIMIT 100",
        ):
            rows = connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {query}").all()
            plans.append(" ".join(row[3] for row in rows))
    assert all("USING INDEX" in plan for plan in plans), json.dumps(plans)


def test_a_service_without_the_training_api_has_no_such_page(tmp_path):
    service = ReviewService(tmp_path)
    with TestClient(service.app, follow_redirects=False, base_url="http://127.0.0.1") as client:
        someone = Person(service, client, "operator")
        assert someone.get("/console/training").status_code == 404
        assert "/console/training" not in someone.get("/console").text
    service.close()
