"""Routes: documents in, listed, read and deleted; and search without an answer."""

import asyncio
import json
from dataclasses import asdict, replace
from typing import Annotated, Any, TypeAlias

from fastapi import APIRouter, HTTPException, Query, Request
from pydantic import TypeAdapter, ValidationError
from starlette.datastructures import UploadFile

from app.api.schemas import CollectionName, DocumentBody, DocumentsBody, SearchRequest
from app.api.sse import source
from app.domain import Document, IngestReceipt, Scalar, SearchQuery, StoredDocument
from app.errors import InvalidRequest, TooLarge, UnreadableFile
from app.loaders import load_file, normalise
from app.services import Services

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
    retriever = services.retriever
    max_file_bytes = services.settings.api.max_file_bytes

    @router.post("/v1/documents", openapi_extra=BODIES)
    async def add_documents(request: Request, collection: InCollection = None) -> dict[str, Any]:
        """Take in documents as JSON or as files (md, txt, html, pdf, docx, jsonl).

        Each is reported by itself: `created`, `updated`, `unchanged` or `failed` with the reason.
        """
        content_type = request.headers.get("content-type", "").lower()
        if content_type.startswith("multipart/form-data"):
            loaded = await _from_form(request, max_file_bytes)
        elif content_type.startswith("application/json"):
            loaded = await asyncio.to_thread(_from_json, await request.body())
        else:
            # A web page elsewhere may send other types to this machine without asking.
            raise HTTPException(415, "Send application/json or multipart/form-data")
        documents = [one for _, one in loaded if isinstance(one, Document)]
        receipts = await retriever.ingest(documents, collection=collection)
        return {"object": "list", "data": _results(loaded, receipts)}

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
        """Remove a document with all its chunks."""
        await retriever.delete(document_id, collection=collection)
        return {"id": document_id, "object": "document.deleted", "deleted": True}

    @router.post("/v1/search")
    async def search(body: SearchRequest) -> dict[str, Any]:
        """Find passages without generating an answer."""
        question = normalise(body.query).strip()
        if not question:
            raise InvalidRequest("The query is empty.", param="query")
        top_k = body.top_k or services.settings.retrieval.top_k
        query = SearchQuery(question, top_k, body.filters, collection=body.collection, index=body.index)
        found = await retriever.search(query)
        return {
            "object": "list",
            "data": [{"n": n, **source(one)} for n, one in enumerate(found.passages, start=1)],
            "timings_ms": dict(found.timings_ms),
        }

    return router


async def _from_form(request: Request, max_file_bytes: int) -> list[tuple[str, Document | UnreadableFile]]:
    async with request.form(max_files=1000, max_fields=100) as form:
        metadata = _parse_metadata(form.get("metadata"))
        files = [one for one in form.getlist("files") if isinstance(one, UploadFile)]
        if not files:
            raise InvalidRequest("No file was sent. Send one or more in the form field 'files'.", param="files")
        loaded: list[tuple[str, Document | UnreadableFile]] = []
        for file in files:
            name = file.filename or "unnamed"
            # One byte over the limit is enough to see that it is over.
            content = await file.read(max_file_bytes + 1)
            try:
                found = await asyncio.to_thread(
                    load_file, name, content, document_id=None, metadata=metadata, max_bytes=max_file_bytes
                )
                loaded += [(name, one) for one in found]
            except (UnreadableFile, TooLarge) as error:
                loaded.append((name, UnreadableFile(error.message)))
        return loaded


def _from_json(body: bytes) -> list[tuple[str, Document | UnreadableFile]]:
    try:
        parsed = DocumentsBody.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or None
        raise InvalidRequest(f"{f'{where}: ' if where else ''}{first['msg']}.", param=where) from None
    return [(one.id or f"documents[{position}]", _from_body(one)) for position, one in enumerate(parsed.documents)]


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
        return METADATA.validate_python(json.loads(str(value)))
    except (ValueError, ValidationError):
        raise InvalidRequest(
            "metadata must be a JSON object of texts, numbers and booleans.", param="metadata"
        ) from None


def _results(
    loaded: list[tuple[str, Document | UnreadableFile]], receipts: list[IngestReceipt]
) -> list[dict[str, Any]]:
    """Merge what was ingested with what could not be read, in the order sent."""
    remaining = iter(receipts)
    results = []
    for name, one in loaded:
        receipt = next(remaining) if isinstance(one, Document) else IngestReceipt(name, "failed", error=one.message)
        results.append({"file": name, **asdict(receipt)})
    return results


def _document(stored: StoredDocument) -> dict[str, Any]:
    return {"object": "document", **asdict(stored), "metadata": dict(stored.metadata)}
