"""How OpenMP's threads wait for each other; it reads this when torch is imported, so nothing is imported here."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

BRIEF = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "0"}
"""Spin for microseconds at a barrier, then sleep. OpenMP's default, milliseconds, takes the CPUs from other processes
and from the gateway; without any spinning each operation costs a wake-up, half of the time of a small one."""


_CHOICES = ("OMP_WAIT_POLICY", *BRIEF)


def waiting_variables(environment: MutableMapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that say how threads wait: those that the user has chosen, or `BRIEF`.

    Workers of a cluster are given them: only those of a local Ray inherit the environment of the process that asks.
    """
    chosen = {name: environment[name] for name in _CHOICES if name in environment}
    return chosen or dict(BRIEF)


def spin_briefly() -> None:
    """Set them for this process and those that it starts."""
    os.environ.update(waiting_variables())
