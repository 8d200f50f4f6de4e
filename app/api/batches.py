"""Routes: batches, which are files of requests that are answered when there is time."""

import asyncio
import itertools
import re
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from app.access import caller
from app.api.bodies import BatchBody, Pages
from app.api.files import own_file, page_body
from app.api.json_bodies import JSONRoute
from app.batch_lines import ENDPOINT
from app.batches import Batch, BatchStore, no_batch
from app.durable import finish_in_thread
from app.errors import InvalidRequest
from app.services import Services

WINDOW = re.compile(r"([1-9]\d{0,3})([hd])")
MAX_WINDOW_DAYS = 30
TIMES = ("in_progress_at", "finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at", "cancelled_at")


class BatchRequestBody(BaseModel):
    """What a batch is begun with."""

    model_config = ConfigDict(extra="forbid")

    input_file_id: str = Field(max_length=64, examples=["file-00064412a6d8c0f3a94be87c"])
    endpoint: str = Field(max_length=256, examples=[ENDPOINT])
    completion_window: str = Field(max_length=16, examples=["24h"], description="from 1h to 30d")
    metadata: (
        dict[Annotated[str, StringConstraints(max_length=64)], Annotated[str, StringConstraints(max_length=512)]] | None
    ) = Field(None, max_length=16)


def batches_router(services: Services) -> APIRouter:
    """Build the routes over the given parts."""
    router = APIRouter(tags=["batches"], route_class=JSONRoute)
    batches = services.batches

    @router.post("/v1/batches", responses={200: {"model": BatchBody}})
    async def create_batch(body: BatchRequestBody, request: Request) -> dict[str, Any]:
        """Begin to answer the requests of a file. They are answered as `POST /v1/chat/completions` answers them."""
        who = caller.get()
        who.check_may_ask()
        if body.endpoint != ENDPOINT:
            raise InvalidRequest(f"endpoint: only {ENDPOINT} is answered in batches.", param="endpoint")
        window_s = _seconds(body.completion_window)
        file = await own_file(services, body.input_file_id)
        if file.purpose != "batch":
            raise InvalidRequest("input_file_id: this is no file of requests.", param="input_file_id")
        created = await finish_in_thread(
            batches.create,
            file.id,
            endpoint=ENDPOINT,
            completion_window=body.completion_window,
            window_s=window_s,
            key_id=who.key_id,
            base_url=str(request.base_url),
            metadata=body.metadata,
            has_webhook=services.settings.batch.webhook_url is not None,
        )
        await services.queue.put(created.id)
        return batch_body(created)

    @router.get("/v1/batches", responses={200: {"model": Pages[BatchBody]}})
    async def list_batches(
        limit: int = Query(20, ge=1, le=100),
        after: str | None = Query(None, max_length=64, description="the last id of the page before"),
    ) -> dict[str, Any]:
        """List the caller's batches, the newest first."""
        who = caller.get()
        who.allow()  # Also where there is none.

        def page() -> list[Batch]:
            own = (one for one in batches.recent(after=after) if who.may_have(one.key_id))
            return list(itertools.islice(own, limit + 1))

        return page_body([batch_body(one) for one in await asyncio.to_thread(page)], limit)

    @router.get("/v1/batches/{batch_id}", responses={200: {"model": BatchBody}})
    async def read_batch(batch_id: str) -> dict[str, Any]:
        """Say how far a batch is."""
        return batch_body(await own_batch(batches, batch_id))

    @router.post("/v1/batches/{batch_id}/cancel", responses={200: {"model": BatchBody}})
    async def cancel_batch(batch_id: str) -> dict[str, Any]:
        """Have a batch end; what is answered by then is in its files."""
        found = await own_batch(batches, batch_id)
        if not found.is_finished:
            found = await finish_in_thread(batches.cancel, batch_id)
            await services.queue.put(batch_id)
        return batch_body(found)

    return router


async def own_batch(batches: BatchStore, batch_id: str) -> Batch:
    """Find a batch that the caller may have; one of others is not there. Raises `BatchNotFound`."""
    who = caller.get()
    who.allow()
    found = await asyncio.to_thread(batches.read, batch_id)
    if not who.may_have(found.key_id):
        raise no_batch(batch_id)
    return found


def batch_body(batch: Batch) -> dict[str, Any]:
    """Show a batch as OpenAI's clients read it."""
    counts = {"total": batch.num_requests, "completed": batch.num_completed, "failed": batch.num_failed}
    times = {name: getattr(batch, name) for name in TIMES}
    return {
        "id": batch.id,
        "object": "batch",
        "endpoint": batch.endpoint,
        "errors": {"object": "list", "data": list(batch.errors)} if batch.errors else None,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status,
        "output_file_id": batch.output_file_id,
        "error_file_id": batch.error_file_id,
        "created_at": int(batch.created_at),
        "expires_at": int(batch.expires_at),
        **{name: None if when is None else int(when) for name, when in times.items()},
        "request_counts": counts,
        "metadata": batch.metadata,
    }


def _seconds(window: str) -> float:
    match = WINDOW.fullmatch(window)
    seconds = int(match[1]) * (3600 if match[2] == "h" else 86400) if match else 0
    if not 0 < seconds <= MAX_WINDOW_DAYS * 86400:
        raise InvalidRequest(
            f"completion_window: write it as hours or days, such as 24h, at most {MAX_WINDOW_DAYS}d.",
            param="completion_window",
        )
    return seconds
