"""Students as Serve replicas: disconnected clients, killed replicas, and a restart of the service."""

import contextlib
import os
import signal
import socket
import time

import openai
import psutil
import pytest
from ray import serve

from reft_ray.jobs.database import Database
from reft_ray.jobs.job import Event, JobSpec, Status
from reft_ray.jobs.job_store import JobStore
from reft_ray.jobs.models import ModelStore
from reft_ray.jobs.tenants import LOCAL
from reft_ray.serving.args import ServeArgs
from reft_ray.serving.local import local_service

pytestmark = [pytest.mark.ray, pytest.mark.timeout(570), pytest.mark.filterwarnings("ignore")]

SAY = [{"role": "user", "content": "how can i bake bread please tell me"}]


def until(what, seconds=120.0):
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.1)
    return found


def student_of(database, uri):
    """Record a finished job with its student, as the pipeline does."""
    jobs = JobStore(database)
    job = jobs.create(LOCAL.organization_id, LOCAL.project_id, JobSpec("tiny", "file-1", 1, suffix="mine"), {})
    for status in (Status.QUEUED, Status.RUNNING):
        jobs.move(job.id, status, Event("on"))
    with database.write() as connection:
        done = jobs.move_in(
            connection, jobs.get(job.id), Status.SUCCEEDED, Event("done"), fine_tuned_model=job.model_name
        )
        ModelStore(database).register_in(connection, done, uri)
    return job.model_name


def replicas():
    """Process ids of this test's student replicas (there is no dashboard)."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "ServeReplica:reft:Student" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def test_the_service_outlasts_clients_replicas_and_restarts(llama, adapters, tmp_path):
    args = ServeArgs.model_validate(
        {
            "teacher": {"scorer": "words"},
            "service": {
                "database_url": f"sqlite:///{tmp_path / 'service.db'}",
                "files_uri": str(tmp_path / "files"),
                "base_models": {"tiny": {"uri": str(llama)}},
                "steps": "reft_ray.jobs.fake_steps:make",
                "chat": {"device": "cpu", "precision": "float32"},
            },
            "teachers": {"cpus": 0.2, "max_ongoing": 32, "max_queued": 64},
            "gateways": {"cpus": 0.2, "max_ongoing": 32, "max_queued": 64},
            "students": {"cpus": 0.2, "max_ongoing": 32, "max_queued": 32},
        }
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]

    def talk(client, **options):
        wanted = {"model": "tiny", "messages": SAY, "temperature": 1.5, "seed": 3, "max_tokens": 12} | options
        return client.chat.completions.create(**wanted)

    def text(answer):
        return answer.choices[0].message.content

    def service():
        return local_service(args, port)

    with service() as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        database = Database.open(args.service.database_url, migrate=False)
        name = student_of(database, adapters[0])
        database.close()
        base, student = text(talk(client)), text(talk(client, model=name))
        assert base
        assert student
        assert base != student
        pieces = [chunk.choices[0].delta.content or "" for chunk in talk(client, stream=True) if chunk.choices]
        assert "".join(pieces) == base

        handle = serve.get_deployment_handle("Student", "reft")
        with talk(client, stream=True, max_tokens=200) as stream:
            next(iter(stream))
        until(lambda: handle.ongoing_requests.remote().result() == 0)

        (before,) = replicas()
        said = []
        stream = talk(client, stream=True, max_tokens=200, n=8)
        said.append(next(iter(stream)))
        os.kill(before, signal.SIGKILL)
        with pytest.raises(openai.APIError, match="during the stream"):
            said.extend(stream)
        # A request without a first piece is not lost with its replica: it is sent to the next one.
        until(lambda: before not in replicas())
        assert text(talk(client.with_options(max_retries=8))) == base

    with service() as url, openai.OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        assert text(talk(client, model=name)) == student
