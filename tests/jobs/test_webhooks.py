"""Webhooks: recorded with the change, retried with growing waits, verified by the openai client."""

import json

import openai
import pytest

from reft_ray.jobs.errors import InvalidError, NotFoundError
from reft_ray.jobs.job import Event, Status
from reft_ray.jobs.webhooks import RETRY_SECONDS, Webhooks


class Post:
    """Records requests and answers with the next status."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.sent = []

    def __call__(self, url, body, headers):
        self.sent.append((url, body, dict(headers)))
        answer = self.answers.pop(0) if self.answers else 200
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def webhooks(database):
    return Webhooks(database, allow_private=True)


@pytest.fixture
def finished(jobs, spec):
    def finished(project="proj_a", to=Status.FAILED):
        job = jobs.create("org-a", project, spec, {})
        jobs.move(job.id, to, Event("over"))
        return job.id

    return finished


def test_the_openai_client_accepts_what_is_sent(webhooks, finished, clock, monkeypatch):
    endpoint = webhooks.add("proj_a", "http://127.0.0.1:1/hook")
    job_id, post = finished(), Post()
    assert webhooks.deliver(post) == 1
    (url, body, headers) = post.sent[0]
    assert url == endpoint.url
    client = openai.OpenAI(api_key="none", webhook_secret=endpoint.secret)
    monkeypatch.setattr("time.time", clock)
    event = client.webhooks.unwrap(body, headers)
    assert (event.type, event.data.id, event.object) == ("fine_tuning.job.failed", job_id, "event")
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body.replace(b"failed", b"succeeded"), headers)
    assert webhooks.deliver(post) == 0


def test_only_subscribed_events_go_to_their_project(webhooks, finished):
    webhooks.add("proj_a", "http://127.0.0.1:1/a", ["fine_tuning.job.cancelled"])
    webhooks.add("proj_b", "http://127.0.0.1:1/b")
    finished("proj_a", Status.FAILED)
    assert webhooks.deliver(Post()) == 0
    job_id, post = finished("proj_a", Status.CANCELLED), Post()
    assert webhooks.deliver(post) == 1
    assert post.sent[0][0].endswith("/a")
    assert json.loads(post.sent[0][1])["data"] == {"id": job_id}


def test_a_failed_delivery_is_retried_with_the_same_body_and_finally_abandoned(webhooks, finished, clock):
    webhooks.add("proj_a", "http://127.0.0.1:1/hook")
    finished()
    post = Post(500, OSError(), 404, *[500] * 20)
    for wait in RETRY_SECONDS:
        assert webhooks.deliver(post) == 0
        assert webhooks.deliver(post) == 0  # not before its time
        clock.advance(wait + 1)
    webhooks.deliver(post)
    clock.advance(10**7)
    webhooks.deliver(post)
    assert len(post.sent) == len(RETRY_SECONDS) + 1
    assert len({body for _, body, _ in post.sent}) == 1
    assert len({headers["webhook-id"] for _, _, headers in post.sent}) == 1


def test_a_delivery_that_succeeds_later_is_delivered_once(webhooks, finished, clock):
    webhooks.add("proj_a", "http://127.0.0.1:1/hook")
    finished()
    post = Post(503, 204)
    webhooks.deliver(post)
    clock.advance(6)
    assert webhooks.deliver(post) == 1
    clock.advance(10**6)
    assert webhooks.deliver(post) == 0
    assert len(post.sent) == 2


def test_a_removed_endpoint_receives_nothing(webhooks, finished):
    endpoint = webhooks.add("proj_a", "http://127.0.0.1:1/hook")
    finished()
    with pytest.raises(NotFoundError):
        webhooks.remove(endpoint.id, "proj_b")
    webhooks.remove(endpoint.id, "proj_a")
    post = Post()
    assert webhooks.deliver(post) == 0
    assert post.sent == []
    assert webhooks.list("proj_a") == []


MALFORMED = ["https://[::1/", "https://example.com:99999/", "https://a..b/", f"https://{'a' * 70}.org/"]


@pytest.mark.parametrize("url", MALFORMED)
def test_a_malformed_address_is_named_also_where_private_ones_are_allowed(sqlite_database, url):
    with pytest.raises(InvalidError, match="malformed") as refused:
        Webhooks(sqlite_database, allow_private=True).add("proj_a", url)
    assert refused.value.param == "url"


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1/x",
        "https://10.0.0.8/x",
        "https://169.254.169.254/latest/meta-data",
        "https://[::1]/x",
        "https://localhost/x",
        "http://8.8.8.8/x",
        "ftp://8.8.8.8/x",
        "file:///etc/passwd",
        "https://",
        *MALFORMED,
    ],
)
def test_no_webhook_reaches_into_the_operators_network(sqlite_database, url):
    with pytest.raises(InvalidError):
        Webhooks(sqlite_database).add("proj_a", url)
