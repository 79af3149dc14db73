"""Whatever is sent, no answer is a 500 and every error has the envelope."""

import itertools
import json
import random

import httpx
import pytest

ODD = [
    None,
    True,
    -1,
    10**30,
    1e308,
    "",
    "\x00",
    "\ud800",
    "../../etc/passwd",
    "a" * 5000,
    "%",
    [],
    [[]],
    {},
    {"": None},
    ["x"] * 500,
]

BODIES = {
    "/v1/fine_tuning/jobs": {
        "model": "tiny",
        "training_file": "file-x",
        "validation_file": None,
        "suffix": "s",
        "seed": 1,
        "metadata": {"a": "b"},
        "integrations": [],
        "method": {"type": "supervised"},
        "hyperparameters": {"n_epochs": 1},
        "reft": {"policy": "filter"},
    },
    "/v1/fine_tuning/jobs/estimate": {"model": "tiny", "training_file": "file-x"},
    "/v1/fine_tuning/checkpoints/ft:x/permissions": {"project_ids": ["p"]},
    "/v1/uploads": {"bytes": 1, "filename": "f", "mime_type": "t", "purpose": "fine-tune"},
    "/v1/uploads/upload_x/complete": {"part_ids": ["part_x"], "md5": "x"},
    "/v1/erasures": {"subject": "nobody at all", "dry_run": True},
    "/v1/completions": {
        "model": "tiny",
        "prompt": "x",
        "n": 1,
        "stop": "x",
        "seed": 1,
        "logprobs": 1,
        "echo": True,
        "stream": False,
        "stream_options": None,
        "moderation": None,
        "max_tokens": 1,
    },
    "/v1/webhook_endpoints": {"url": "http://127.0.0.1:9/x", "events": ["fine_tuning.job.failed"]},
    "/v1/chat/completions": {
        "model": "tiny",
        "messages": [{"role": "user", "content": "x"}],
        "n": 1,
        "stop": "x",
        "seed": 1,
        "stream": False,
        "stream_options": None,
        "moderation": None,
        "max_tokens": 1,
    },
}

PATHS = [
    "/v1/files/{}",
    "/v1/files/{}/content",
    "/v1/models/{}",
    "/v1/fine_tuning/jobs/{}",
    "/v1/fine_tuning/jobs/{}/events",
    "/v1/fine_tuning/jobs/{}/checkpoints",
    "/v1/fine_tuning/checkpoints/{}/permissions",
    "/v1/fine_tuning/jobs?after={}",
    "/v1/fine_tuning/jobs?limit={}",
    "/v1/fine_tuning/jobs?metadata[{}]=x",
    "/v1/files?after={}",
    "/v1/files?limit={}",
    "/v1/files?order={}",
]


@pytest.fixture
def http(service):
    headers = {"authorization": f"Bearer {service.secret()}"}
    with httpx.Client(base_url=service.url, headers=headers, timeout=30) as client:
        service.stores.tenants.create_key("acme", "one", "fuzz", limits={"requests_per_minute": 10**6})
        yield client


def check(answer):
    assert answer.status_code < 500, answer.text
    if answer.is_error:
        assert set(answer.json()["error"]) >= {"message", "type", "param", "code"}
        assert answer.status_code != 422
    assert answer.headers["x-request-id"]


QUICK = ("/v1/fine_tuning/jobs", "/v1/chat/completions")


@pytest.mark.parametrize(
    "path", [pytest.param(path, marks=() if path in QUICK else pytest.mark.slow) for path in BODIES]
)
def test_odd_bodies(http, path):
    for body in (b"", b"null", b"[]", b"{", b"\xff", b'{"a":' * 3000, b'{"model": NaN}', json.dumps("x").encode()):
        check(http.post(path, content=body, headers={"content-type": "application/json"}))
    for key, value in itertools.product(BODIES[path], ODD):
        body = json.dumps(BODIES[path] | {key: value}).encode()
        check(http.post(path, content=body, headers={"content-type": "application/json"}))
    for nested in ("method", "hyperparameters", "reft", "moderation", "metadata"):
        for value in ODD:
            body = json.dumps(BODIES[path] | {nested: {"type": value, "policy": value, "n_epochs": value}}).encode()
            check(http.post(path, content=body, headers={"content-type": "application/json"}))


@pytest.mark.parametrize("path", PATHS)
def test_odd_paths(http, path):
    for odd in (
        "%00",
        "%ED%A0%80",
        "..%2F..%2Fetc",
        "a" * 3000,
        "%25",
        "-1",
        "1e9",
        "%F0%9F%98%80",
        "ft:a%2Fb",
        "''--",
    ):
        check(http.get(path.format(odd)))


def test_odd_keys(service):
    for key in ("", "Basic x", "Bearer", "Bearer \xff", "Bearer " + "x" * 20_000):
        answer = httpx.get(f"{service.url}/v1/models", headers={"authorization": key.encode("latin-1")})
        assert answer.status_code in (400, 401, 431)


def hostile(source, depth=0):
    """A random value of JSON, odd ones often."""
    if depth > 4 or source.random() < 0.5:
        return source.choice(ODD)
    if source.random() < 0.5:
        return [hostile(source, depth + 1) for _ in range(source.randrange(4))]
    keys = [*itertools.chain(*BODIES.values()), "type", "mode", "", 'a"b', "\x00"]
    return {source.choice(keys): hostile(source, depth + 1) for _ in range(source.randrange(5))}


@pytest.mark.slow
@pytest.mark.parametrize("path", BODIES)
def test_ten_thousand_bodies(http, path):
    source = random.Random(path)
    for number in range(10_000):
        body = dict(BODIES[path])
        for key in source.sample(sorted(body), source.randrange(len(body) + 1)):
            body[key] = hostile(source)
        data = bytearray(json.dumps(hostile(source) if number % 10 == 0 else body).encode())
        if number % 3 == 0:
            at = source.randrange(len(data) + 1)
            data[at : at + source.randrange(9)] = source.randbytes(source.randrange(5))
        check(http.post(path, content=bytes(data), headers={"content-type": "application/json"}))
