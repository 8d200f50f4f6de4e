"""The queue of batches: each entry is the id of one of which a part waits for somebody to work on it.

What an entry stands for is on disk, so a queue may lose entries, and give one twice: whoever works looks for lost ones.
"""

import asyncio
from typing import Protocol


class Queue(Protocol):
    """Takes ids in; how they come out is between the queue and those who work."""

    async def put(self, batch_id: str) -> None:
        """Add an entry. While the queue cannot be reached, that is left to whoever looks for lost ones."""
        ...


class LocalQueue:
    """A queue within this process."""

    def __init__(self) -> None:
        self._entries: asyncio.Queue[str] = asyncio.Queue()

    async def put(self, batch_id: str) -> None:
        """Add an entry."""
        self._entries.put_nowait(batch_id)

    async def get(self) -> str:
        """Take the oldest entry, or wait for one."""
        return await self._entries.get()
