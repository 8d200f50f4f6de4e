"""Routes: OpenAI's vector stores, which are the collections, read and searched."""

import asyncio
from collections.abc import Sequence
from typing import Any, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from app.api.bodies import Pages, VectorStore, VectorStoreResults
from app.api.filters import AttributeFilter, to_filters
from app.api.json_bodies import JSONRoute
from app.api.schemas import CollectionName, Text
from app.domain import Passage, SearchQuery, SearchResult
from app.errors import InvalidRequest, UnsupportedParameter
from app.loaders import normalise
from app.services import Services

MAX_QUERIES = 8
DEFAULT_RESULTS = 10
"""OpenAI's own default."""


class RankingOptions(BaseModel):
    """How results are ranked."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    ranker: Literal["auto", "default-2024-11-15", "none"] = "auto"
    score_threshold: float = Field(0.0, ge=0, le=1)

    def check_supported(self, param: str) -> None:
        """Refuse by name what would be ignored. Raises `UnsupportedParameter`."""
        if self.ranker == "none":
            message = "Whether results are reranked is a setting of the service, reranking.model: leave ranker out."
            raise UnsupportedParameter(message, param=f"{param}.ranker")
        if self.score_threshold > 0:
            message = "Scores order the results of one search and mean nothing beyond it: leave score_threshold out."
            raise UnsupportedParameter(message, param=f"{param}.score_threshold")


class VectorStoreSearchRequest(BaseModel):
    """OpenAI's search of a vector store."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    query: Text | list[Text] = Field(examples=["How long did the outage last?"])
    filters: AttributeFilter | None = None
    max_num_results: int = Field(DEFAULT_RESULTS, ge=1, le=50)
    ranking_options: RankingOptions = RankingOptions()
    rewrite_query: bool = Field(False, description="make filters of authors and other values that the query names")


def vector_stores_router(services: Services) -> APIRouter:
    """Build the routes over the given parts."""
    router = APIRouter(tags=["vector stores"], route_class=JSONRoute)
    retriever = services.retriever

    @router.get("/v1/vector_stores", responses={200: {"model": Pages[VectorStore]}})
    async def list_vector_stores() -> dict[str, Any]:
        """List the collections as vector stores; an id is the collection's name."""
        found = [_vector_store(one.name, one.num_documents) for one in await retriever.collections()]
        ends = {"first_id": found[0]["id"], "last_id": found[-1]["id"]} if found else {}
        return {"object": "list", "data": found, **ends, "has_more": False}

    @router.get("/v1/vector_stores/{vector_store_id}", responses={200: {"model": VectorStore}})
    async def read_vector_store(vector_store_id: CollectionName) -> dict[str, Any]:
        """Describe a collection as a vector store."""
        info = await retriever.info(collection=vector_store_id)
        return _vector_store(vector_store_id, info.num_documents)

    @router.post("/v1/vector_stores/{vector_store_id}/search", responses={200: {"model": VectorStoreResults}})
    async def search_vector_store(vector_store_id: CollectionName, body: VectorStoreSearchRequest) -> dict[str, Any]:
        """Find passages; with several queries what any of them finds, each by its best score."""
        body.ranking_options.check_supported("ranking_options")
        queries = _queries(body.query)
        filters = to_filters(body.filters, param="filters") if body.filters else {}
        searches = [
            SearchQuery(
                query,
                body.max_num_results,
                filters,
                recognise_filters=body.rewrite_query,
                collection=vector_store_id,
            )
            for query in queries
        ]
        found = await asyncio.gather(*map(retriever.search, searches))
        return {
            "object": "vector_store.search_results.page",
            "search_query": queries,
            "data": [_result(one) for one in _merged(found, body.max_num_results)],
            "has_more": False,
            "next_page": None,
        }

    return router


def _queries(query: str | list[str]) -> list[str]:
    queries = [normalise(one).strip() for one in ([query] if isinstance(query, str) else query)]
    if not queries or not all(queries):
        raise InvalidRequest("The query is empty.", param="query")
    if len(queries) > MAX_QUERIES:
        raise InvalidRequest(f"At most {MAX_QUERIES} queries are taken at once.", param="query")
    return queries


def _merged(found: Sequence[SearchResult], limit: int) -> list[Passage]:
    best: dict[str, Passage] = {}
    for passage in (one for result in found for one in result.passages):
        if passage.chunk_id not in best or passage.score > best[passage.chunk_id].score:
            best[passage.chunk_id] = passage
    if len(found) == 1:
        return list(best.values())
    return sorted(best.values(), key=lambda passage: -passage.score)[:limit]


def _vector_store(name: str, num_documents: int) -> dict[str, Any]:
    counts = {"in_progress": 0, "completed": num_documents, "failed": 0, "cancelled": 0, "total": num_documents}
    # OpenAI's clients want the two numbers, which a collection does not know of itself.
    unknown = {"created_at": 0, "usage_bytes": 0}
    return {
        "id": name,
        "object": "vector_store",
        "name": name,
        "status": "completed",
        "file_counts": counts,
        "metadata": {},
        **unknown,
    }


def _result(passage: Passage) -> dict[str, Any]:
    return {**file_result(passage), "content": [{"type": "text", "text": passage.text}]}


def file_result(passage: Passage) -> dict[str, Any]:
    """Show a passage as OpenAI shows what was found in a file, without the text."""
    return {
        "file_id": passage.document_id,
        "filename": passage.document_id,
        "score": round(passage.score, 6),
        "attributes": dict(passage.metadata),
    }
