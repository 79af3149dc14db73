"""Webhooks: recorded with the change, retried with growing waits, verified by the openai client."""

import json
import socket
import threading

import openai
import pytest

from reft_ray.jobs.addresses import is_public
from reft_ray.jobs.audit import AuditLog
from reft_ray.jobs.errors import InvalidError, NotFoundError
from reft_ray.jobs.job import Event, Status
from reft_ray.jobs.job_store import JobStore
from reft_ray.jobs.webhooks import DISABLE_SECONDS, MAX_ENDPOINTS, RETRY_SECONDS, Webhooks


class Post:
    """Records requests and answers with the next status."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.sent = []

    def __call__(self, url, body, headers, address=None):
        self.sent.append((url, body, dict(headers)))
        answer = self.answers.pop(0) if self.answers else 200
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.fixture
def webhooks(database):
    return Webhooks(database, allow_private=True)


@pytest.fixture
def finished_on(spec):
    def finish(database):
        jobs = JobStore(database)
        jobs.move(jobs.create("org-a", "proj_a", spec, {}).id, Status.FAILED, Event("over"))

    return finish


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


def test_a_project_has_ten_endpoints_at_most(webhooks):
    for number in range(MAX_ENDPOINTS):
        webhooks.add("proj_a", f"http://127.0.0.1:1/{number}")
    with pytest.raises(InvalidError, match="up to 10 endpoints"):
        webhooks.add("proj_a", "http://127.0.0.1:1/more")
    webhooks.add("proj_b", "http://127.0.0.1:1/hook")


def test_no_name_is_resolved_at_registration(sqlite_database, monkeypatch):
    numeric = socket.getaddrinfo

    def resolve(host, *args, **options):
        assert options.get("flags") == socket.AI_NUMERICHOST, f"{host} was looked up"
        return numeric(host, *args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    Webhooks(sqlite_database).add("proj_a", "https://hooks.example.com/x")


def test_endpoints_that_hang_delay_their_own_project_alone(webhooks, finished):
    """Ten endpoints of one project are silent until another project's delivery has arrived."""
    arrived, hanging = threading.Event(), []

    def post(url, body, headers, address=None):
        if url.endswith("/other"):
            arrived.set()
            return 200
        hanging.append(url)
        assert arrived.wait(30)
        raise TimeoutError

    for number in range(10):
        webhooks.add("proj_a", f"http://127.0.0.1:1/{number}")
    webhooks.add("proj_b", "http://127.0.0.1:1/other")
    finished("proj_a")
    finished("proj_b")
    assert webhooks.deliver(post) == 1
    assert hanging


def test_a_failing_endpoint_is_put_off_with_all_its_deliveries_and_disabled_after_days(webhooks, finished, clock):
    endpoint = webhooks.add("proj_a", "http://127.0.0.1:1/hook")
    for _ in range(5):
        finished()
    post = Post(*[OSError()] * 1000)
    webhooks.deliver(post)
    assert len(post.sent) == 1
    for _ in range(11):
        finished()
        clock.advance(DISABLE_SECONDS / 10)
        webhooks.deliver(post)
    assert webhooks.list("proj_a")[0].disabled_at is not None
    assert len(post.sent) == 11  # one attempt at a time, however many are due
    sent = len(post.sent)
    clock.advance(10**6)
    finished()
    webhooks.deliver(post)
    assert len(post.sent) == sent
    entries = AuditLog(webhooks.database).entries()
    assert [(entry.type, entry.data["id"]) for entry in entries] == [("webhook_endpoint.disabled", endpoint.id)]


def test_an_endpoint_that_answers_again_is_not_put_off(webhooks, finished, clock):
    webhooks.add("proj_a", "http://127.0.0.1:1/hook")
    finished()
    finished()
    post = Post(500)
    webhooks.deliver(post)
    clock.advance(6)
    assert webhooks.deliver(post) == 2


INSIDE = [
    "127.0.0.1", "10.0.0.8", "169.254.169.254", "::1", "fe80::1%eth0", "fc00::1", "64:ff9b::a00:8", "64:ff9b:1::1",
    "2002:a00:8::", "2001:0:a00:8::", "fec0::1", "224.0.0.1", "ff02::1", "::127.0.0.1", "::ffff:0:127.0.0.1",
    "::ffff:127.0.0.1", "0.0.0.0", "100.64.0.1", "240.0.0.1", "192.0.2.1", "2001:db8::1", "not an address",
]  # fmt: skip


@pytest.fixture
def resolving(monkeypatch):
    """Make every name resolve to the given addresses."""

    def resolve_to(*addresses):
        def resolve(host, *args, **options):
            if options.get("flags") == socket.AI_NUMERICHOST:
                raise socket.gaierror
            return [(0, 0, 0, "", (address, 443)) for address in addresses]

        monkeypatch.setattr(socket, "getaddrinfo", resolve)

    return resolve_to


@pytest.mark.parametrize("address", INSIDE)
def test_only_addresses_of_the_public_internet_are_public(address):
    assert not is_public(address)


def test_a_name_that_leads_inside_is_not_connected_to(sqlite_database, finished_on, resolving):
    webhooks, post = Webhooks(sqlite_database), Post()
    webhooks.add("proj_a", "https://hooks.example.com/x")
    finished_on(sqlite_database)
    resolving("8.8.8.8", "10.0.0.8")
    assert webhooks.deliver(post) == 0
    assert post.sent == []


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111"])
def test_the_address_that_was_checked_is_the_one_that_is_connected_to(sqlite_database, finished_on, resolving, address):
    assert is_public(address)
    webhooks, found = Webhooks(sqlite_database), []
    webhooks.add("proj_a", "https://hooks.example.com/x")
    finished_on(sqlite_database)
    resolving(address)
    assert webhooks.deliver(lambda url, body, headers, address: found.append(address) or 200) == 1
    assert found == [address]
