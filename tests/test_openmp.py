"""Commands wait passively unless the user chose otherwise."""

import pytest

from reft_ray.openmp import PASSIVE, passive_unless_chosen


def test_threads_wait_passively_unless_the_user_has_chosen() -> None:
    assert passive_unless_chosen({}) == PASSIVE


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_a_choice_is_kept(name: str) -> None:
    assert passive_unless_chosen({name: "active"}) == {}
