"""How OpenMP's threads wait for each other; it reads this when torch is imported, so nothing is imported here."""

from __future__ import annotations

import os
from collections.abc import MutableMapping

PASSIVE = {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"}
"""Sleep instead of spinning for milliseconds, which on a machine that does other work is most of the time: while
other processes used both of two cores, a pass of SmolLM2 took 4 s with them and 18 to 60 s without."""


def passive_unless_chosen(environment: MutableMapping[str, str] = os.environ) -> dict[str, str]:
    """The variables to set: those of `PASSIVE`, or none if the user has chosen how threads wait."""
    chosen = any(name in environment for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"))
    return {} if chosen else dict(PASSIVE)


def wait_passively() -> None:
    """Set them for this process and those that it starts."""
    os.environ.update(passive_unless_chosen())
