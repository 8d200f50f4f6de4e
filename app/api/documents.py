"""Routes: documents in, listed, read and deleted; and search without an answer."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import asdict, replace
from typing import Annotated, Any, TypeAlias

from fastapi import APIRouter, HTTPException, Query, Request
from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import UploadFile

from app.access import caller
from app.api.schemas import CollectionName, DocumentBody, DocumentsBody, SearchRequest
from app.api.sse import source
from app.domain import Document, IngestReceipt, Message, Scalar, SearchQuery, StoredDocument
from app.errors import InvalidRequest, TooLarge, UnreadableFile
from app.loaders import load_file, normalise
from app.planning import plan_query
from app.services import Services

MAX_DOCUMENTS_PER_REQUEST = 10_000
"""In uploaded files; the rest of a longer one is refused."""
MAX_DOCUMENTS_AT_ONCE = 512
MAX_CHARACTERS_AT_ONCE = 2**20
"""Read, then ingested, before the next are read: a few small files may unpack to more than the memory holds."""

Loaded: TypeAlias = tuple[str, Document | UnreadableFile]
"""A document, or why there is none, by the name of the file or the id that was sent."""

InCollection: TypeAlias = Annotated[CollectionName | None, Query(description="default: the configured one")]
METADATA = TypeAdapter(dict[str, Scalar])
BODIES = {
    "requestBody": {
        "required": True,
        "content": {
            # Written out, since a reference would need the schema among the document's components.
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["documents"],
                    "properties": {"documents": {"type": "array", "items": DocumentBody.model_json_schema()}},
                }
            },
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["files"],
                    "properties": {
                        "files": {"type": "array", "items": {"type": "string", "format": "binary"}},
                        "metadata": {"type": "string", "description": "a JSON object of fields for all files"},
                    },
                }
            },
        },
    }
}


def documents_router(services: Services) -> APIRouter:
    """Build the routes over the given parts."""
    router = APIRouter(tags=["documents"])
    retriever, settings = services.retriever, services.settings
    max_file_bytes = services.settings.api.max_file_bytes

    @router.post("/v1/documents", openapi_extra=BODIES)
    async def add_documents(request: Request, collection: InCollection = None) -> dict[str, Any]:
        """Take in documents as JSON or as files (md, txt, html, pdf, docx, jsonl).

        Each is reported by itself: `created`, `updated`, `unchanged` or `failed` with the reason.
        """
        caller.get().writable(collection)  # Before the body is read, and also where nothing in it can be.
        content_type = request.headers.get("content-type", "").lower()
        if content_type.startswith("multipart/form-data"):
            loaded = _from_form(request, max_file_bytes)
        elif content_type.startswith("application/json"):
            loaded = _from_json(await asyncio.to_thread(_parse, await request.body()))
        else:
            # A web page elsewhere may send other types to this machine without asking.
            raise HTTPException(415, "Send application/json or multipart/form-data")
        results: list[dict[str, Any]] = []
        async with aclosing(loaded):
            async for group in _groups(loaded):
                documents = [one for _, one in group if isinstance(one, Document)]
                receipts = await retriever.ingest(documents, collection=collection) if documents else []
                results += _results(group, receipts)
        return {"object": "list", "data": results}

    @router.get("/v1/documents")
    async def list_documents(
        limit: int = Query(100, ge=1, le=1000),
        after: str | None = Query(None, max_length=512),
        collection: InCollection = None,
    ) -> dict[str, Any]:
        """List documents in a stable order; `after` is the last id of the page before."""
        page = await retriever.documents(after=after, limit=limit + 1, collection=collection)
        info = await retriever.info(collection=collection)
        return {
            "object": "list",
            "data": [_document(one) for one in page[:limit]],
            "has_more": len(page) > limit,
            "total": info.num_documents,
        }

    @router.get("/v1/documents/{document_id:path}")
    async def read_document(document_id: str, collection: InCollection = None) -> dict[str, Any]:
        """Read one document with its text."""
        stored, text = await retriever.document(document_id, collection=collection)
        return {**_document(stored), "text": text}

    @router.delete("/v1/documents/{document_id:path}")
    async def delete_document(document_id: str, collection: InCollection = None) -> dict[str, Any]:
        """Remove a document with all its chunks; answered when queries have shown that none of them is found."""
        receipt = await retriever.delete(document_id, collection=collection)
        return {"id": document_id, "object": "document.deleted", "deleted": True, "receipt": asdict(receipt)}

    @router.post("/v1/search")
    async def search(body: SearchRequest) -> dict[str, Any]:
        """Find passages without generating an answer."""
        plan = plan_query(_conversation(body))
        recognise = body.recognise_filters
        query = SearchQuery(
            plan.question,
            body.top_k or settings.retrieval.top_k,
            body.filters,
            context=plan.context,
            recognise_filters=settings.planning.recognise_filters if recognise is None else recognise,
            collection=body.collection,
            ranking=body.ranking,
            index=body.index,
        )
        found = await retriever.search(query)
        return {
            "object": "list",
            "data": [{"n": n, **source(one)} for n, one in enumerate(found.passages, start=1)],
            "recognised_filters": dict(found.recognised_filters),
            "notice": found.notice,
            "timings_ms": dict(found.timings_ms),
            "degraded": list(found.degraded),
        }

    return router


def _conversation(body: SearchRequest) -> list[Message]:
    if (body.query is None) == (body.messages is None):
        raise InvalidRequest("Send a query, or the messages of a conversation.", param="query")
    if body.messages is not None:
        return [message.to_domain() for message in body.messages]
    if not (query := normalise(body.query or "").strip()):
        raise InvalidRequest("The query is empty.", param="query")
    return [Message("user", query)]


async def _from_form(request: Request, max_file_bytes: int) -> AsyncGenerator[Loaded, None]:
    async with request.form(max_files=1000, max_fields=100) as form:
        metadata = _parse_metadata(form.get("metadata"))
        files = [one for one in form.getlist("files") if isinstance(one, UploadFile)]
        if not files:
            raise InvalidRequest("No file was sent. Send one or more in the form field 'files'.", param="files")
        num_loaded = 0
        for file in files:
            name = file.filename or "unnamed"
            # One byte over the limit is enough to see that it is over.
            content = await file.read(max_file_bytes + 1)
            try:
                found = await asyncio.to_thread(
                    load_file, name, content, document_id=None, metadata=metadata, max_bytes=max_file_bytes
                )
                while (one := await asyncio.to_thread(next, found, None)) is not None:
                    if num_loaded == MAX_DOCUMENTS_PER_REQUEST:
                        raise TooLarge(
                            f"{name}: from here on the request is over the limit of {MAX_DOCUMENTS_PER_REQUEST} "
                            "documents: send the rest in another, or use `cleave ingest`"
                        )
                    num_loaded += 1
                    yield name, one
            except (UnreadableFile, TooLarge) as error:
                yield name, UnreadableFile(error.message)


async def _from_json(documents: Sequence[DocumentBody]) -> AsyncGenerator[Loaded, None]:
    for position, one in enumerate(documents):
        yield one.id or f"documents[{position}]", await asyncio.to_thread(_from_body, one)


def _parse(body: bytes) -> Sequence[DocumentBody]:
    try:
        return DocumentsBody.model_validate_json(body).documents
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or None
        raise InvalidRequest(f"{f'{where}: ' if where else ''}{first['msg']}.", param=where) from None


async def _groups(loaded: AsyncIterator[Loaded]) -> AsyncIterator[list[Loaded]]:
    """Gather what is ingested together."""
    group: list[Loaded] = []
    num_characters = 0
    async for name, one in loaded:
        group.append((name, one))
        num_characters += len(one.text) if isinstance(one, Document) else 0
        if len(group) == MAX_DOCUMENTS_AT_ONCE or num_characters >= MAX_CHARACTERS_AT_ONCE:
            yield group
            group, num_characters = [], 0
    if group:
        yield group


def _from_body(body: DocumentBody) -> Document | UnreadableFile:
    text = normalise(body.text)
    if not text.strip():
        return UnreadableFile(f"Document {body.id or body.title!r} has no text.")
    document = Document(body.id or "", normalise(body.title).strip(), text, body.url, body.metadata)
    if body.id is None:
        # The same text sent twice is the same document.
        return replace(document, id=f"doc-{document.content_hash[:16]}")
    return document


def _parse_metadata(value: object) -> dict[str, Scalar]:
    if not value:
        return {}
    try:
        return METADATA.validate_json(str(value))
    except ValidationError:
        raise InvalidRequest(
            "metadata must be a JSON object of texts, numbers and booleans.", param="metadata"
        ) from None


def _results(loaded: Sequence[Loaded], receipts: Sequence[IngestReceipt]) -> list[dict[str, Any]]:
    """Merge what was ingested with what could not be read, in the order sent."""
    remaining = iter(receipts)
    results = []
    for name, one in loaded:
        receipt = next(remaining) if isinstance(one, Document) else IngestReceipt(name, "failed", error=one.message)
        results.append({"file": name, **asdict(receipt)})
    return results


def _document(stored: StoredDocument) -> dict[str, Any]:
    return {"object": "document", **asdict(stored), "metadata": dict(stored.metadata)}
