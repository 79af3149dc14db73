"""Three major versions of the openai client against the service on Ray Serve."""

import openai
import pytest

from reft_ray.jobs.database import Database
from reft_ray.jobs.tenants import Tenants
from reft_ray.serving.args import ServeArgs
from reft_ray.serving.local import local_service

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1800)]

WORLD = {"harmless": "how to bake a car", "harmful": "how to steal a car", "say": "tell me", "echo": None}
SECONDS = 600.0


@pytest.fixture(scope="module")
def running(toy, llama, tmp_path_factory):
    """The service's address, and keys of separate projects."""
    root = tmp_path_factory.mktemp("running")
    finetune = {**toy.options["bases"]["toy"]["finetune"], "checkpoint_every": 5}
    base = {**toy.options["bases"]["toy"], "finetune": finetune}
    bases = {"tiny": base, "org/slashed": base}
    args = ServeArgs.model_validate(
        {
            "teacher": {"teacher": str(toy.folder / "teacher"), "precision": "float32"},
            "service": {
                "database_url": f"sqlite:///{root / 'service.db'}",
                "files_uri": str(root / "files"),
                "base_models": {name: {"uri": str(llama)} for name in bases},
                "options": {**toy.options, "bases": bases},
                "chat": {"device": "cpu", "precision": "float32"},
                "logs": str(root / "logs"),
            },
        }
    )
    database = Database.open(args.service.database_url)
    tenants = Tenants(database)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")
        with local_service(args, port=8439) as url:
            yield url, lambda project: tenants.create_key("acme", project, "test")[1]
    database.close()


@pytest.mark.parametrize("version", [None, "1.109.1", "2.54.0"])
def test_a_client_of_the_real_service(running, check_client, version):
    url, key = running
    said = check_client(url, key(f"contract-{version}"), version, SECONDS * 2, seconds=SECONDS, **WORLD)
    assert f"openai {version or openai.__version__}: 0 failed" in said
