"""The running service that the verbs talk to."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    # Imported where it is used: httpx and what it brings would double the time of `cleave --help`.
    from app.client import Client

T = TypeVar("T")


def call(url: str, use: "Callable[[Client], Awaitable[T]]", *, collection: str | None = None) -> T:
    """Use the service for one verb. A key is not taken from the command line, which every user of a machine can see."""
    from app.client import Client

    async def connected() -> T:
        async with Client(url, collection=collection, api_key=os.environ.get("CLEAVE_API_KEY")) as client:
            return await use(client)

    return asyncio.run(connected())
