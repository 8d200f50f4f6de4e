"""Routes: chat completions."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse

from app.api.bodies import ChatCompletion
from app.api.completions import begin_completion, complete
from app.api.json_bodies import JSONRoute
from app.api.questions import begun
from app.api.schemas import ChatCompletionRequest
from app.api.sse import EVENT_STREAM, STREAM_HEADERS, with_heartbeats
from app.services import Services

ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "model": ChatCompletion,
        "description": "A completion; with `stream` its chunks: sources in the first, the rest of `rag` at the end. "
        "An error ends a stream as an error object.",
        "content": EVENT_STREAM,
    }
}


def chat_router(services: Services) -> APIRouter:
    """Build the routes over the given parts."""
    router = APIRouter(tags=["chat"], route_class=JSONRoute)

    @router.post("/v1/chat/completions", response_model=None, responses=ANSWER)
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> JSONResponse | StreamingResponse:
        """Answer the last message from the documents, with citations; streamed if asked for."""
        base_url = str(request.base_url)
        if not body.stream:
            return JSONResponse(await complete(services, body, base_url=base_url))
        events, writer = await begin_completion(services, body, base_url=base_url)
        lines = with_heartbeats(writer.stream(await begun(events)))
        return StreamingResponse(lines, media_type="text/event-stream", headers=STREAM_HEADERS)

    return router
