"""Keys, scopes and expiry; limits over all gateways."""

import math
import threading

import pytest
from sqlalchemy import event, select

from reft_ray.jobs.errors import InvalidError, NotFoundError
from reft_ray.jobs.rate_limits import RateLimits
from reft_ray.jobs.tables import api_keys
from reft_ray.jobs.tenants import Limits, Tenants


@pytest.fixture
def tenants(database):
    return Tenants(database)


def test_a_secret_is_shown_once_and_stored_as_its_hash(tenants):
    key, secret = tenants.create_key("acme", "one", "laptop", ["chat"])
    assert secret.startswith("sk-reft-")
    assert len(secret) > 40
    principal = tenants.authenticate(secret)
    assert (principal.project_id, principal.key_id, principal.scopes) == (key.project_id, key.id, frozenset({"chat"}))
    with tenants.database.read() as connection:
        assert secret not in repr(connection.execute(select(api_keys)).all())
    assert key.hint == f"sk-reft-...{secret[-4:]}"
    assert tenants.authenticate("sk-reft-nonsense") is None


def test_keys_of_the_same_names_share_a_project(tenants):
    one, _ = tenants.create_key("acme", "one", "a")
    two, _ = tenants.create_key("acme", "one", "b")
    other, _ = tenants.create_key("acme", "two", "c")
    foreign, _ = tenants.create_key("umbrella", "one", "d")
    assert one.project_id == two.project_id
    assert len({one.project_id, other.project_id, foreign.project_id}) == 3
    assert [(organization, project, key.name) for organization, project, key in tenants.list_keys()] == [
        ("acme", "one", "a"),
        ("acme", "one", "b"),
        ("acme", "two", "c"),
        ("umbrella", "one", "d"),
    ]


def test_keys_expire_and_are_revoked(tenants, clock):
    assert not tenants.any_keys()
    _, short = tenants.create_key("acme", "one", "short", expires_seconds=60)
    key, long = tenants.create_key("acme", "one", "long")
    clock.advance(61)
    assert tenants.authenticate(short) is None
    assert tenants.authenticate(long) is not None
    assert tenants.revoke(key.id).revoked_at == tenants.revoke(key.id).revoked_at == clock()
    assert tenants.authenticate(long) is None
    assert tenants.any_keys()
    assert [entry.type for entry in tenants.audit.entries()] == [
        "api_key.created",
        "api_key.created",
        "api_key.deleted",
    ]


@pytest.mark.parametrize(
    ("scopes", "message"),
    [(["chat", "everything"], "everything; a key of role owner"), ([], "none")],
)
def test_unknown_scopes_are_refused(tenants, scopes, message):
    with pytest.raises(InvalidError, match=message):
        tenants.create_key("acme", "one", "x", scopes)
    with pytest.raises(NotFoundError):
        tenants.revoke("key_none")


def test_a_project_has_its_limits(tenants):
    _, secret = tenants.create_key("acme", "one", "x")
    assert tenants.authenticate(secret).limits == Limits()
    tenants.create_key("acme", "one", "y", limits={"requests_per_minute": 5})
    tenants.create_key("acme", "one", "z", limits={"unfinished_jobs": 2})
    assert tenants.authenticate(secret).limits == Limits(requests_per_minute=5, unfinished_jobs=2)


@pytest.mark.parametrize(
    ("limits", "message"), [({"request_per_minute": 5}, "requests_per_minute"), ({"unfinished_jobs": -1}, "0 or more")]
)
def test_limits_that_are_refused_leave_no_key(tenants, limits, message):
    with pytest.raises(InvalidError, match=message):
        tenants.create_key("acme", "one", "x", limits=limits)
    assert tenants.list_keys() == []


def test_a_bucket_empties_and_refills_evenly(database, clock):
    limits = RateLimits(database)
    assert [limits.take("p", "requests", 1, 3).remaining for _ in range(3)] == [2, 1, 0]
    refused = limits.take("p", "requests", 1, 3)
    assert (refused.allowed, refused.remaining) == (False, 0)
    assert refused.wait == pytest.approx(20)
    clock.advance(19)
    assert not limits.take("p", "requests", 1, 3).allowed
    clock.advance(1.1)
    assert limits.take("p", "requests", 1, 3).allowed
    assert limits.take("other", "requests", 1, 3).allowed
    assert limits.take("p", "tokens", 1, 3).allowed
    clock.advance(3600)
    assert limits.take("p", "requests", 1, 3).remaining == 2


def test_a_request_asks_the_database_three_statements(database, tenants):
    _, secret = tenants.create_key("acme", "one", "x")
    limits, asked = RateLimits(database), []

    def request():
        principal = tenants.authenticate(secret)
        for name in ("requests", "moderation_tokens"):
            assert limits.take(principal.project_id, name, 1, 100).allowed

    request()
    event.listen(database.engine, "before_cursor_execute", lambda *given: asked.append(given[2]))
    request()
    assert [statement.split()[0] for statement in asked if statement.split()[0] != "BEGIN"] == [
        "SELECT",
        "UPDATE",
        "UPDATE",
    ]


def test_a_cost_above_the_limit_never_fits(database):
    assert math.isinf(RateLimits(database).take("p", "tokens", 11, 10).wait)


def test_an_estimate_is_settled(database, clock):
    limits = RateLimits(database)
    limits.take("p", "tokens", 80, 100)
    limits.settle("p", "tokens", 60)
    assert limits.take("p", "tokens", 80, 100).remaining == 0
    limits.settle("p", "tokens", -50)
    assert limits.take("p", "tokens", 1, 100).wait == pytest.approx(51 * 0.6)


def test_a_clock_that_runs_back_refills_nothing(database, clock):
    limits = RateLimits(database)
    limits.take("p", "requests", 2, 2)
    clock.advance(-600)
    assert not limits.take("p", "requests", 1, 2).allowed
    clock.advance(601)
    assert not limits.take("p", "requests", 1, 2).allowed


def test_gateways_together_give_no_more_than_the_limit(database):
    allowed = []
    start = threading.Barrier(6)

    def ask() -> None:
        limits = RateLimits(database)
        start.wait()
        allowed.extend(limits.take("p", "requests", 1, 10).allowed for _ in range(5))

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (sum(allowed), len(allowed)) == (10, 30)
