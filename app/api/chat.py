"""Routes: chat completions and the models that serve them."""

import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse

from app.api.schemas import PROFILE, ChatCompletionRequest
from app.api.sse import CompletionWriter, with_heartbeats
from app.chat import AnswerEvent, ChatRequest
from app.errors import LLMUnavailable, ModelNotFound
from app.services import Services
from app.telemetry import request_id

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
STARTED_AT = int(time.time())


def chat_router(services: Services) -> APIRouter:
    """Build the routes over the given parts."""
    router = APIRouter(tags=["chat"])
    settings = services.settings

    @router.post("/v1/chat/completions", response_model=None)
    async def create_chat_completion(body: ChatCompletionRequest, request: Request) -> JSONResponse | StreamingResponse:
        """Answer the last message from the documents, with citations; streamed if asked for."""
        body.check_supported()
        use_documents = body.rag.enabled and body.model == PROFILE
        if body.model != PROFILE:
            await _check_raw_model(services, body.model)
        chat_request = ChatRequest(
            # Fresh for each attempt: a client's retry under the same id must not collide in the engine.
            request_id=f"{request_id.get()}-{uuid.uuid4().hex[:8]}",
            messages=tuple(message.to_domain() for message in body.messages),
            sampling=body.sampling(max_tokens=settings.answer.max_tokens, temperature=settings.answer.temperature),
            top_k=body.rag.top_k or settings.retrieval.top_k,
            timeout_s=body.rag.timeout_s or settings.answer.timeout_s,
            filters=body.rag.filters,
            recognise_filters=(
                settings.planning.recognise_filters
                if body.rag.recognise_filters is None
                else body.rag.recognise_filters
            ),
            collection=body.rag.collection,
            use_documents=use_documents,
        )
        events = services.chat.answer(chat_request)
        writer = CompletionWriter(
            model=body.model,
            base_url=str(request.base_url),
            collection=body.rag.collection,
            include_usage=bool(body.stream_options and body.stream_options.include_usage),
        )
        if not body.stream:
            async with aclosing(events):
                return JSONResponse(await writer.completion(events))
        # The first event is awaited here: an error before it keeps its status.
        first = await anext(events)
        lines = with_heartbeats(writer.stream(_rejoined(first, events)))
        return StreamingResponse(lines, media_type="text/event-stream", headers=STREAM_HEADERS)

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """List the profile that answers from documents, and the raw language model while it is up."""
        models = [_model(PROFILE, "cleave", "Answers from the ingested documents, with citations.")]
        try:
            info = await services.llm.info()
            models.append(_model(info.id, info.engine, f"The language model alone, {info.context_window} tokens."))
        except LLMUnavailable:
            pass  # It is listed again when it is back.
        return {"object": "list", "data": models}

    return router


async def _check_raw_model(services: Services, model: str) -> None:
    try:
        served = (await services.llm.info()).id
    except LLMUnavailable:
        return  # The name cannot be checked now. The request itself is refused, and wakes a tier scaled to zero.
    if model != served:
        raise ModelNotFound(f"The model {model!r} is not served here. Use {PROFILE!r} or {served!r}.", param="model")


async def _rejoined(first: AnswerEvent, rest: AsyncGenerator[AnswerEvent, None]) -> AsyncGenerator[AnswerEvent, None]:
    async with aclosing(rest):
        yield first
        async for event in rest:
            yield event


def _model(name: str, owner: str, description: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": STARTED_AT, "owned_by": owner, "description": description}
