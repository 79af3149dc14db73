"""Threads spin briefly unless the user chose otherwise."""

import pytest

from reft_ray.openmp import BRIEF, brief_unless_chosen


def test_threads_spin_briefly_unless_the_user_has_chosen() -> None:
    assert brief_unless_chosen({}) == BRIEF


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_a_choice_is_kept(name: str) -> None:
    assert brief_unless_chosen({name: "active"}) == {}
