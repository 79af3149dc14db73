"""One guard in its own deployment: a plain class over lists; `app` makes it a deployment."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from reft_ray.core.cascade import Opinion
from reft_ray.core.conversation import Conversation
from reft_ray.guards.reply_guard import PARALLEL
from reft_ray.guards.settings import GuardSettings, load_guard


class GuardReplica:
    """Gives the opinions of one guard: a local model one call at a time, an endpoint several."""

    def __init__(self, settings: dict[str, Any]) -> None:
        parsed = GuardSettings.of(settings, "cascade.guards")
        self._guard = load_guard(parsed)
        self._threads = ThreadPoolExecutor(1 if parsed.local else PARALLEL, thread_name_prefix="guard")

    async def opinions(self, conversations: Sequence[Conversation], seconds: float) -> list[Opinion] | None:
        """One Opinion per conversation, in order; None if `seconds` passed before the call ended."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(seconds):
                return await loop.run_in_executor(self._threads, self._guard.opinions, conversations)
        except TimeoutError:
            return None
