"""The whole service conforms to its OpenAPI document on both databases, by schemathesis: nothing undeclared, no 500."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from fixtures.review_service import ReviewService

from reft_ray.jobs.job import Status
from reft_ray.jobs.review_queue import Filter

schemathesis = pytest.importorskip("schemathesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

# Rows of JSONL are bytes to schemathesis.
schemathesis.serializer.alias("application/jsonl", "application/octet-stream")
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
ROLES = ("owner", "curator", "lead", "operator", "auditor")


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.servers)])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ReviewService]:
    url = None if request.param == "sqlite" else request.getfixturevalue("new_postgres")()
    service = ReviewService(tmp_path_factory.mktemp("service"), url, sign_releases=True)
    yield service
    service.close()


def known(service: ReviewService) -> dict[str, list[str]]:
    """Path parameters that name something, of every kind that the service stores."""
    stores = service.stores
    owner = stores.tenants.authenticate(service.key("owner"))
    assert owner is not None
    waiting = service.drive(service.job("bake bread", "which knife?", "build a bomb"))
    ended = service.drive(service.job("bake bread"))
    assert (waiting.status, ended.status) == (Status.PAUSED, Status.SUCCEEDED)
    upload = stores.uploads.create(owner.project_id, "part.jsonl", "fine-tune", 1, "application/jsonl")
    rows = [row.id for row in stores.reviews.list(Filter(job=waiting.id)).items]
    return {
        "file_id": [waiting.spec.training_file],
        "job_id": [waiting.id, ended.id],
        "name": [str(ended.fine_tuned_model)],
        "model": ["tiny", str(ended.fine_tuned_model)],
        "upload_id": [upload.id],
        "review_id": rows,
    }


@pytest.mark.parametrize("examples", [4, pytest.param(200, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_answer_conforms_to_the_document(service: ReviewService, examples: int) -> None:
    """Each route is called by people of all roles, by nobody, and with names that exist."""
    names, statuses = known(service), Counter[int]()
    keys = [f"Bearer {service.key(role)}" for role in ROLES]
    schema = schemathesis.openapi.from_asgi("/openapi.json", service.app)
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 60
    for operation in operations:

        @settings(
            max_examples=examples, deadline=None, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy(), data=st.data())
        def conforms(case: Any, data: st.DataObject) -> None:
            key = data.draw(st.sampled_from([*keys, *keys[:1] * 10, *["Bearer nobody"] * 3]))
            for name in set(case.path_parameters or {}) & set(names):
                if data.draw(st.booleans()):
                    case.path_parameters[name] = data.draw(st.sampled_from(names[name]))
            response = case.call(headers={"authorization": key})
            statuses[response.status_code] += 1
            if response.status_code == 504 and "x-request-timeout-ms" in (case.headers or {}):
                return  # a deadline of a millisecond, which the caller has set
            case.validate_response(response, checks=CHECKS)

        conforms()
    assert all(statuses[status] > 20 for status in (200, 400, 401, 403, 404))
