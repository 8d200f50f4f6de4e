"""Routes: files of requests for batches, and what they were answered with."""

import asyncio
import itertools
from typing import Any, Literal

from fastapi import APIRouter, HTTPException, Query, Request
from fastapi.responses import FileResponse
from starlette.requests import ClientDisconnect

from app.access import caller
from app.api.bodies import DeletedFile, FileBody, Pages
from app.api.multipart import receive_form
from app.durable import finish_in_thread
from app.errors import InvalidRequest
from app.files import FileStore, StoredFile, no_file
from app.services import Services

FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                    },
                }
            }
        },
    }
}


LINES = "application/jsonl"
CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"description": "The file as it is", "content": {LINES: {"schema": {"type": "string"}}}}
}


def files_router(services: Services) -> APIRouter:
    """Build the routes over the given parts."""
    router = APIRouter(tags=["batches"])
    files = services.files

    @router.post("/v1/files", openapi_extra=FORM, responses={200: {"model": FileBody}})
    async def create_file(request: Request) -> dict[str, Any]:
        """Take in a file of requests for a batch, a JSON object a line. It goes to disk as it comes."""
        caller.get().check_may_ask()
        return file_body(await _receive(request, files))

    @router.get("/v1/files", responses={200: {"model": Pages[FileBody]}})
    async def list_files(
        limit: int = Query(100, ge=1, le=10_000),
        after: str | None = Query(None, max_length=64, description="the last id of the page before"),
        purpose: Literal["batch", "batch_output"] | None = None,
    ) -> dict[str, Any]:
        """List the caller's files, the newest first."""
        who = caller.get()
        who.allow()  # Also where there is none.

        def page() -> list[StoredFile]:
            found = (one for one in files.recent(after=after) if who.may_have(one.key_id))
            return list(itertools.islice((one for one in found if purpose in (None, one.purpose)), limit + 1))

        return page_body([file_body(one) for one in await asyncio.to_thread(page)], limit)

    @router.get("/v1/files/{file_id}", responses={200: {"model": FileBody}})
    async def read_file(file_id: str) -> dict[str, Any]:
        """Describe one file."""
        return file_body(await own_file(services, file_id))

    @router.get("/v1/files/{file_id}/content", response_class=FileResponse, responses=CONTENT)
    async def read_file_content(file_id: str) -> FileResponse:
        """Give what a file holds."""
        found = await own_file(services, file_id)
        path = await asyncio.to_thread(files.content, file_id)
        return FileResponse(path, media_type=LINES, filename=found.name)

    @router.delete("/v1/files/{file_id}", responses={200: {"model": DeletedFile}})
    async def delete_file(file_id: str) -> dict[str, Any]:
        """Remove a file, unless a batch still reads it."""
        await own_file(services, file_id)
        for batch_id in await asyncio.to_thread(lambda: list(services.batches.unfinished())):
            if (await asyncio.to_thread(services.batches.read, batch_id)).input_file_id == file_id:
                raise InvalidRequest(f"{batch_id} still reads this file: cancel it first.", param="file_id")
        await finish_in_thread(files.delete, file_id)
        return {"id": file_id, "object": "file", "deleted": True}

    return router


async def _receive(request: Request, files: FileStore) -> StoredFile:
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise HTTPException(415, "Send multipart/form-data")
    declared = request.headers.get("content-length", "")
    upload = files.new_upload()
    try:
        await finish_in_thread(upload.open, num_expected_bytes=int(declared) if declared.isdigit() else 0)
        form = await receive_form(request.headers["content-type"], request.stream(), upload, field="file")
        if form.get("purpose") != "batch":
            raise InvalidRequest("purpose must be 'batch': files are taken for batches only.", param="purpose")
        return await finish_in_thread(files.take_over, upload, key_id=caller.get().key_id)
    except ClientDisconnect:
        raise InvalidRequest("The client left before all had come.") from None
    finally:
        await finish_in_thread(upload.close)


async def own_file(services: Services, file_id: str) -> StoredFile:
    """Find a file that the caller may have; one of others is not there. Raises `StoredFileNotFound`."""
    who = caller.get()
    who.allow()
    found = await asyncio.to_thread(services.files.read, file_id)
    if not who.may_have(found.key_id):
        raise no_file(file_id)
    return found


def file_body(file: StoredFile) -> dict[str, Any]:
    """Show a file as OpenAI's clients read it."""
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": int(file.created_at),
        "expires_at": None,
        "filename": file.name,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


def page_body(found: list[dict[str, Any]], limit: int) -> dict[str, Any]:
    """Show a page of a list, of which one entry more than the page holds was looked for."""
    data = found[:limit]
    ends = {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {}
    return {"object": "list", "data": data, **ends, "has_more": len(found) > limit}
