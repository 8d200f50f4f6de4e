"""The retriever and the model as routes see them: each use is checked against what the sender of the request may do.

Routes have no other way to documents or model. So a collection that a key may not read can reach none of its answers,
whatever a route does or forgets.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import replace

from app.access import caller
from app.collection import to_the_end
from app.domain import (
    Chunk,
    CollectionInfo,
    DeletionReceipt,
    Delta,
    Document,
    Facet,
    Filters,
    GenerationRequest,
    IngestReceipt,
    ModelInfo,
    ReindexStatus,
    RetrieverInfo,
    SearchQuery,
    SearchResult,
    StoredDocument,
)
from app.errors import CollectionNotFound
from app.ingestion_jobs import Ingestion, Ingestions, Result, no_ingestion
from app.llm import LLM
from app.rates import Rates, estimate_tokens
from app.retrieval import Retriever
from app.services import Services
from app.settings import IndexSettings
from app.store import NO_FILTERS
from app.uploads import UploadWriter


def guarded(services: Services, rates: Rates) -> Services:
    """Put guards before all that could give somebody what is not theirs."""
    return services.over(
        GuardedRetriever(services.retriever),
        GuardedLLM(services.llm, rates),
        GuardedIngestions(services.ingestions),
    )


class GuardedRetriever:
    """A `Retriever` that gives and takes only what the caller may read and write."""

    def __init__(self, retriever: Retriever) -> None:
        self._retriever = retriever

    async def search(self, query: SearchQuery) -> SearchResult:
        """See `Retriever.search`."""
        with _own_words(collection := caller.get().readable(query.collection)):
            return await self._retriever.search(replace(query, collection=collection))

    async def ingest(self, documents: Sequence[Document], *, collection: str | None = None) -> list[IngestReceipt]:
        """See `Retriever.ingest`."""
        with _own_words(collection := caller.get().writable(collection)):
            return await self._retriever.ingest(documents, collection=collection)

    async def documents(
        self,
        *,
        after: str | None = None,
        limit: int = 100,
        filters: Filters = NO_FILTERS,
        collection: str | None = None,
    ) -> list[StoredDocument]:
        """See `Retriever.documents`."""
        with _own_words(collection := caller.get().readable(collection)):
            return await self._retriever.documents(after=after, limit=limit, filters=filters, collection=collection)

    async def num_documents(self, filters: Filters, *, collection: str | None = None) -> int:
        """See `Retriever.num_documents`."""
        with _own_words(collection := caller.get().readable(collection)):
            return await self._retriever.num_documents(filters, collection=collection)

    async def document(self, document_id: str, *, collection: str | None = None) -> tuple[StoredDocument, str]:
        """See `Retriever.document`."""
        with _own_words(collection := caller.get().readable(collection)):
            return await self._retriever.document(document_id, collection=collection)

    async def chunks(
        self, document_id: str, *, version: int, only: int | None = None, collection: str | None = None
    ) -> list[Chunk] | None:
        """See `Retriever.chunks`."""
        with _own_words(collection := caller.get().readable(collection)):
            return await self._retriever.chunks(document_id, version=version, only=only, collection=collection)

    async def delete(self, document_id: str, *, collection: str | None = None) -> DeletionReceipt:
        """See `Retriever.delete`."""
        with _own_words(collection := caller.get().writable(collection)):
            return await self._retriever.delete(document_id, collection=collection)

    async def info(self, *, collection: str | None = None) -> RetrieverInfo:
        """See `Retriever.info`."""
        with _own_words(collection := caller.get().readable(collection)):
            return await self._retriever.info(collection=collection)

    async def facets(self, *, limit: int, collection: str | None = None) -> list[Facet]:
        """See `Retriever.facets`."""
        with _own_words(collection := caller.get().readable(collection)):
            return await self._retriever.facets(limit=limit, collection=collection)

    async def collections(self) -> list[CollectionInfo]:
        """See `Retriever.collections`. Those of others are not even named."""
        who = caller.get()
        found = await self._retriever.collections()
        return [replace(one, is_default=who.is_default(one.name)) for one in found if who.may_see(one.name)]

    async def drop_collection(self, name: str) -> None:
        """See `Retriever.drop_collection`."""
        with _own_words(caller.get().writable(name)):
            await self._retriever.drop_collection(name)

    async def reindex(self, settings: IndexSettings, *, collection: str | None = None) -> ReindexStatus:
        """See `Retriever.reindex`."""
        collection = caller.get().reindexable(collection)
        return await self._retriever.reindex(settings, collection=collection)

    async def reindex_status(self, *, collection: str | None = None) -> ReindexStatus:
        """See `Retriever.reindex_status`."""
        collection = caller.get().reindexable(collection)
        return await self._retriever.reindex_status(collection=collection)

    async def swap_index(self, *, collection: str | None = None) -> ReindexStatus:
        """See `Retriever.swap_index`."""
        collection = caller.get().reindexable(collection)
        return await self._retriever.swap_index(collection=collection)

    async def rollback_index(self, *, collection: str | None = None) -> ReindexStatus:
        """See `Retriever.rollback_index`."""
        collection = caller.get().reindexable(collection)
        return await self._retriever.rollback_index(collection=collection)

    async def discard_index(self, *, collection: str | None = None) -> ReindexStatus:
        """See `Retriever.discard_index`."""
        collection = caller.get().reindexable(collection)
        return await self._retriever.discard_index(collection=collection)

    async def close(self) -> None:
        """Nothing is held here: who built the retriever closes it."""


class GuardedIngestions:
    """`Ingestions` of which a caller sees those into collections that it may read or write."""

    def __init__(self, ingestions: Ingestions) -> None:
        self._ingestions = ingestions

    def new_upload(self) -> UploadWriter:
        """See `Ingestions.new_upload`."""
        return self._ingestions.new_upload()

    async def check_room(self) -> None:
        """See `Ingestions.check_room`."""
        await self._ingestions.check_room()

    async def submit(self, upload: UploadWriter, *, collection: str | None) -> Ingestion:
        """See `Ingestions.submit`. What is written later, without the caller, is checked here."""
        return await self._ingestions.submit(upload, collection=caller.get().writable(collection))

    async def read(self, ingestion_id: str) -> Ingestion:
        """See `Ingestions.read`. One of others is not there."""
        found = await self._ingestions.read(ingestion_id)
        if not _is_seen(found):
            raise no_ingestion(ingestion_id)
        return found

    async def results(self, ingestion_id: str, *, after: int, limit: int) -> list[Result]:
        """See `Ingestions.results`."""
        await self.read(ingestion_id)
        return await self._ingestions.results(ingestion_id, after=after, limit=limit)

    async def recent(self, *, after: str | None, limit: int, collection: str | None = None) -> list[Ingestion]:
        """See `Ingestions.recent`."""
        caller.get().allow()  # Also where there is none.
        found: list[Ingestion] = []
        while len(found) < limit:
            page = await self._ingestions.recent(after=after, limit=limit, collection=collection)
            found += filter(_is_seen, page)
            if len(page) < limit:
                break
            after = page[-1].id
        return found[:limit]

    async def cancel(self, ingestion_id: str) -> Ingestion:
        """See `Ingestions.cancel`."""
        caller.get().writable((await self.read(ingestion_id)).collection)
        return await self._ingestions.cancel(ingestion_id)

    async def close(self) -> None:
        """Nothing is held here: who built the ingestions closes them."""


class GuardedLLM:
    """An `LLM` that counts what the caller's key uses, and refuses what is over its budget."""

    def __init__(self, llm: LLM, rates: Rates) -> None:
        self._llm = llm
        self._rates = rates

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """See `LLM.generate`. Raises `Forbidden` and `RateLimited` too, before the first delta."""
        who = caller.get()
        who.check_may_ask()
        estimate = estimate_tokens(_num_bytes(request))
        if who.key is not None:
            await self._rates.reserve(who.key, estimate)
        prompt_tokens = completion_tokens = 0
        has_begun = False
        try:
            async with aclosing(self._llm.generate(request)) as deltas:
                async for delta in deltas:
                    has_begun = True
                    prompt_tokens = delta.prompt_tokens or prompt_tokens
                    completion_tokens = delta.completion_tokens
                    yield delta
        except asyncio.CancelledError:
            # Whoever leaves before the first delta has had the prompt read, as far as anybody knows.
            prompt_tokens = prompt_tokens if has_begun else estimate
            raise
        finally:
            who.prompt_tokens += prompt_tokens
            who.completion_tokens += completion_tokens
            if who.key is not None:
                num_used = prompt_tokens + completion_tokens
                await to_the_end(self._rates.settle(who.key, num_reserved=estimate, num_used=num_used))

    async def info(self) -> ModelInfo:
        """See `LLM.info`; every key may ask."""
        caller.get().allow()
        return await self._llm.info()

    async def close(self) -> None:
        """Nothing is held here: who built the model closes it."""


@contextmanager
def _own_words(collection: str | None) -> Iterator[None]:
    """Say that a collection is not there without naming others."""
    try:
        yield
    except CollectionNotFound as error:
        if caller.get().key is None:
            raise
        raise CollectionNotFound(
            f"There is no collection {collection!r}. Adding documents to it creates it.", param=error.param
        ) from None


def _is_seen(ingestion: Ingestion) -> bool:
    who = caller.get()
    return who.may_see(ingestion.collection) if ingestion.collection else who.key is None


def _num_bytes(request: GenerationRequest) -> int:
    texts = [request.instructions, *(one.content for one in request.messages), *(one.text for one in request.passages)]
    return sum(len(text.encode()) for text in texts)
