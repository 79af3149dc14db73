"""`--set a.b=c` options as nested values."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from reft_ray.core.errors import UsageError


def parsed(settings: Sequence[str] | None) -> dict[str, Any]:
    """`["optimizer.learning_rate=1e-4"]` -> `{"optimizer": {"learning_rate": 1e-4}}`; values are JSON or plain text."""
    values: dict[str, Any] = {}
    for setting in settings or ():
        path, equals, text = setting.partition("=")
        if not equals or not path:
            raise UsageError(f"--set {setting}: write it as key=value")
        target = values
        *parents, last = path.split(".")
        for step in parents:
            target = target.setdefault(step, {})
        try:
            target[last] = json.loads(text)
        except json.JSONDecodeError:
            target[last] = text
    return values
