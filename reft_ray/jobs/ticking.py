"""Work that is done again and again beside a service."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def ticking(tick: Callable[[], None], name: str, seconds: float, logger: logging.Logger) -> Iterator[None]:
    """Tick in a thread of its own while the block runs. A tick that fails is logged, the next one tries again."""
    over = threading.Event()

    def loop() -> None:
        while not over.is_set():
            try:
                tick()
            except Exception:
                logger.exception("%s failed; trying again in %.0f s", name, seconds)
            over.wait(seconds)

    thread = threading.Thread(target=loop, name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
