"""Local adapter directories: fetched once, kept while in use, the least recently used removed first."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(slots=True)
class _Entry:
    folder: Path
    fetched: asyncio.Task[Path]
    users: int = 0


class AdapterCache:
    """Calls `fetch(uri, folder)` in a thread; requests for the same adapter share one fetch."""

    def __init__(self, fetch: Callable[[str, Path], Path], max_idle: int = 16) -> None:
        self._fetch = fetch
        self._max_idle = max_idle
        # Also removed when the process ends: Serve does not close a replica that it scales down.
        self._root = tempfile.TemporaryDirectory(prefix="reft-adapters-", ignore_cleanup_errors=True)
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, uri: str) -> bool:
        return uri in self._entries

    @asynccontextmanager
    async def use(self, uri: str) -> AsyncIterator[Path]:
        """Keep an adapter's directory for the duration of the block. Raises what `fetch` raises."""
        entry = self._entries.get(uri)
        if entry is None:
            self._count += 1
            folder = Path(self._root.name) / str(self._count)
            entry = _Entry(folder, asyncio.create_task(asyncio.to_thread(self._fetch, uri, folder)))
            self._entries[uri] = entry
        self._entries.move_to_end(uri)
        entry.users += 1
        try:
            # A cancelled request must not cancel the fetch that others wait for.
            yield await asyncio.shield(entry.fetched)
        finally:
            entry.users -= 1
            if entry.fetched.done() and (entry.fetched.cancelled() or entry.fetched.exception() is not None):
                # The next request tries again.
                if self._entries.get(uri) is entry:
                    del self._entries[uri]
                shutil.rmtree(entry.folder, ignore_errors=True)
            self._evict()

    def close(self) -> None:
        """Remove all directories."""
        self._root.cleanup()

    def _evict(self) -> None:
        idle = [uri for uri, entry in self._entries.items() if entry.users == 0 and entry.fetched.done()]
        for uri in idle[: max(0, len(idle) - self._max_idle)]:
            shutil.rmtree(self._entries.pop(uri).folder, ignore_errors=True)
