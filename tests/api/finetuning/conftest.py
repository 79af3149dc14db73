"""The service on a real port, and the real client in front of it."""

import asyncio
import contextlib
import json
from pathlib import Path

import httpx
import openai
import pytest
from fixtures.sqlite import sqlite_url

from reft_ray.api.chat_model import EchoChat
from reft_ray.api.moderator import LocalModerator
from reft_ray.api.service_app import create_service_app
from reft_ray.api.settings import BaseModelSettings, FilterSettings, ServiceSettings
from reft_ray.api.stores import Stores
from reft_ray.jobs.database import Database
from reft_ray.jobs.estimate import Price, Speed
from reft_ray.telemetry.recorder import MemoryRecorder
from reft_ray.testbed.word_scorer import WordScorer

SETTINGS = ServiceSettings(
    base_models={
        "tiny": BaseModelSettings(
            uri="/models/tiny",
            created_at=1_700_000_000,
            batch_size=8,
            speed=Speed(training_tokens=1000.0, screening_rows=500.0),
            price=Price(currency="EUR", job=0.5, device_hour=2.0, million_tokens=1000.0),
        ),
        "builtin": BaseModelSettings(uri="/models/builtin", price=Price(currency="EUR", device_hour=2.0)),
        "org/slashed": BaseModelSettings(uri="/models/slashed"),
    },
    alignment_datasets=("safe-v1",),
    gate={"harmful_score": 5.0},
    max_file_bytes=2 << 20,
    private_webhooks=True,
)


class Service:
    """A running service: its address, its stores, and clients with the keys of its tenants."""

    def __init__(self, url, stores, recorder):
        self.url = url
        self.stores = stores
        self.recorder = recorder
        self._secrets = {}
        self._clients = contextlib.ExitStack()

    def secret(self, project="one", organization="acme", **options):
        name = (organization, project, *sorted(options))
        if name not in self._secrets:
            self._secrets[name] = self.stores.tenants.create_key(organization, project, "test", **options)[1]
        return self._secrets[name]

    def client(self, project="one"):
        return self.connect(self.secret(project))

    def connect(self, secret, **options):
        """A client that is closed with the service."""
        return self._clients.enter_context(openai.OpenAI(base_url=f"{self.url}/v1", api_key=secret, **options))

    def close(self):
        self._clients.close()

    @property
    def project_id(self):
        return self.stores.tenants.authenticate(self.secret()).project_id


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.servers)])
def service(request, tmp_path_factory, serving):
    root = tmp_path_factory.mktemp("service")
    sqlite = request.param == "sqlite"
    url = sqlite_url(root) if sqlite else request.getfixturevalue("new_postgres")()
    stores = Stores.open(Database.open(url), str(root / "files"), SETTINGS)
    recorder = MemoryRecorder()
    app = create_service_app(LocalModerator(WordScorer()), stores, EchoChat(), recorder=recorder)
    with serving(app) as url:
        service = Service(url, stores, recorder)
        yield service
        service.close()


@pytest.fixture
def client(service):
    return service.client()


@pytest.fixture
def rows():
    """A training file of ten rows."""
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}
    return b"".join(json.dumps(row).encode() + b"\n" for _ in range(10))


@pytest.fixture
def training_file(client, rows):
    return client.files.create(file=("train.jsonl", rows), purpose="fine-tune").id


class Running:
    """An application in this process: calls by ASGI, with a body of our choice."""

    def __init__(self, root: Path, keys: bool = True, service: dict | None = None, **filter_settings: object) -> None:
        settings = ServiceSettings(base_models={"tiny": BaseModelSettings(uri="/m")}, **(service or {}))
        self.stores = Stores.open(Database.open(sqlite_url(root)), str(root / "files"), settings)
        self.app = create_service_app(
            LocalModerator(WordScorer()),
            self.stores,
            EchoChat(),
            FilterSettings(**filter_settings),
            screenings_uri=str(root / "screenings"),
        )
        self.keyed = keys
        if keys:
            self.key()

    def key(self, project: str = "one", **limits: int) -> dict[str, str]:
        secret = self.stores.tenants.create_key("acme", project, "key", limits=limits)[1]
        return {"authorization": f"Bearer {secret}"}

    async def call(self, method, path, headers=None, pieces=()):
        """Status, JSON or text, and how many messages of the body were asked for."""
        asked, answer = 0, {"body": b""}
        waiting = iter(pieces)

        async def receive():
            nonlocal asked
            asked += 1
            piece = next(waiting, None)
            if piece is None:
                await asyncio.sleep(60)  # a client that stays silent
            return {"type": "http.request", "body": piece, "more_body": True}

        async def send(message):
            if message["type"] == "http.response.start":
                answer["status"] = message["status"]
            answer["body"] += message.get("body", b"")

        named = {"host": "localhost"} | (headers or {})
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
            "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http",
            "headers": [(name.encode(), value.encode()) for name, value in named.items()],
            "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
        }  # fmt: skip
        await self.app(scope, receive, send)
        return answer["status"], answer["body"].decode(), asked

    def client(self, **options):
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://localhost", **options)


@pytest.fixture
def running(tmp_path):
    made = []

    def run(**options):
        made.append(Running(tmp_path, **options))
        return made[-1]

    yield run
    for each in made:
        each.stores.database.close()
