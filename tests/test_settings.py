"""Strict settings: mistakes are named with their path and the nearest key; factories are imported by name."""

from collections.abc import Mapping

import pytest
from pydantic import Field, ValidationError

from reft_ray.core.errors import UsageError
from reft_ray.settings import Settings, load_factory


class Inner(Settings):
    rows: int = Field(1, ge=1)


class Outer(Settings):
    inner: Inner | None = None
    by_name: Mapping[str, Inner] = {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"iner": {}}, "args.iner: unknown key, did you mean inner?"),
        ({"xyz": {}}, "args.xyz: unknown key, known: inner, by_name"),
        ({"inner": {"row": 2}}, "args.inner.row: unknown key, did you mean rows?"),
        ({"by_name": {"a": {"row": 2}}}, "args.by_name.a.row: unknown key, did you mean rows?"),
        ({"inner": {"rows": 0}}, "args.inner.rows: Input should be greater than or equal to 1"),
        (3, "args: Input should be a valid dictionary"),
    ],
)
def test_a_mistake_is_named_with_its_path(values: object, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        Outer.of(values, "args")
    assert str(caught.value).startswith(message)


def test_all_mistakes_are_named() -> None:
    with pytest.raises(UsageError, match=r"inner\.rows: .*; iner: "):
        Outer.of({"iner": {}, "inner": {"rows": 0}})


def test_settings_are_frozen_and_accepted_as_they_are() -> None:
    settings = Outer.of({"inner": {"rows": 2}})
    assert Outer.of(settings) is settings
    with pytest.raises(ValidationError, match="frozen"):
        settings.inner = None  # type: ignore[misc]


def test_factories_are_imported_by_name() -> None:
    assert load_factory("reft_ray.settings:load_factory") is load_factory
    for path, message in (("reft_ray.settings:nothing", "no attribute"), ("reft_ray.nothing:f", "No module named")):
        with pytest.raises(UsageError, match=f"^{path}: .*{message}"):
            load_factory(path)
