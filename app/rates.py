"""How much each key has used in the last minute: requests and tokens, in sliding windows.

A window counts the running minute and, by how much of it still lies in the last 60 seconds, the minute before. Counted
is in memory, by each replica for itself, or in one Redis for all.
"""

import math
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

from limits.aio.storage import MemoryStorage, RedisStorage
from limits.errors import StorageError

from app.errors import RateLimited
from app.keys import Key
from app.settings import AccessSettings
from app.telemetry import logger

Unit: TypeAlias = Literal["requests", "tokens"]
UNITS: tuple[Unit, Unit] = ("requests", "tokens")
Storage: TypeAlias = MemoryStorage | RedisStorage
T = TypeVar("T")

WINDOW_S = 60
UNLIMITED = 2**31
"""What was used is counted also where it is more than was left."""
CLOCK_S = 0.001
"""What passes between two looks at a clock."""
REDIS_TIMEOUT_S = 0.5
REDIS_PAUSE_S = 5.0
"""How long Redis is left alone after it did not answer."""
BYTES_PER_TOKEN = 4
"""Of English, roughly."""


@dataclass(frozen=True, slots=True)
class Window:
    """What a key has used of its limit. `previous` still counts for `previous_s`, the current part grows until
    `current_s` have passed."""

    limit: int
    length_s: float
    previous: int = 0
    previous_s: float = 0.0
    current: int = 0
    current_s: float = 0.0

    @property
    def remaining(self) -> int:
        """How much may still be used now."""
        return max(0, self.limit - math.floor(self._used_in(0.0)))

    def wait_s(self, cost: int) -> float:
        """How long until so much may be used, if nothing else is meanwhile. At most the whole limit can be."""
        room = self.limit - min(cost, self.limit) + 1  # What is used must be less than this.
        if self._used_in(0.0) < room:
            return 0.0
        if self.current < room:
            until = self.previous_s - (room - self.current) * self.length_s / self.previous
        else:
            until = self.current_s + self.length_s - room * self.length_s / self.current
        return until + CLOCK_S

    def _used_in(self, seconds: float) -> float:
        """Weigh what was used as it will count then."""
        if seconds < self.current_s or not self.current:
            return self.current + self.previous * max(0.0, self.previous_s - seconds) / self.length_s
        return self.current * max(0.0, self.current_s + self.length_s - seconds) / self.length_s


class Rates:
    """The windows of all keys."""

    def __init__(self, settings: AccessSettings, *, length_s: int = WINDOW_S) -> None:
        self._length_s = length_s
        self._memory = MemoryStorage()
        self._redis = _redis(settings.rates_url)
        self._redis_again_at = 0.0
        self._reserved: Counter[str] = Counter()
        """Tokens of prompts that this replica answers right now, by the id of the key."""

    async def admit(self, key: Key) -> None:
        """Count one request. Raises `RateLimited` when the key has no more."""
        if key.requests_per_minute is None:
            return
        name, limit = _name(key, "requests"), key.requests_per_minute
        is_admitted = await self._ask(
            lambda storage: storage.acquire_sliding_window_entry(name, limit, self._length_s, 1)
        )
        if not is_admitted:
            raise self._exceeded(key, "requests", (await self._window(name, limit)).wait_s(1))

    async def reserve(self, key: Key, num_tokens: int) -> None:
        """Set tokens aside for a prompt. Raises `RateLimited` when the key has not so many left.

        A prompt over the whole limit needs all of it. Each reservation is given back by `settle`.
        """
        if key.tokens_per_minute is None:
            return
        window = await self._window(_name(key, "tokens"), key.tokens_per_minute)
        needed = min(num_tokens, window.limit)
        if needed > window.remaining - self._reserved[key.id]:
            raise self._exceeded(key, "tokens", window.wait_s(needed))
        self._reserved[key.id] += num_tokens

    async def settle(self, key: Key, *, num_reserved: int, num_used: int) -> None:
        """Count what was really used in place of what was reserved."""
        if key.tokens_per_minute is None:
            return
        self._reserved[key.id] -= num_reserved
        if not self._reserved[key.id]:
            del self._reserved[key.id]
        if num_used:
            name = _name(key, "tokens")
            await self._ask(
                lambda storage: storage.acquire_sliding_window_entry(name, UNLIMITED, self._length_s, num_used)
            )

    async def headers(self, key: Key) -> list[tuple[bytes, bytes]]:
        """Tell limits, what is left of them, and when they are whole again, in the headers that OpenAI sends."""
        found: dict[str, str] = {}
        limits = (key.requests_per_minute, key.tokens_per_minute)
        for unit, limit in zip(UNITS, limits, strict=True):
            if limit is not None:
                window = await self._window(_name(key, unit), limit)
                reserved = self._reserved[key.id] if unit == "tokens" else 0
                found |= {
                    f"x-ratelimit-limit-{unit}": str(limit),
                    f"x-ratelimit-remaining-{unit}": str(max(0, window.remaining - reserved)),
                    f"x-ratelimit-reset-{unit}": duration(window.wait_s(limit)),
                }
        return [(name.encode(), value.encode()) for name, value in found.items()]

    async def _window(self, name: str, limit: int) -> Window:
        previous, previous_s, current, current_s = await self._ask(
            lambda storage: storage.get_sliding_window(name, self._length_s)
        )
        # It says when the current part expires, which is a whole window after it has become the previous one.
        return Window(limit, self._length_s, previous, previous_s, current, max(0.0, current_s - self._length_s))

    async def _ask(self, question: Callable[[Storage], Awaitable[T]]) -> T:
        """Ask Redis; while it does not answer, this replica counts by itself."""
        if self._redis is not None and time.monotonic() >= self._redis_again_at:
            try:
                return await question(self._redis)
            except StorageError as error:
                self._redis_again_at = time.monotonic() + REDIS_PAUSE_S
                reason = str(error.storage_error)
                logger.warning("access.rates_url does not answer: this replica counts alone", extra={"why": reason})
        return await question(self._memory)

    def _exceeded(self, key: Key, unit: Unit, wait_s: float) -> RateLimited:
        limit = key.requests_per_minute if unit == "requests" else key.tokens_per_minute
        # What answers that are still being made have reserved may be given back at any time: then there is no wait.
        retry_after_s = max(1, math.ceil(wait_s))
        return RateLimited(
            f"The key {key.name!r} has used up its {limit} {unit} per minute. Try again in {duration(retry_after_s)}.",
            retry_after_s=retry_after_s,
        )


def estimate_tokens(num_bytes: int) -> int:
    """Guess the tokens of a prompt, before the model has counted them."""
    return math.ceil(num_bytes / BYTES_PER_TOKEN)


def duration(seconds: float) -> str:
    """Write a time as OpenAI's headers do: `6m0s`, `1s`, `20ms`."""
    milliseconds = math.ceil(seconds * 1000)
    if milliseconds < 1000:
        return f"{milliseconds}ms" if milliseconds else "0s"
    minutes, rest = divmod(math.ceil(seconds), 60)
    return f"{minutes}m{rest}s" if minutes else f"{rest}s"


def _name(key: Key, unit: Unit) -> str:
    return f"cleave/{unit}/{key.id}"


def _redis(url: str) -> RedisStorage | None:
    if url.startswith("memory://"):
        return None
    password = os.environ.get("REDIS_PASSWORD")
    return RedisStorage(
        url,
        wrap_exceptions=True,
        implementation="redispy",
        socket_timeout=REDIS_TIMEOUT_S,
        socket_connect_timeout=REDIS_TIMEOUT_S,
        **({"password": password} if password else {}),
    )
