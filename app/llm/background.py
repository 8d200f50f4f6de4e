"""Requests that nobody waits for, kept from those that somebody waits for."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager


class Priorities:
    """Counts who uses an engine, and tells background requests when to make way.

    At most `max_background` of them run at once. With `is_exclusive` none does while a foreground request is there: on
    a CPU every token of theirs is taken from the others.
    """

    def __init__(self, *, max_background: int, is_exclusive: bool) -> None:
        self._seats = asyncio.Semaphore(max_background)
        self._is_exclusive = is_exclusive
        self._num_foreground = 0
        self._is_free = asyncio.Event()
        self._is_free.set()
        self._is_taken = asyncio.Event()

    @contextmanager
    def foreground(self) -> Iterator[None]:
        """Go first."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    @asynccontextmanager
    async def background(self) -> AsyncIterator[asyncio.Event]:
        """Wait for a turn; the event that is given is set when it is to be given up."""
        async with self._seats:
            await self._is_free.wait()
            yield self._is_taken

    def _count(self, change: int) -> None:
        self._num_foreground += change
        if not self._is_exclusive:
            return
        if self._num_foreground:
            self._is_free.clear()
            self._is_taken.set()
        else:
            self._is_taken.clear()
            self._is_free.set()
