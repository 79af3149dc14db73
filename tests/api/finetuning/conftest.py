"""The service on a real port, and the real client in front of it."""

import contextlib
import json

import openai
import pytest

from reft_ray.api.chat_model import EchoChat
from reft_ray.api.moderator import LocalModerator
from reft_ray.api.service_app import create_service_app
from reft_ray.api.settings import BaseModelSettings, ServiceSettings
from reft_ray.api.stores import Stores
from reft_ray.jobs.database import Database
from reft_ray.jobs.estimate import Speed
from reft_ray.telemetry.recorder import MemoryRecorder
from reft_ray.testbed.word_scorer import WordScorer

SETTINGS = ServiceSettings(
    base_models={
        "tiny": BaseModelSettings(
            uri="/models/tiny",
            created_at=1_700_000_000,
            batch_size=8,
            speed=Speed(training_tokens=1000.0, screening_rows=500.0),
        ),
        "builtin": BaseModelSettings(uri="/models/builtin"),
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


@pytest.fixture(scope="module")
def service(tmp_path_factory, serving):
    root = tmp_path_factory.mktemp("service")
    stores = Stores.open(Database.open(f"sqlite:///{root / 'jobs.db'}"), str(root / "files"), SETTINGS)
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
