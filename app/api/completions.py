"""A chat completion from its request body: what the route and the lines of a batch have in common."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from app.access import caller
from app.api.models import find_profile
from app.api.questions import question
from app.api.schemas import ChatCompletionRequest
from app.api.sse import CompletionWriter
from app.chat import AnswerEvent
from app.services import Answering


async def begin_completion(
    services: Answering, body: ChatCompletionRequest, *, base_url: str
) -> tuple[AsyncGenerator[AnswerEvent, None], CompletionWriter]:
    """Check a request; give the events of its answer, and what writes them as the client wants them."""
    answer = services.settings.answer
    body.check_supported()
    profile = await find_profile(services, body.model)
    json = await asyncio.to_thread(body.response_format.to_domain) if body.response_format else None
    sampling = body.sampling(max_tokens=answer.max_tokens, temperature=answer.temperature, json=json)
    messages = [message.to_domain() for message in body.messages]
    asked = question(services, profile, body.rag, messages, sampling)
    writer = CompletionWriter(
        model=body.model,
        base_url=base_url,
        collection=asked.collection,
        include_usage=bool(body.stream_options and body.stream_options.include_usage),
        dialect=body.rag.dialect or caller.get().dialect or (profile.dialect if profile else "annotations"),
        is_json=json is not None,
    )
    return services.chat.answer(asked), writer


async def complete(services: Answering, body: ChatCompletionRequest, *, base_url: str) -> dict[str, Any]:
    """Answer a request in one piece."""
    events, writer = await begin_completion(services, body, base_url=base_url)
    async with aclosing(events):
        return await writer.completion(events)
