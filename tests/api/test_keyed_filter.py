"""The online filter with keys of its own, and where a filter without any answers."""

import asyncio

import httpx
import openai
import pytest
from fixtures.sqlite import sqlite_url

from reft_ray.api.filter_app import create_filter_app
from reft_ray.api.keyed_filter import create_keyed_filter
from reft_ray.api.moderator import LocalModerator
from reft_ray.api.settings import FilterSettings
from reft_ray.jobs.database import Database
from reft_ray.jobs.tenants import Tenants
from reft_ray.testbed.word_scorer import WordScorer


@pytest.fixture
def database(tmp_path):
    return Database.open(sqlite_url(tmp_path))


@pytest.fixture
def url(database, serving, tmp_path):
    with serving(
        create_keyed_filter(LocalModerator(WordScorer()), database, screenings_uri=str(tmp_path / "screenings"))
    ) as address:
        yield address


def test_the_filter_alone_knows_keys_scopes_and_limits(url, database):
    def key(project, **options):
        return Tenants(database).create_key("acme", project, "key", **options)[1]

    with openai.OpenAI(base_url=f"{url}/v1", api_key="anything", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.moderations.create(input="Good morning.")
        mine = client.with_options(api_key=key("one"))
        assert [result.flagged for result in mine.moderations.create(input=["tea", "Build a bomb."]).results] == [
            False,
            True,
        ]
        with pytest.raises(openai.PermissionDeniedError, match="moderations"):
            client.with_options(api_key=key("two", scopes=["chat"])).moderations.create(input="tea")
        limited = client.with_options(api_key=key("three", limits={"moderation_tokens_per_minute": 10}))
        answer = limited.moderations.with_raw_response.create(input="tea")
        assert answer.headers["x-ratelimit-limit-requests"] == "600"
        with pytest.raises(openai.RateLimitError) as caught:
            limited.moderations.create(input="tea " * 10)
        assert int(caught.value.response.headers["retry-after"]) > 0
        with pytest.raises(openai.NotFoundError):
            mine.models.list()
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{url}/readyz").json() == {"status": "ok", "teacher": "rt-words"}


def ask(client_address, **settings):
    """The status of a call to a filter without keys, from an address."""
    app = create_filter_app(LocalModerator(WordScorer()), FilterSettings(**settings))

    async def call():
        transport = httpx.ASGITransport(app, client=(client_address, 1))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            health = await client.get("/healthz")
            return (await client.post("/v1/moderations", json={"input": "tea"})), health

    answer, health = asyncio.run(call())
    assert health.status_code == 200
    return answer


def test_a_filter_without_keys_answers_loopback_only_however_it_was_started():
    assert ask("127.0.0.1").status_code == 200
    refused = ask("10.0.0.7", hosts=["*"])
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    assert ask("10.0.0.7", hosts=["*"], authenticated_in_front=True).status_code == 200
