"""How OpenMP's threads wait for each other; it reads this when torch is imported, so nothing is imported here."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

BRIEF = {"GOMP_SPINCOUNT": "2000", "KMP_BLOCKTIME": "0"}
"""Spin for microseconds at a barrier, then sleep. OpenMP's default, milliseconds, takes the CPUs from other processes
and from the gateway; without any spinning each operation costs a wake-up, half of the time of a small one."""


def brief_unless_chosen(environment: MutableMapping[str, str] = os.environ) -> dict[str, str]:
    """The variables to set: those of `BRIEF`, or none if the user has chosen how threads wait."""
    chosen = any(name in environment for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"))
    return {} if chosen else dict(BRIEF)


def spin_briefly() -> None:
    """Set them for this process and those that it starts."""
    os.environ.update(brief_unless_chosen())
