"""Adapter directories on this machine: fetched once, kept while they are used, the least recently used out first."""

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
    """`fetch(uri, folder)` fills a directory, in a thread; requests for the same adapter wait for one fetch."""

    def __init__(self, fetch: Callable[[str, Path], Path], most_idle: int = 16) -> None:
        self._fetch = fetch
        self._most_idle = most_idle
        # Removed when the process ends as well: nobody closes a replica that is scaled down.
        self._home = tempfile.TemporaryDirectory(prefix="reft-adapters-", ignore_cleanup_errors=True)
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._made = 0

    @asynccontextmanager
    async def use(self, uri: str) -> AsyncIterator[Path]:
        """The directory of an adapter, which stays for as long as the block lasts. Raises what `fetch` raises."""
        entry = self._entries.get(uri)
        if entry is None:
            self._made += 1
            folder = Path(self._home.name) / str(self._made)
            entry = _Entry(folder, asyncio.create_task(asyncio.to_thread(self._fetch, uri, folder)))
            self._entries[uri] = entry
        self._entries.move_to_end(uri)
        entry.users += 1
        try:
            # One who leaves must not cancel the fetch that others wait for.
            yield await asyncio.shield(entry.fetched)
        finally:
            entry.users -= 1
            if entry.fetched.done() and (entry.fetched.cancelled() or entry.fetched.exception() is not None):
                # The next request tries again.
                if self._entries.get(uri) is entry:
                    del self._entries[uri]
                shutil.rmtree(entry.folder, ignore_errors=True)
            self._shrink()

    def close(self) -> None:
        """Remove all directories."""
        self._home.cleanup()

    def _shrink(self) -> None:
        idle = [uri for uri, entry in self._entries.items() if entry.users == 0 and entry.fetched.done()]
        for uri in idle[: max(0, len(idle) - self._most_idle)]:
            shutil.rmtree(self._entries.pop(uri).folder, ignore_errors=True)
