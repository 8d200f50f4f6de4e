"""Routes: chat completions."""

import asyncio
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse

from app.access import caller
from app.api.bodies import ChatCompletion
from app.api.json_bodies import JSONRoute
from app.api.models import find_profile
from app.api.questions import begun, question
from app.api.schemas import ChatCompletionRequest
from app.api.sse import EVENT_STREAM, STREAM_HEADERS, CompletionWriter, with_heartbeats
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
    answer = services.settings.answer

    @router.post("/v1/chat/completions", response_model=None, responses=ANSWER)
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> JSONResponse | StreamingResponse:
        """Answer the last message from the documents, with citations; streamed if asked for."""
        body.check_supported()
        profile = await find_profile(services, body.model)
        json = await asyncio.to_thread(body.response_format.to_domain) if body.response_format else None
        sampling = body.sampling(max_tokens=answer.max_tokens, temperature=answer.temperature, json=json)
        messages = [message.to_domain() for message in body.messages]
        asked = question(services, profile, body.rag, messages, sampling)
        events = services.chat.answer(asked)
        writer = CompletionWriter(
            model=body.model,
            base_url=str(request.base_url),
            collection=asked.collection,
            include_usage=bool(body.stream_options and body.stream_options.include_usage),
            dialect=body.rag.dialect or caller.get().dialect or (profile.dialect if profile else "annotations"),
            is_json=json is not None,
        )
        if not body.stream:
            async with aclosing(events):
                return JSONResponse(await writer.completion(events))
        lines = with_heartbeats(writer.stream(await begun(events)))
        return StreamingResponse(lines, media_type="text/event-stream", headers=STREAM_HEADERS)

    return router
