"""Routes: search without an answer."""

from typing import Any

from fastapi import APIRouter

from app.api.answers import source
from app.api.bodies import Found
from app.api.json_bodies import JSONRoute
from app.api.schemas import SearchRequest
from app.domain import Message, SearchQuery
from app.errors import InvalidRequest
from app.loaders import normalise
from app.planning import plan_query
from app.services import Services


def search_router(services: Services) -> APIRouter:
    """Build the route over the given parts."""
    router = APIRouter(tags=["documents"], route_class=JSONRoute)
    retriever, settings = services.retriever, services.settings

    @router.post("/v1/search", responses={200: {"model": Found}})
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
