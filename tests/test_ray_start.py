"""A Ray that does not start is an error of one line."""

import pytest

from reft_ray import local_ray
from reft_ray.core.errors import ReftError

LATE = "The current node timed out during startup. This could happen because some of the raylet failed to startup"


@pytest.mark.parametrize(("message", "error"), [(LATE, ReftError), ("no free port", RuntimeError)])
def test_a_start_that_takes_too_long_is_said_in_one_line(monkeypatch, message: str, error: type[Exception]) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError(message)

    ended = []
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(local_ray.ray, "init", fail)
    monkeypatch.setattr(local_ray.ray, "shutdown", lambda: ended.append(True))
    with pytest.raises(error) as raised:
        local_ray.start_own_ray(1)
    assert "\n" not in str(raised.value)
    assert bool(ended) is (error is ReftError), "what had started is ended, so that a second try is possible"
