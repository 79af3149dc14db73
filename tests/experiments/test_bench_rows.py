"""The rows of a comparison."""

import pytest

from reft_ray.experiments.bench.rows import builtin_rows
from reft_ray.testbed.world import Sizes, World

SIZES = Sizes(20, 20, 20, 20, 20, 20)


@pytest.mark.parametrize("part", ["task_test", "user_rows"])
def test_other_rows_have_another_identity(part, monkeypatch):
    before = builtin_rows(SIZES).identity
    assert builtin_rows(SIZES).identity == before
    drawn = getattr(World, part)
    monkeypatch.setattr(World, part, lambda *args: drawn(*args)[1:])
    assert builtin_rows(SIZES).identity != before
