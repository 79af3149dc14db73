"""No call of the gateway's document ends in a server error, by schemathesis, in front of a second implementation."""

from contextlib import ExitStack
from typing import Any

import pytest
from proxy.small_upstream import KEY, SmallUpstream

from reft_ray.api.moderator import LocalModerator
from reft_ray.proxy.app import create_proxy
from reft_ray.proxy.upstream import ProxySettings
from reft_ray.testbed.word_scorer import WordScorer

schemathesis = pytest.importorskip("schemathesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from schemathesis.checks import not_a_server_error  # noqa: E402

# Rows of JSONL are bytes to schemathesis.
schemathesis.serializer.alias("application/jsonl", "application/octet-stream")


@pytest.mark.parametrize("examples", [4, pytest.param(100, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_no_call_ends_in_a_server_error(serving: Any, tmp_path: Any, examples: int) -> None:
    with ExitStack() as stack:
        upstream = SmallUpstream()
        stack.callback(upstream.close)
        app = create_proxy(
            LocalModerator(WordScorer()), ProxySettings(upstream=upstream.url, state=str(tmp_path / "state"))
        )
        address = stack.enter_context(serving(app))
        schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
        operations = [result.ok() for result in schema.get_all_operations()]
        assert len(operations) >= 20
        for operation in operations:

            @settings(
                max_examples=examples,
                deadline=None,
                derandomize=True,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            @given(case=operation.as_strategy())
            def answers(case: Any) -> None:
                response = case.call(headers={"authorization": f"Bearer {KEY}"})
                # 501: a gateway keeps no resumable screenings. 502: not what an upstream of OpenAI's kind says.
                # 504: the end of a deadline that the call has set, such as a millisecond.
                expected = (501, 502, 504) if "x-request-timeout-ms" in (case.headers or {}) else (501, 502)
                if response.status_code not in expected:
                    case.validate_response(response, checks=[not_a_server_error])

            answers()
