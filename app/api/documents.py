"""Routes: documents listed, read and deleted."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response
from pydantic import TypeAdapter, ValidationError

from app.api.bodies import DeletedDocument, Documents, Page, SingleChunk, WholeDocument
from app.api.document_page import document_page
from app.api.schemas import InCollection, Name, Wanted
from app.domain import Chunk, DeletionReceipt, Filters, StoredDocument
from app.errors import DocumentNotFound, InvalidRequest, NotFound, WriteConflict
from app.retrieval import Retriever
from app.services import Services

MAX_READS = 10
"""Of a document that is replaced between the reading of its text and of its chunks."""
FILTERS = TypeAdapter(dict[Name, Wanted])
FILTERS_PARAMETER = Query(
    max_length=10_000,
    description="a JSON object of metadata fields, as in `rag.filters`; all of them must match",
    examples=['{"author": "Marit Oldershaw"}'],
)
READ: dict[int | str, dict[str, Any]] = {
    200: {
        "model": WholeDocument | SingleChunk,
        "description": "JSON; for browsers a page",
        "content": {"text/html": {"schema": {"type": "string"}}},
    }
}


def documents_router(services: Services) -> APIRouter:
    """Build the routes over the given parts."""
    router = APIRouter(tags=["documents"])
    retriever = services.retriever

    @router.get("/v1/documents", responses={200: {"model": Documents}})
    async def list_documents(
        limit: int = Query(100, ge=1, le=1000),
        after: str | None = Query(None, max_length=512),
        filters: Annotated[str | None, FILTERS_PARAMETER] = None,
        collection: InCollection = None,
    ) -> dict[str, Any]:
        """List the documents that match in a stable order; `after` is the last id of the page before."""
        wanted = _parse_filters(filters)
        page = await retriever.documents(after=after, limit=limit + 1, filters=wanted, collection=collection)
        return {
            "object": "list",
            "data": [_document(one) for one in page[:limit]],
            "has_more": len(page) > limit,
            "total": await retriever.num_documents(wanted, collection=collection),
        }

    @router.delete("/v1/documents", responses={200: {"model": Page[DeletedDocument]}})
    async def delete_documents(
        filters: Annotated[str, FILTERS_PARAMETER],
        limit: int = Query(100, ge=1, le=1000, description="of one request; `has_more` says that some are left"),
        collection: InCollection = None,
    ) -> dict[str, Any]:
        """Remove the documents that match, each with its receipt."""
        wanted = _parse_filters(filters)
        if not wanted:
            raise InvalidRequest("Name at least one field; to remove all, delete the collection.", param="filters")
        page = await retriever.documents(limit=limit + 1, filters=wanted, collection=collection)
        receipts = []
        for one in page[:limit]:
            # Another request may have removed it meanwhile.
            with suppress(DocumentNotFound):
                receipts.append(await retriever.delete(one.id, collection=collection))
        return {"object": "list", "data": [_deleted(one) for one in receipts], "has_more": len(page) > limit}

    @router.get("/v1/documents/{document_id:path}", responses=READ, response_model=None)
    async def read_document(
        document_id: str,
        request: Request,
        chunk: Annotated[int | None, Query(ge=0, le=2**31, description="give this chunk only, by its index")] = None,
        collection: InCollection = None,
    ) -> Response | dict[str, Any]:
        """Read one document with its text and its chunks, or one chunk of it.

        A browser is given a page, in which `#n` leads to the chunk with the index `n`.
        """
        stored, text, chunks = await _read(retriever, document_id, chunk, collection)
        vary = {"Vary": "Accept"}
        if _is_browser(request):
            return HTMLResponse(await asyncio.to_thread(document_page, stored, text, chunks), headers=vary)
        if chunk is None:
            shown = [_chunk(stored, one) for one in chunks]
            return JSONResponse({**_document(stored), "text": text, "chunks": shown}, headers=vary)
        if not chunks:
            raise NotFound(f"The document {document_id!r} has {stored.num_chunks} chunks, from 0 on.", param="chunk")
        about = {"object": "chunk", "document_id": stored.id, "title": stored.title, "url": stored.url}
        return JSONResponse({**about, **_chunk(stored, chunks[0])}, headers=vary)

    @router.delete("/v1/documents/{document_id:path}", responses={200: {"model": DeletedDocument}})
    async def delete_document(document_id: str, collection: InCollection = None) -> dict[str, Any]:
        """Remove a document with all its chunks; answered when queries have shown that none of them is found."""
        return _deleted(await retriever.delete(document_id, collection=collection))

    return router


def _parse_filters(value: str | None) -> Filters:
    if value is None:
        return {}
    try:
        return FILTERS.validate_json(value)
    except ValidationError:
        raise InvalidRequest(
            'filters must be a JSON object of metadata fields and values, such as {"author": "Marit Oldershaw"}.',
            param="filters",
        ) from None


async def _read(
    retriever: Retriever, document_id: str, only: int | None, collection: str | None
) -> tuple[StoredDocument, str, Sequence[Chunk]]:
    """Read a document and its chunks, all of one version. Raises `DocumentNotFound` and `WriteConflict`."""
    for _ in range(MAX_READS):
        stored, text = await retriever.document(document_id, collection=collection)
        chunks = await retriever.chunks(document_id, version=stored.version, only=only, collection=collection)
        if chunks is not None:
            return stored, text, chunks
    raise WriteConflict(f"The document {document_id!r} changes faster than it can be read. Try again.")


def _is_browser(request: Request) -> bool:
    """Tell by what it would rather have; programs ask for JSON or do not say."""
    accepted = request.headers.get("accept", "")
    return "text/html" in accepted and "application/json" not in accepted


def _document(stored: StoredDocument) -> dict[str, Any]:
    return {"object": "document", **asdict(stored), "metadata": dict(stored.metadata)}


def _chunk(stored: StoredDocument, chunk: Chunk) -> dict[str, Any]:
    return {"id": f"{stored.id}#{chunk.index}", **asdict(chunk)}


def _deleted(receipt: DeletionReceipt) -> dict[str, Any]:
    return {"id": receipt.document_id, "object": "document.deleted", "deleted": True, "receipt": asdict(receipt)}
