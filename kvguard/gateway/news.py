"""Waiting for a condition that others bring about.

Knows: asyncio. Must not know: what is waited for. Invariant: whoever waits looks again at every piece of news, at once; no look depends on a timer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class News:
    """Told from the event loop's thread, by anything: no lock, no coroutine."""

    def __init__(self) -> None:
        self._next = asyncio.Event()

    def tell(self) -> None:
        """Something changed."""
        self._next.set()
        self._next = asyncio.Event()

    async def until(self, true: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Whether `true()` came about within `timeout_s` (None: however long it takes)."""
        try:
            async with asyncio.timeout(timeout_s):
                while not true():
                    await self._next.wait()
        except TimeoutError:
            return bool(true())
        return True
