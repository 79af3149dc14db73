"""`GET /metrics`: the store's metrics, optionally with a token, without row texts."""

import httpx

from reft_ray.api.filter_app import create_filter_app
from reft_ray.api.moderator import LocalModerator
from reft_ray.telemetry import catalog
from reft_ray.testbed.word_scorer import WordScorer


def test_the_service_shows_its_store(service, client, training_file):
    client.fine_tuning.jobs.create(model="tiny", training_file=training_file)
    answer = httpx.get(f"{service.url}/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.text.splitlines()
    (waiting,) = [line for line in lines if line.startswith(catalog.JOBS.name + "{") and "validating_files" in line]
    assert float(waiting.rpartition(" ")[2]) >= 1
    for metric in (catalog.QUARANTINE_ROWS, catalog.AUDIT_BREAKS, catalog.JOB_OLDEST_QUEUED, catalog.BUILD_INFO):
        assert any(line.startswith(metric.name + "{") for line in lines)
    for secret in ("hello", training_file, service.project_id):
        assert secret not in answer.text


def test_the_metrics_require_their_token(serving):
    app = create_filter_app(LocalModerator(WordScorer()), metrics_token="s3cret")
    with serving(app) as url:
        assert httpx.get(f"{url}/metrics").status_code == 401
        assert httpx.get(f"{url}/metrics", headers={"authorization": "Bearer other"}).status_code == 401
        answer = httpx.get(f"{url}/metrics", headers={"authorization": "Bearer s3cret"})
        assert answer.status_code == 200
        assert catalog.BUILD_INFO.name in answer.text
