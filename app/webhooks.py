"""Tells the operator's address of each batch that has ended, signed as OpenAI's webhooks are.

The signature is that of the Standard Webhooks specification: HMAC-SHA256 over id, time and body, in base64.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import os
import time
from pathlib import Path

import httpx

from app.batches import Batch, BatchStore
from app.durable import Hold, write_whole
from app.errors import ConfigurationError
from app.settings import BatchSettings
from app.telemetry import logger

TIMEOUT_S = 10.0
MIN_RETRY_S, MAX_RETRY_S = 5.0, 3600.0
GIVEN_UP_AFTER_S = 72 * 3600.0
"""Since its end; as OpenAI does."""
SECRET_VARIABLE = "CLEAVE_WEBHOOK_SECRET"
SECRET_PREFIX = "whsec_"


def read_secret(settings: BatchSettings) -> bytes | None:
    """Give the key of the signature; None where there is no address to tell. Raises `ConfigurationError`."""
    if settings.webhook_url is None:
        return None
    try:
        host = httpx.URL(settings.webhook_url).host
    except httpx.InvalidURL:
        host = ""
    if not host:
        raise ConfigurationError("batch.webhook_url must be an address such as https://example.org/ended.")
    secret = settings.webhook_secret or os.environ.get(SECRET_VARIABLE, "")
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except ValueError:
        key = b""
    if len(key) < 16:
        raise ConfigurationError(
            f"batch.webhook_secret must be {SECRET_PREFIX} and at least 16 bytes in base64, as from "
            f"`echo {SECRET_PREFIX}$(openssl rand -base64 32)`. Set it, or the environment variable {SECRET_VARIABLE}."
        )
    return key


def signature(key: bytes, event_id: str, sent_at: int, body: bytes) -> str:
    """Sign an event."""
    signed = f"{event_id}.{sent_at}.".encode() + body
    return "v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)).decode()


class Webhooks:
    """Sends what is due; what does not arrive is sent again, ever more seldom, for three days."""

    def __init__(self, settings: BatchSettings) -> None:
        self._url = settings.webhook_url
        self._key = read_secret(settings)

    async def send_due(self, batches: BatchStore) -> None:
        """Send what is due, unless another process does."""
        if self._url is None or self._key is None:
            return
        for batch, attempts in await asyncio.to_thread(lambda: list(batches.awaited())):
            if hold := Hold.take(attempts.parent):
                with hold:
                    await self._send(batch, attempts, self._url, self._key)

    async def _send(self, batch: Batch, attempts: Path, url: str, key: bytes) -> None:
        try:
            content = json.loads(await asyncio.to_thread(attempts.read_bytes))
        except FileNotFoundError:
            return  # Another has just sent it.
        now = time.time()
        if now < content["next_at"]:
            return
        event = {"id": f"evt_{batch.id.removeprefix('batch_')}", "object": "event", "type": f"batch.{batch.status}"}
        body = json.dumps({**event, "created_at": int(now), "data": {"id": batch.id}}).encode()
        headers = {
            "Content-Type": "application/json",
            "webhook-id": event["id"],
            "webhook-timestamp": str(int(now)),
            "webhook-signature": signature(key, event["id"], int(now), body),
        }
        problem = ""
        try:
            async with asyncio.timeout(TIMEOUT_S), httpx.AsyncClient(timeout=TIMEOUT_S) as client:
                response = await client.post(url, content=body, headers=headers)
            if not response.is_success:
                problem = f"it answered {response.status_code}"
        except (httpx.HTTPError, TimeoutError) as error:
            problem = f"{type(error).__name__}: {error}"
        extra = {"batch_id": batch.id, "num_attempts": content["num_attempts"] + 1}
        if not problem:
            logger.info("webhook sent", extra=extra)
        elif now - (batch.ended_at or now) > GIVEN_UP_AFTER_S:
            logger.error("webhook given up", extra={**extra, "why": problem})
        else:
            logger.warning("webhook not taken, it is sent again", extra={**extra, "why": problem})
            delay_s = min(MIN_RETRY_S * 2 ** content["num_attempts"], MAX_RETRY_S)
            later = {**content, "num_attempts": extra["num_attempts"], "next_at": now + delay_s}
            await asyncio.to_thread(write_whole, attempts, json.dumps(later).encode())
            return
        await asyncio.to_thread(attempts.unlink)
