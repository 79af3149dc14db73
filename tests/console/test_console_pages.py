"""The console's pages without a browser: who may see what, and that no row can be more than text."""

import json
import re

import pytest
from fastapi.testclient import TestClient

from reft_ray.console.charts import above, histogram
from reft_ray.console.text import SHOWN, pieces
from reft_ray.jobs.audit import AuditLog
from reft_ray.jobs.fake_steps import FakeSteps
from reft_ray.jobs.job import Status
from reft_ray.jobs.review_queue import Filter

HOSTILE = (
    '<script>alert("knife")</script>',
    "knife <img src=https://evil.example/x.png onerror=alert(1)>",
    "knife \u202egnp.exe\u202c \u2066hidden\u2069 \x07\u200b\U000e0041",
    "knife {{ 7 * 7 }} {% include 'admin.html' %}",
    "knife ]]> --> </textarea></p><style>*{display:none}</style>",
    "knife " + "x" * (1 << 20),
)
PAGES = {
    "/console": "all",
    "/console/jobs": "all",
    "/console/jobs/JOB": "all",
    "/console/jobs/JOB/file?threshold=0.3": "all",
    "/console/queue": "all",
    "/console/queue?state=all&kind=withheld&order=age&reason=score_above_review": "all",
    "/console/reviews/REVIEW": "all",
    "/console/reviews/REVIEW/plain": "all",
    "/console/appeals?state=all": "all",
    "/console/releases": "curator lead operator auditor",
    "/console/models": "all",
    "/console/teacher?false_positives=0.01": "curator lead operator auditor",
    "/console/admin": "operator",
    "/console/audit?verify=yes": "lead operator auditor",
}
ROLES = ("owner", "curator", "lead", "operator", "auditor")


class Person:
    """A signed-in person's browser, without a browser."""

    def __init__(self, service, client, role, name="ann", project="one"):
        client.cookies.clear()
        self.client = client
        answer = client.post("/console/sign-in", data={"key": service.key(role, name, project)})
        assert answer.status_code == 303, answer.text
        self.cookies = dict(client.cookies)

    def get(self, path):
        self.client.cookies = self.cookies
        return self.client.get(path)

    def post(self, path, token=None, **data):
        if token is None:
            token = re.search(r'name="csrf" value="([^"]+)"', self.get("/console").text)[1]
        self.client.cookies = self.cookies
        return self.client.post(path, data={"csrf": token, **data})


@pytest.fixture
def client(review_service):
    with TestClient(review_service.app, follow_redirects=False, base_url="http://127.0.0.1") as client:
        yield client


@pytest.fixture
def person(review_service, client):
    return lambda role, name="ann", project="one": Person(review_service, client, role, name, project)


@pytest.fixture
def waiting(review_service):
    job = review_service.drive(review_service.job(*(f"hello {n}" for n in range(8)), *HOSTILE))
    assert job.status is Status.PAUSED
    return job


@pytest.fixture
def withheld(review_service, waiting):
    return review_service.stores.reviews.list(Filter(job=waiting.id, kind="withheld"), "age").items


@pytest.mark.parametrize("role", ROLES)
def test_each_role_sees_its_pages_under_a_strict_policy(person, waiting, withheld, role):
    someone = person(role)
    for path, roles in PAGES.items():
        answer = someone.get(path.replace("JOB", waiting.id).replace("REVIEW", withheld[0].id))
        assert answer.status_code == (200 if roles == "all" or role in roles.split() else 403), path
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        if answer.headers["content-type"].startswith("text/html"):
            assert "style=" not in answer.text
            assert not re.search(r"\son\w+=", re.sub(r"&[^;]+;", "", answer.text.partition("<main")[0]))


def test_a_page_needs_a_session_and_a_form_its_token(review_service, client, person, withheld):
    answer = client.get("/console/queue")
    assert (answer.status_code, answer.headers["location"]) == (303, "/console/sign-in?then=/console/queue")
    assert client.post("/console/sign-in", data={"key": "sk-reft-wrong"}).status_code == 401
    curator = person("curator")
    path = f"/console/reviews/{withheld[0].id}/decide"
    form = {"action": "approve", "approve_code": "harmless"}
    for token in ("", "wrong", "\u00e9"):
        assert curator.post(path, token=token, **form).status_code == 403
    assert review_service.stores.reviews.get(withheld[0].id).state == "pending"
    assert curator.post(path, **form).status_code == 303
    assert review_service.stores.reviews.get(withheld[0].id).state == "approved"
    cookie = client.post("/console/sign-in", data={"key": review_service.key("curator")}).headers["set-cookie"]
    assert {"HttpOnly", "SameSite=lax", "Path=/console"} <= set(cookie.split("; "))


def test_a_session_ends_with_its_key_and_a_changed_cookie_is_none(review_service, client, person):
    curator = person("curator")
    assert curator.get("/console").status_code == 200
    name, value = next(iter(curator.cookies.items()))
    # Not the last letter, whose lowest bits mean nothing.
    forged = dict(curator.cookies) | {name: value[:-5] + ("a" if value[-5] != "a" else "b") + value[-4:]}
    client.cookies = forged
    assert client.get("/console").status_code == 303
    (key,) = [key for _, _, key in review_service.stores.tenants.list_keys() if key.role == "curator"]
    review_service.stores.tenants.revoke(key.id)
    assert curator.get("/console").status_code == 303


@pytest.mark.parametrize("then", ["https://evil.example/", "//evil.example", "/console.evil.example", "javascript:x"])
def test_sign_in_leads_nowhere_else(review_service, client, then):
    answer = client.post("/console/sign-in", data={"key": review_service.key("owner"), "then": then})
    assert answer.headers["location"] == "/console"


def test_a_customer_sees_only_their_own(person, waiting, withheld):
    eve = person("owner", "eve", "two")
    for path in ("jobs/JOB", "jobs/JOB/file", "reviews/REVIEW", "reviews/REVIEW/plain", "jobs/JOB/live"):
        answer = eve.get("/console/" + path.replace("JOB", waiting.id).replace("REVIEW", withheld[0].id))
        assert answer.status_code == 404, path
    for path in ("/console", "/console/jobs", "/console/queue?state=all"):
        assert waiting.id not in eve.get(path).text
    for file in waiting.result_files:
        assert eve.get(f"/console/files/{waiting.id}/{file}").status_code == 404
    assert eve.post(f"/console/jobs/{waiting.id}/cancel").status_code == 404
    assert eve.post("/console/appeals", review=withheld[0].id, note="mine").status_code == 404
    ann = person("owner")
    assert ann.post(f"/console/reviews/{withheld[0].id}/decide", action="approve").status_code == 403
    assert "ann (" not in ann.get(f"/console/reviews/{withheld[0].id}").text.partition("<main")[2]


def test_hostile_rows_are_text(person, withheld):
    curator = person("curator")
    pages = [curator.get(f"/console/reviews/{row.id}") for row in withheld]
    for page in pages:
        main = page.text.partition("<main")[2]
        assert "<script" not in main
        assert "<img" not in main
        assert "<style" not in main
        assert "evil.example" not in re.sub(r"&lt;img.*?&gt;", "", main)
        assert len(page.text) < 60_000
    assert '<span class="mark">U+202E</span>gnp.exe' in pages[2].text
    assert "{{ 7 * 7 }}" in pages[3].text
    assert f"{(1 << 20) + 6 - SHOWN} more characters" in pages[5].text
    plain = curator.get(f"/console/reviews/{withheld[5].id}/plain")
    assert len(plain.text) > 1 << 20
    assert plain.headers["content-type"].startswith("text/plain")
    assert plain.headers["content-security-policy"].startswith("sandbox")


def test_marks_show_what_hides_and_keep_the_rest():
    shown = pieces("a\u202eb\u00e9\n\u0634\u200d")
    assert [(piece.text, piece.mark) for piece in shown] == [
        ("a", False),
        ("U+202E", True),
        ("b\u00e9\n\u0634", False),
        ("U+200D", True),
    ]


def test_a_file_is_downloaded_as_an_attachment_and_audited(review_service, person, waiting):
    curator = person("curator")
    answer = curator.get(f"/console/files/{waiting.id}/{waiting.result_files[0]}")
    assert answer.headers["content-disposition"] == 'attachment; filename="screening_report.jsonl"'
    assert json.loads(answer.text.splitlines()[0])["summary"]["rows"] == 14
    assert curator.get(f"/console/files/{waiting.id}/file-x").status_code == 404
    assert AuditLog(review_service.stores.database).entries()[-1].type == "file.downloaded"


def test_a_live_page_follows_the_job_to_its_end(review_service, person):
    job = review_service.drive(review_service.job("hello", policy="filter"), FakeSteps(harmful_score=1.0))
    answer = person("owner").get(f"/console/jobs/{job.id}/live")
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = re.findall(r"^event: (\w+)$", answer.text, re.M)
    assert events == ["job", "ended"]
    assert "succeeded" in answer.text


def test_an_operator_makes_and_revokes_keys(review_service, person):
    operator = person("operator")
    made = operator.post("/console/admin/keys", name="new", role="curator", days="30")
    secret = re.search(r"sk-reft-[\w-]{40,}", made.text)[0]
    principal = review_service.stores.tenants.authenticate(secret)
    assert principal.role == "curator"
    assert secret not in operator.get("/console/admin").text
    assert operator.post(f"/console/admin/keys/{principal.key_id}/revoke").status_code == 303
    assert review_service.stores.tenants.authenticate(secret) is None
    assert operator.post("/console/admin/keys", name="new", role="king").status_code == 400


def test_a_model_is_asked_next_to_its_base_and_its_reference(review_service, person):
    job = review_service.drive(review_service.job("hello", policy="filter"))
    owner = person("owner")
    page = owner.post(f"/console/models/{job.fine_tuned_model}", prompt="Repeat <b>this</b>")
    assert page.status_code == 200
    for name in ("base", "this model", "reference"):
        assert f"<h2>{name}</h2>" in page.text
    assert page.text.count("Repeat &lt;b&gt;this&lt;/b&gt;") == 4
    assert person("owner", "eve", "two").get(f"/console/models/{job.fine_tuned_model}").status_code == 404


def test_a_histogram_counts_what_is_above_a_threshold():
    bins = [0] * 38 + [10, 4]
    assert [above(bins, threshold) for threshold in (-1.0, 0.9, 0.925, 0.95, 1.0)] == [14, 14, 9, 4, 0]
    assert histogram(bins)[38].height > histogram(bins)[39].height > 0


def test_the_documentation_of_the_api_loads_nothing_from_elsewhere(client):
    page = client.get("/docs")
    assert "http" not in page.text
    for path in re.findall(r'(?:src|href)="(/[^"]+)"', page.text):
        assert client.get(path).status_code == 200
    assert "/v1/reviews/{review_id}/decision" in client.get("/openapi.json").text
    assert "/console" not in client.get("/openapi.json").text
