"""Threads spin briefly unless the user chose otherwise."""

import pytest

from reft_ray.openmp import BRIEF, waiting_variables


def test_threads_spin_briefly_unless_the_user_has_chosen() -> None:
    assert waiting_variables({"PATH": "/bin"}) == BRIEF


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_a_choice_is_kept_and_given_to_workers(name: str) -> None:
    assert waiting_variables({"PATH": "/bin", name: "active"}) == {name: "active"}


def test_workers_get_what_the_command_has_set() -> None:
    assert waiting_variables(dict(BRIEF)) == BRIEF
