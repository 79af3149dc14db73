"""A Ray that does not start is an error of one line."""

import importlib.util

import pytest
import typer

from reft_ray import local_ray
from reft_ray.cli.common import user_errors

LATE = "The current node timed out during startup. This could happen because some of the raylet failed to startup"


@pytest.mark.parametrize(("message", "error"), [(LATE, TimeoutError), ("no free port", RuntimeError)])
def test_a_start_that_takes_too_long_is_said_in_one_line(
    monkeypatch, capsys, message: str, error: type[Exception]
) -> None:
    def fail(**_: object) -> None:
        raise RuntimeError(message)

    ended = []
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setattr(local_ray.ray, "init", fail)
    monkeypatch.setattr(local_ray.ray, "shutdown", lambda: ended.append(True))
    with pytest.raises(error) as raised:
        local_ray.start_own_ray(1)
    assert "\n" not in str(raised.value)
    if error is TimeoutError:
        with pytest.raises(typer.Exit), user_errors():
            local_ray.start_own_ray(1)
        assert "try again when there is less to do on: this machine" in capsys.readouterr().err
    assert bool(ended) is (error is TimeoutError), "what had started is ended, so that a second try is possible"


def test_no_package_makes_each_import_of_ray_slow() -> None:
    """Ray imports jsonschema, and that this package where it is installed: it builds grammars, which takes seconds."""
    assert importlib.util.find_spec("rfc3987_syntax") is None, "a package requires jsonschema[format-nongpl]"
