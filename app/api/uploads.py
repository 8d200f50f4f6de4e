"""Routes: documents in, as files or as JSON, ingested while the client waits or after that."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, replace
from typing import Any

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import JSONResponse
from pydantic import TypeAdapter, ValidationError

from app.access import caller
from app.api.bodies import FileReceipt, IngestionBody, Listed
from app.api.ingestions import ingestion_body
from app.api.multipart import receive_form
from app.api.schemas import DocumentBody, DocumentsBody, InCollection
from app.domain import Document, Scalar
from app.durable import finish_in_thread
from app.errors import InvalidRequest, UnreadableFile
from app.ingestion_jobs import Ingestions
from app.json_limits import check_num_values
from app.loaders import normalise
from app.retrieval import Retriever
from app.services import Services
from app.uploads import Loaded, UploadWriter, documents_of, in_groups, load, results_of

MAX_DOCUMENTS_PER_REQUEST = 10_000
"""In uploaded files that the client waits for; the rest of a longer one is refused."""

MAX_VALUES = 250_000
"""A thousand documents with all their metadata have fewer."""

METADATA = TypeAdapter(dict[str, Scalar])
ACCEPTED: dict[int | str, dict[str, Any]] = {
    200: {"model": Listed[FileReceipt]},
    202: {"model": IngestionBody, "description": "`background`: the ingestion to follow"},
}
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


def uploads_router(services: Services) -> APIRouter:
    """Build the route over the given parts."""
    router = APIRouter(tags=["documents"])
    retriever, ingestions = services.retriever, services.ingestions
    max_file_bytes = services.settings.api.max_file_bytes

    @router.post("/v1/documents", openapi_extra=BODIES, responses=ACCEPTED)
    async def add_documents(
        request: Request,
        collection: InCollection = None,
        background: bool = Query(False, description="answer when all has come, and ingest it after that"),
    ) -> JSONResponse:
        """Take in documents as JSON or as files (md, txt, html, pdf, docx, jsonl).

        Each is reported by itself: `created`, `updated`, `unchanged` or `failed` with the reason.
        """
        # Before the body is read, and also where nothing in it can be ingested.
        collection = caller.get().writable(collection)
        content_type = request.headers.get("content-type", "").lower()
        is_form = content_type.startswith("multipart/form-data")
        if not is_form and not content_type.startswith("application/json"):
            # A web page elsewhere may send other types to this machine without asking.
            raise HTTPException(415, "Send application/json or multipart/form-data")
        if not is_form and not background:
            documents = await asyncio.to_thread(_parse, await request.body())
            return JSONResponse(await _ingest(retriever, _from_json(documents), collection))
        if background:
            await ingestions.check_room()
        async with _received(request, ingestions, is_form=is_form) as upload:
            if background:
                accepted = await ingestions.submit(upload, collection=collection)
                headers = {"Location": f"/v1/ingestions/{accepted.id}"}
                return JSONResponse(ingestion_body(accepted), 202, headers)
            loaded = load(upload.folder, max_bytes=max_file_bytes, max_documents=MAX_DOCUMENTS_PER_REQUEST)
            return JSONResponse(await _ingest(retriever, loaded, collection))

    return router


@asynccontextmanager
async def _received(request: Request, ingestions: Ingestions, *, is_form: bool) -> AsyncIterator[UploadWriter]:
    """Write what is sent to disk as it comes. What nobody takes over goes at the end."""
    declared = request.headers.get("content-length", "")
    upload = ingestions.new_upload()
    try:
        await finish_in_thread(upload.open, num_expected_bytes=int(declared) if declared.isdigit() else 0)
        metadata: Mapping[str, Scalar] = {}
        if is_form:
            fields = await receive_form(request.headers["content-type"], request.stream(), upload)
            metadata = _parse_metadata(fields.get("metadata"))
            if not upload.num_files:
                raise InvalidRequest("No file was sent. Send one or more in the form field 'files'.", param="files")
        else:
            documents = await asyncio.to_thread(_parse, await request.body())
            await finish_in_thread(upload.add_documents, _from_json(documents))
        await finish_in_thread(upload.finish, metadata)
        yield upload
    finally:
        await finish_in_thread(upload.close)


async def _ingest(retriever: Retriever, loaded: Iterator[Loaded], collection: str | None) -> dict[str, Any]:
    results: list[dict[str, Any]] = []
    async with aclosing(in_groups(loaded)) as groups:
        async for group in groups:
            documents = documents_of(group)
            receipts = await retriever.ingest(documents, collection=collection) if documents else []
            results += [{"file": one.name, **asdict(receipt)} for one, receipt in results_of(group, receipts)]
    return {"object": "list", "data": results}


def _from_json(documents: Sequence[DocumentBody]) -> Iterator[Loaded]:
    for position, one in enumerate(documents):
        yield Loaded(0, one.id or f"documents[{position}]", _from_body(one))


def _parse(body: bytes) -> Sequence[DocumentBody]:
    check_num_values(body, most=MAX_VALUES)
    try:
        return DocumentsBody.model_validate_json(body).documents
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or None
        raise InvalidRequest(f"{f'{where}: ' if where else ''}{first['msg']}.", param=where) from None


def _from_body(body: DocumentBody) -> Document | UnreadableFile:
    text = normalise(body.text)
    if not text.strip():
        return UnreadableFile(f"Document {body.id or body.title!r} has no text.")
    document = Document(body.id or "", normalise(body.title).strip(), text, body.url, body.metadata)
    if body.id is None:
        # The same text sent twice is the same document.
        return replace(document, id=f"doc-{document.content_hash[:16]}")
    return document


def _parse_metadata(value: str | None) -> Mapping[str, Scalar]:
    if not value:
        return {}
    try:
        return METADATA.validate_json(value)
    except ValidationError:
        raise InvalidRequest(
            "metadata must be a JSON object of texts, numbers and booleans.", param="metadata"
        ) from None
