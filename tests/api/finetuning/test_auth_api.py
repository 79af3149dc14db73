"""Keys, scopes, limits and what happens without them, over HTTP."""

import asyncio

import httpx
import openai
import pytest
from fixtures.sqlite import sqlite_url

from reft_ray.api.auth import check_bind, scope_of
from reft_ray.api.chat_model import EchoChat
from reft_ray.api.moderator import LocalModerator
from reft_ray.api.service_app import create_service_app
from reft_ray.api.settings import BaseModelSettings, ServiceSettings
from reft_ray.api.stores import Stores
from reft_ray.core.errors import UsageError
from reft_ray.jobs.database import Database
from reft_ray.telemetry import catalog
from reft_ray.testbed.word_scorer import WordScorer


def client_with(service, secret, **options):
    return service.connect(secret, max_retries=0, **options)


def test_a_wrong_key_is_401_and_its_text_is_not_repeated(service):
    service.secret()
    with pytest.raises(openai.AuthenticationError) as caught:
        client_with(service, "sk-reft-wrong").models.list()
    assert caught.value.code == "invalid_api_key"
    assert "sk-reft-wrong" not in str(caught.value)
    answer = httpx.get(f"{service.url}/v1/models")
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_api_key")
    assert answer.headers["x-request-id"]


def test_a_key_of_another_project_or_organisation_is_not_used_for_this_one(service):
    secret = service.secret()
    with pytest.raises(openai.AuthenticationError, match="proj_other"):
        client_with(service, secret, project="proj_other").models.list()
    assert client_with(service, secret, project=service.project_id).models.list().data


def test_a_key_is_limited_to_its_scopes(service, rows):
    secret = service.stores.tenants.create_key("acme", "scoped", "reader", ["files.read", "models.read"])[1]
    client = client_with(service, secret)
    assert client.files.list().data == []
    assert client.models.list().data
    for call in (
        lambda: client.files.create(file=("a.jsonl", rows), purpose="fine-tune"),
        lambda: client.fine_tuning.jobs.list(),
        lambda: client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}]),
        lambda: client.moderations.create(input="x"),
        lambda: client.models.delete("ft:x"),
    ):
        with pytest.raises(openai.PermissionDeniedError) as caught:
            call()
        assert (caught.value.code, caught.value.type) == ("insufficient_permissions", "permission_error")


@pytest.mark.parametrize(
    ("method", "path", "scope"),
    [
        ("GET", "/v1/files/file-1/content", "files.read"),
        ("POST", "/v1/uploads", "files.write"),
        ("POST", "/v1/fine_tuning/jobs/x/cancel", "fine_tuning.write"),
        ("DELETE", "/v1/models/ft:a", "models.write"),
        ("POST", "/v1/chat/completions", "chat"),
        ("POST", "/v1/screenings", "moderations"),
        ("GET", "/v1/teacher", "moderations"),
        ("GET", "/v1/webhook_endpoints", "webhooks"),
        ("GET", "/v1/something_new", None),
        ("GET", "/metrics", None),
    ],
)
def test_every_path_needs_a_scope(method, path, scope):
    assert scope_of(method, path) == scope


def test_every_route_has_a_scope(service):
    document = httpx.get(f"{service.url}/openapi.json").json()
    for path, operations in document["paths"].items():
        if path.startswith("/v1/"):
            for method in operations:
                assert scope_of(method.upper(), path) is not None, path


def test_limits_are_in_the_headers_and_enforced(service):
    _, secret = service.stores.tenants.create_key("acme", "limited", "x", limits={"requests_per_minute": 3})
    client = client_with(service, secret)
    raw = client.models.with_raw_response.list()
    assert raw.headers["x-ratelimit-limit-requests"] == "3"
    assert raw.headers["x-ratelimit-remaining-requests"] == "2"
    assert raw.headers["x-ratelimit-reset-requests"].endswith("s")
    client.models.list()
    client.models.list()
    with pytest.raises(openai.RateLimitError) as caught:
        client.models.list()
    assert (caught.value.code, caught.value.type) == ("rate_limit_exceeded", "requests")
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 20
    assert caught.value.response.headers["x-ratelimit-remaining-requests"] == "0"
    assert service.recorder.total(catalog.RATE_LIMITED, limit="requests") == 1
    # A second key of the project draws from the same bucket.
    with pytest.raises(openai.RateLimitError):
        client_with(service, service.stores.tenants.create_key("acme", "limited", "y")[1]).models.list()


def test_tokens_are_limited_and_unused_ones_are_returned(service):
    _, secret = service.stores.tenants.create_key("acme", "talkative", "x", limits={"tokens_per_minute": 100})
    client = client_with(service, secret)

    def talk(most, **options):
        return client.chat.completions.with_raw_response.create(
            model="tiny", messages=[{"role": "user", "content": "one two"}], max_tokens=most, **options
        )

    for stream in (False, True):
        answer = talk(85, stream=stream)
        if stream:
            assert list(answer.parse())
        assert int(answer.headers["x-ratelimit-remaining-tokens"]) < 12
    assert int(talk(10).headers["x-ratelimit-remaining-tokens"]) >= 75
    with pytest.raises(openai.RateLimitError, match="too large") as caught:
        talk(200)
    assert caught.value.type == "tokens"
    assert caught.value.response.headers["x-should-retry"] == "false"


def test_unfinished_jobs_have_a_quota(service, rows):
    _, secret = service.stores.tenants.create_key("acme", "busy", "x", limits={"unfinished_jobs": 1})
    client = client_with(service, secret)
    file = client.files.create(file=("a.jsonl", rows), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file)
    with pytest.raises(openai.RateLimitError) as caught:
        client.fine_tuning.jobs.create(model="tiny", training_file=file)
    assert caught.value.code == "insufficient_quota"
    # The client would send it three times.
    headers = caught.value.response.headers
    assert (headers["x-should-retry"], int(headers["retry-after"])) == ("false", 60)
    assert service.recorder.total(catalog.RATE_LIMITED, limit="jobs") == 1
    client.fine_tuning.jobs.cancel(job.id)
    client.fine_tuning.jobs.create(model="tiny", training_file=file)


def test_changes_are_in_the_audit_log(service, rows):
    client = service.client("audited")
    principal = service.stores.tenants.authenticate(service.secret("audited"))
    file = client.files.create(file=("a.jsonl", rows), purpose="fine-tune").id
    job = client.fine_tuning.jobs.create(model="tiny", training_file=file)
    client.fine_tuning.jobs.pause(job.id)
    client.fine_tuning.jobs.resume(job.id)
    client.fine_tuning.jobs.cancel(job.id)
    client.files.delete(file)
    entries = [
        entry for entry in service.stores.audit.entries(limit=10_000) if entry.project_id == principal.project_id
    ]
    assert [entry.type for entry in entries] == [
        "api_key.created",
        "file.created",
        "fine_tuning.job.created",
        "fine_tuning.job.paused",
        "fine_tuning.job.resumed",
        "fine_tuning.job.cancelled",
        "file.deleted",
    ]
    assert entries[1].actor == {"type": "api_key", "api_key": {"id": principal.key_id, "type": "user"}}
    assert service.stores.audit.verify().fault is None


def test_webhook_endpoints_show_their_secret_once(service):
    headers = {"authorization": f"Bearer {service.secret()}"}
    url = f"{service.url}/v1/webhook_endpoints"
    made = httpx.post(url, json={"url": "http://127.0.0.1:9/hook"}, headers=headers).json()
    assert made["secret"].startswith("whsec_")
    listed = httpx.get(url, headers=headers).json()["data"]
    assert [item["id"] for item in listed] == [made["id"]]
    assert "secret" not in listed[0]
    assert httpx.post(url, json={"url": "http://x", "event": []}, headers=headers).status_code == 400
    assert httpx.delete(f"{url}/{made['id']}", headers=headers).json()["deleted"] is True
    assert httpx.delete(f"{url}/{made['id']}", headers=headers).status_code == 404


def test_without_keys_only_loopback_is_allowed(tmp_path, serving):
    database = Database.open(sqlite_url(tmp_path))
    stores = Stores.open(
        database, str(tmp_path / "files"), ServiceSettings(base_models={"tiny": BaseModelSettings(uri="/m")})
    )
    app = create_service_app(LocalModerator(WordScorer()), stores, EchoChat())
    transport = httpx.ASGITransport(app, client=("10.1.2.3", 1234))
    with serving(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="anything") as client:
        assert [model.id for model in client.models.list()] == ["tiny"]

        async def from_elsewhere():
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as stranger:
                return await stranger.get("/v1/models")

        assert asyncio.run(from_elsewhere()).status_code == 401
        stores.tenants.create_key("acme", "one", "first")
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_loopback_needs_a_key_where_the_operator_requires_it(serving, tmp_path):
    settings = ServiceSettings(base_models={"tiny": BaseModelSettings(uri="/m")}, require_keys=True)
    stores = Stores.open(Database.open(sqlite_url(tmp_path)), str(tmp_path), settings)
    with (
        serving(create_service_app(LocalModerator(WordScorer()), stores, EchoChat())) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="anything") as client,
    ):
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
        _, secret = stores.tenants.create_key("acme", "one", "first")
        assert client.with_options(api_key=secret).models.list().data


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_no_other_address_is_bound_without_keys(host):
    with pytest.raises(UsageError, match="loopback only; make a key, or"):
        check_bind(host, False, "make a key")
    check_bind(host, True, "make a key")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_loopback_needs_no_key(host):
    check_bind(host, False, "make a key")
