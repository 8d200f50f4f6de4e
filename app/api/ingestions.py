"""Routes: ingestions that go on by themselves, their progress polled or streamed."""

import asyncio
import json
from collections.abc import AsyncGenerator
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse

from app.api.bodies import IngestionBody, IngestionResults, Page
from app.api.errors import error_body, internal_error
from app.api.schemas import InCollection
from app.api.sse import EVENT_STREAM, STREAM_HEADERS, with_heartbeats
from app.errors import CleaveError, InvalidRequest
from app.ingestion_jobs import Ingestion, Ingestions
from app.services import Services

LOOK_S = 0.5
"""How soon a stream sees what whichever process works on it has written."""
RESULTS_AT_ONCE = 500
LAST_ID = "end"
"""Of the last event: who comes back with it is told not to come again."""
PROGRESS = ("num_documents", "num_documents_done", "num_files", "num_files_done", "num_chunks", "num_failed")
EVENTS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "`progress` (the ingestion), `result` (one document, with the cursor as its id), and `end`",
        "content": EVENT_STREAM,
    },
    204: {"description": "everything was sent before"},
}


def ingestions_router(services: Services) -> APIRouter:
    """Build the routes over the given parts."""
    router = APIRouter(tags=["documents"])
    ingestions = services.ingestions

    @router.get("/v1/ingestions", responses={200: {"model": Page[IngestionBody]}})
    async def list_ingestions(
        limit: int = Query(20, ge=1, le=100),
        after: str | None = Query(None, max_length=64, description="the last id of the page before"),
        collection: InCollection = None,
    ) -> dict[str, Any]:
        """List ingestions, the newest first: those that are not done, and of the last day those that are."""
        page = await ingestions.recent(after=after, limit=limit + 1, collection=collection)
        return {"object": "list", "data": [ingestion_body(one) for one in page[:limit]], "has_more": len(page) > limit}

    @router.get("/v1/ingestions/{ingestion_id}", responses={200: {"model": IngestionResults}})
    async def read_ingestion(
        ingestion_id: str,
        limit: int = Query(100, ge=0, le=1000, description="of results; 0 for none"),
        after: int = Query(0, ge=0, lt=2**53, description="`next` of the page before"),
    ) -> dict[str, Any]:
        """Say how far an ingestion is, with a page of its results."""
        found = await ingestions.read(ingestion_id)
        results = await ingestions.results(ingestion_id, after=after, limit=limit)
        return {
            **ingestion_body(found),
            "results": [one.content for one in results],
            "next": results[-1].cursor if results else after,
        }

    @router.get("/v1/ingestions/{ingestion_id}/events", responses=EVENTS, response_class=StreamingResponse)
    async def stream_ingestion(ingestion_id: str, request: Request) -> Response:
        """Stream progress and results as server-sent events until the end; resumes after `Last-Event-ID`."""
        last_id = request.headers.get("last-event-id", "")
        # What is wrong with the request is found here, where it still has a status.
        await ingestions.read(ingestion_id)
        if last_id == LAST_ID:
            return Response(status_code=204)
        if last_id and not (last_id.isascii() and last_id.isdigit() and len(last_id) < 16):
            raise InvalidRequest("Last-Event-ID is none that this stream has sent.", param="Last-Event-ID")
        after = int(last_id or 0)
        await ingestions.results(ingestion_id, after=after, limit=0)
        lines = with_heartbeats(_events(ingestions, ingestion_id, after))
        return StreamingResponse(lines, media_type="text/event-stream", headers=STREAM_HEADERS)

    @router.post("/v1/ingestions/{ingestion_id}/cancel", responses={200: {"model": IngestionBody}})
    async def cancel_ingestion(ingestion_id: str) -> dict[str, Any]:
        """Have an ingestion end; what is ingested stays. One that runs ends within a second, and then says so."""
        return ingestion_body(await ingestions.cancel(ingestion_id))

    return router


def ingestion_body(ingestion: Ingestion) -> dict[str, Any]:
    """Show an ingestion as clients see it."""
    content = asdict(ingestion)
    return {
        "object": "ingestion",
        **{name: content[name] for name in ("id", "status", "collection", "created_at", "started_at", "finished_at")},
        "progress": {name: content[name] for name in PROGRESS},
        "notice": ingestion.notice,
        "error": ingestion.error,
    }


async def _events(ingestions: Ingestions, ingestion_id: str, after: int) -> AsyncGenerator[str, None]:
    shown: dict[str, Any] = {}
    try:
        while True:
            # Read before the results, so that one that has ended has them all.
            found = await ingestions.read(ingestion_id)
            results = await ingestions.results(ingestion_id, after=after, limit=RESULTS_AT_ONCE)
            for one in results:
                yield _event("result", one.content, id=str(one.cursor))
                after = one.cursor
            if not results and found.is_finished:
                yield _event("end", ingestion_body(found), id=LAST_ID)
                return
            if (body := ingestion_body(found)) != shown:
                yield _event("progress", body)
                shown = body
            if not results:
                await asyncio.sleep(LOOK_S)
    except CleaveError as error:
        yield _event("error", error_body(error))
    except Exception as error:
        yield _event("error", error_body(internal_error(error)))


def _event(name: str, content: dict[str, Any], *, id: str | None = None) -> str:
    head = f"event: {name}\n" if id is None else f"event: {name}\nid: {id}\n"
    return f"{head}data: {json.dumps(content, ensure_ascii=False)}\n\n"
