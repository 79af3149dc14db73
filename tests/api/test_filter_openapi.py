"""The service conforms to its OpenAPI document, by schemathesis."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from reft_ray.api.filter_app import create_filter_app
from reft_ray.api.moderator import LocalModerator
from reft_ray.api.settings import FilterSettings
from reft_ray.testbed.word_scorer import WordScorer

schemathesis = pytest.importorskip("schemathesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402
from schemathesis.specs.openapi.checks import (  # noqa: E402
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

# Rows of JSONL are bytes to schemathesis.
schemathesis.serializer.alias("application/jsonl", "application/octet-stream")
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
UNAVAILABLE = {503, 504}
"""Documented responses of an overloaded service, or past the caller's deadline."""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_answers_conform_to_the_document(tmp_path: Path) -> None:
    limits = FilterSettings(max_screenings=10_000, hosts=("testserver",), authenticated_in_front=True)
    app = create_filter_app(LocalModerator(WordScorer()), limits, screenings_uri=str(tmp_path))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) >= 10
    for operation in operations:

        @settings(
            max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(case=operation.as_strategy())
        def conforms(case: Any) -> None:
            response = case.call()
            checks = CHECKS if response.status_code in UNAVAILABLE else [not_a_server_error, *CHECKS]
            case.validate_response(response, checks=checks)

        conforms()


def test_the_document_shows_every_route(make_filter: Callable[..., Any]) -> None:
    document = make_filter().app.openapi()
    paths = {path for path in document["paths"] if path.startswith("/v1")}
    assert paths == {
        "/v1/moderations",
        "/v1/screenings",
        "/v1/screenings/resumable",
        "/v1/screenings/{screening_id}",
        "/v1/screenings/{screening_id}/chunks/{sequence}",
        "/v1/screenings/{screening_id}/close",
        "/v1/screenings/{screening_id}/verdicts",
        "/v1/teacher",
    }
    # FastAPI documents a 422 that is never sent.
    assert '"422"' not in json.dumps(document)
