"""Reviews, appeals, releases and the audit log over HTTP, by role."""

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from reft_ray.api.review_client import ReviewClient
from reft_ray.cli.main import app as commands
from reft_ray.core.errors import ReftError
from reft_ray.jobs.fake_steps import FakeSteps
from reft_ray.jobs.job import Event, Status

ROWS = (*(f"hello {n}" for n in range(8)), "a knife 1", "a knife 2", "a bomb")
APPROVE = {"action": "approve", "code": "harmless"}


@pytest.fixture
def calls(review_service):
    """Calls as a person of a role: (status, document)."""
    with TestClient(review_service.app) as client:

        def call(role, method, path, name="ann", **options):
            headers = {"authorization": f"Bearer {review_service.key(role, name)}"}
            answer = client.request(method, f"/v1{path}", headers=headers, **options)
            return answer.status_code, answer.json()

        yield call


@pytest.fixture
def waiting(review_service):
    job = review_service.drive(review_service.job(*ROWS))
    assert job.status is Status.PAUSED
    return job


def rows(calls, job, role="curator", **query):
    return calls(role, "GET", "/reviews", params={"job": job.id, "kind": "withheld", **query})[1]["data"]


def test_from_a_withheld_row_to_a_model(review_service, calls, waiting):
    found = rows(calls, waiting)
    assert sorted(row["line"] for row in found) == [9, 10, 11]
    assert [abs(row["score"] - row["threshold"]) for row in found] == sorted(
        abs(row["score"] - row["threshold"]) for row in found
    )
    assert not {"messages", "text"} & found[0].keys()
    knife = next(row for row in found if row["line"] == 9)
    text = calls("curator", "GET", f"/reviews/{knife['id']}/text")[1]
    assert text["parts"] == [{"name": "messages[0].user", "text": "a knife 1", "decoded": [], "decided": True}]
    status, claim = calls("curator", "POST", "/reviews/claim", json={"job": waiting.id, "kind": "withheld"})
    assert (status, claim["review"]["id"]) == (200, found[0]["id"])
    assert claim["review"]["held_until"] - claim["review"]["created_at"] >= 600
    status, taken = calls("curator", "POST", f"/reviews/{found[0]['id']}/decision", "bob", json=APPROVE)
    assert (status, taken["error"]["code"]) == (409, "review_claimed")
    status, made = calls("curator", "POST", f"/reviews/{knife['id']}/decision", json={**APPROVE, "duplicates": True})
    assert (status, sorted(row["line"] for row in made["data"])) == (200, [9, 10])
    (bomb,) = rows(calls, waiting)
    assert calls("curator", "POST", f"/reviews/{bomb['id']}/decision", json=APPROVE)[1]["data"][0]["state"] == "confirm"
    status, again = calls("curator", "POST", f"/reviews/{bomb['id']}/decision", json=APPROVE)
    assert (status, again["error"]["code"]) == (409, "second_person_needed")
    made = calls("lead", "POST", f"/reviews/{bomb['id']}/decision", "bob", json=APPROVE)[1]["data"][0]
    assert (made["state"], made["first_reviewer"][:3], made["reviewer"][:3]) == ("approved", "ann", "bob")
    done = review_service.drive(waiting)
    assert (done.status, review_service.stores.jobs.steps(done.id)["review"]["kept"]) == (Status.SUCCEEDED, 11)
    status, entries = calls("auditor", "GET", "/audit", params={"type": "review.approved"})
    assert (status, len(entries["data"])) == (200, 3)
    assert calls("auditor", "GET", "/audit/verify")[1]["fault"] is None
    summary = calls("auditor", "GET", "/reviews/summary")[1]
    assert summary["states"]["approved"] == 3
    assert summary["teachers"][0]["overturned"] == {
        "count": 3,
        "of": 3,
        "value": 1.0,
        "interval": [pytest.approx(0.4385, abs=1e-4), 1.0],
    }


def test_an_owner_sees_their_rows_and_not_who_decides(review_service, calls, waiting):
    mine = rows(calls, waiting, "owner")
    assert len(mine) == 3
    assert not {"reviewer", "held_by", "comment"} & mine[0].keys()
    review_service.stores.tenants.create_key("acme", "two", "eve")
    review_service._secrets["eve", "owner"] = review_service.stores.tenants.create_key("acme", "two", "eve")[1]
    assert (
        rows(lambda role, method, path, **options: calls(role, method, path, "eve", **options), waiting, "owner") == []
    )
    for path in (f"/reviews/{mine[0]['id']}", f"/reviews/{mine[0]['id']}/text"):
        assert calls("owner", "GET", path, "eve")[0] == 404
    assert calls("owner", "POST", f"/reviews/{mine[0]['id']}/decision", json=APPROVE)[0] == 403


@pytest.mark.parametrize(
    ("role", "method", "path", "body"),
    [
        ("auditor", "POST", "/reviews/claim", {}),
        ("auditor", "POST", "/appeals", {"note": "x", "job": "ftjob-1"}),
        ("curator", "GET", "/audit", None),
        ("owner", "GET", "/audit", None),
        ("owner", "GET", "/releases", None),
        ("curator", "POST", "/releases/ftjob-1/sign", {"note": "x"}),
        ("curator", "GET", "/files", None),
        ("lead", "POST", "/fine_tuning/jobs", {}),
    ],
)
def test_a_role_may_not_do_more(calls, role, method, path, body):
    status, answer = calls(role, method, path, json=body)
    assert (status, answer["error"]["code"]) == (403, "insufficient_permissions")


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/reviews?state=none", None, 400),
        ("GET", "/reviews?after=review_x", None, 400),
        ("GET", "/reviews?limit=0", None, 400),
        ("GET", "/reviews/review_x", None, 404),
        ("GET", "/reviews/review_x/text", None, 404),
        ("POST", "/reviews/review_x/claim", None, 404),
        ("POST", "/reviews/review_x/decision", APPROVE, 404),
        ("POST", "/reviews/review_x/decision", {"action": "delete", "code": "x"}, 400),
        ("POST", "/reviews/review_x/decision", {"action": "approve", "code": "illegal"}, 400),
        ("POST", "/reviews/decisions", {**APPROVE, "ids": []}, 400),
        ("POST", "/appeals", {"note": "x"}, 400),
        ("POST", "/appeals/appeal_x/answer", {"granted": True, "answer": "x"}, 404),
    ],
)
def test_wrong_requests_are_refused_in_one_line(calls, method, path, body, status):
    answer = calls("operator", method, path, json=body)
    assert answer[0] == status
    assert "\n" not in answer[1]["error"]["message"]


def test_an_appeal_is_made_once_and_answered(review_service, calls, waiting):
    found = rows(calls, waiting)
    knife = next(row for row in found if row["line"] == 9)
    calls("curator", "POST", f"/reviews/{knife['id']}/decision", json={"action": "reject", "code": "harmful_request"})
    status, appeal = calls("owner", "POST", "/appeals", json={"review": knife["id"], "note": "It is a kitchen knife."})
    assert (status, appeal["state"], appeal["answer"]) == (200, "open", None)
    assert calls("owner", "POST", "/appeals", json={"review": knife["id"], "note": "Again."})[0] == 409
    assert calls("owner", "POST", f"/appeals/{appeal['id']}/answer", json={"granted": True, "answer": "x"})[0] == 403
    body = {"granted": True, "answer": "You are right."}
    status, answered = calls("curator", "POST", f"/appeals/{appeal['id']}/answer", "bob", json=body)
    assert (status, answered["state"]) == (200, "granted")
    assert calls("curator", "POST", f"/appeals/{appeal['id']}/answer", json=body)[0] == 409
    seen = calls("owner", "GET", f"/appeals/{appeal['id']}")[1]
    assert (seen["answer"], "answered_by" in seen) == ("You are right.", False)
    assert calls("owner", "GET", f"/reviews/{knife['id']}")[1]["state"] == "approved"


def test_a_model_that_fails_the_gate_waits_for_two_people(review_service, calls):
    bad = FakeSteps(harmful_score=9.0)
    jobs = [review_service.drive(review_service.job("hello", policy="filter"), bad) for _ in range(2)]
    assert {job.status for job in jobs} == {Status.PAUSED}
    first, second = jobs
    assert calls("owner", "POST", "/appeals", json={"job": first.id, "note": "We checked it."})[0] == 200
    sign = f"/releases/{first.id}/sign"
    assert calls("lead", "POST", sign, json={"note": "Measured again."})[1]["state"] == "signed"
    assert calls("lead", "POST", sign, json={"note": "Twice."})[0] == 409
    assert review_service.stores.jobs.get(first.id).status is Status.PAUSED
    assert calls("lead", "POST", sign, "bob", json={"note": "Agreed."})[1]["state"] == "released"
    assert review_service.drive(first, bad).status is Status.SUCCEEDED
    assert calls("lead", "POST", f"/releases/{second.id}/refuse", json={"note": "No."})[1]["state"] == "refused"
    failed = review_service.drive(second, bad)
    assert (failed.status, failed.error.code) == (Status.FAILED, "unsafe_model")
    assert calls("lead", "POST", f"/releases/{second.id}/sign", json={"note": "Late."})[0] == 409


def test_the_text_of_a_row_is_gone_with_its_file(review_service, calls, waiting):
    row = rows(calls, waiting)[0]
    review_service.stores.jobs.move(waiting.id, Status.CANCELLED, Event("cancelled"))
    review_service.stores.files.delete(waiting.spec.training_file, waiting.project_id)
    assert calls("curator", "GET", f"/reviews/{row['id']}")[0] == 200
    assert calls("curator", "GET", f"/reviews/{row['id']}/text")[0] == 404


def test_the_clients_work_on_another_machine(review_service, serving, waiting):
    with serving(review_service.app) as url:
        address, key = f"{url}/v1", review_service.key("curator")
        with ReviewClient(address, key) as client:
            claimed = client.claim(job=waiting.id, kind="withheld")
            assert claimed["id"] == next(client.reviews(job=waiting.id, kind="withheld"))["id"]
            with pytest.raises(ReftError, match="not a reason to approve"):
                client.decide([claimed["id"]], "approve", "illegal")
            assert client.summary()["states"]["pending"] == 5
        run = CliRunner()

        def command(*words, role="curator", code=0):
            result = run.invoke(commands, [*words, "--url", address, "--key", review_service.key(role)])
            assert result.exit_code == code, result.output
            return result.output

        assert "3 pending" in command("review", "list", waiting.id)
        assert "a knife 1" in command("review", "show", waiting.id, "9")
        assert "no row" not in command("review", "next", waiting.id)
        assert "row 9: approved" in command("review", "approve", waiting.id, "9", "--reason", "a kitchen")
        assert "row 11: rejected" in command(
            "review", "reject", waiting.id, "11", "--reason", "a bomb", "--code", "harmful_request"
        )
        command("review", "approve", waiting.id, "8", "--reason", "x", code=2)
        review = next(iter(review_service.stores.reviews.decided(waiting.id)[1:]))
        made = command("appeals", "create", "--review", review.id, "--note", "history", role="owner").strip()
        assert made in command("appeals", "list", "--state", "open")
        assert "is denied" in command("appeals", "answer", made, "--answer", "It is not.", "--deny")
        assert command("releases", "list", role="lead") == ""
        assert "review.approved" in command("audit", "fetch", role="auditor")


def test_roles_of_keys_and_their_scopes(review_service):
    tenants = review_service.stores.tenants
    with pytest.raises(ReftError, match="role 'king' is unknown"):
        tenants.create_key("acme", "one", "x", role="king")
    with pytest.raises(ReftError, match="a key of role curator may have"):
        tenants.create_key("acme", "one", "x", ["chat"], role="curator")
    key, secret = tenants.create_key("acme", "one", "x", ["audit.read"], role="auditor")
    principal = tenants.authenticate(secret)
    assert (principal.role, principal.scopes, principal.visible) == ("auditor", {"audit.read"}, None)
    assert principal.reviewer.name == f"x ({key.id})"
    assert tenants.principal(key.id) == principal
    tenants.revoke(key.id)
    assert tenants.principal(key.id) is None
