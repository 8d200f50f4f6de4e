"""A request of either kind as the question that the chat service takes."""

import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from app.api.schemas import RAGOptions
from app.chat import AnswerEvent, ChatRequest
from app.domain import Message, SamplingParams
from app.services import Answering
from app.settings import ProfileSettings
from app.telemetry import request_id


def question(
    services: Answering,
    profile: ProfileSettings | None,
    rag: RAGOptions,
    messages: Sequence[Message],
    sampling: SamplingParams,
) -> ChatRequest:
    """Fill what the request does not say from its profile, and what that does not say from the settings."""
    settings, defaults = services.settings, profile or ProfileSettings()
    recognise = settings.planning.recognise_filters if rag.recognise_filters is None else rag.recognise_filters
    return ChatRequest(
        # Fresh for each attempt: a client's retry under the same id must not collide in the engine.
        request_id=f"{request_id.get()}-{uuid.uuid4().hex[:8]}",
        messages=tuple(messages),
        sampling=sampling,
        top_k=rag.top_k or defaults.top_k or settings.retrieval.top_k,
        timeout_s=rag.timeout_s or settings.answer.timeout_s,
        filters={**defaults.filters, **rag.filters},
        recognise_filters=recognise,
        collection=rag.collection or defaults.collection,
        use_documents=rag.enabled and profile is not None,
        grounding=defaults.grounding,
    )


async def begun(events: AsyncGenerator[AnswerEvent, None]) -> AsyncGenerator[AnswerEvent, None]:
    """Wait for the first event, so that an error before it keeps its status, and give all of them."""
    first = await anext(events)

    async def all_events() -> AsyncGenerator[AnswerEvent, None]:
        async with aclosing(events):
            yield first
            async for event in events:
                yield event

    return all_events()
