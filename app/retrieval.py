"""Retrieval: a question to passages in one index; and the interface of the part that owns the documents."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from app.chunking import sentences
from app.deletion import delete
from app.domain import (
    Chunk,
    CollectionInfo,
    DeletionReceipt,
    Document,
    Facet,
    Filters,
    IngestReceipt,
    Passage,
    Ranking,
    ReindexStatus,
    RetrieverInfo,
    SearchQuery,
    SearchResult,
    Sentence,
    StoredDocument,
)
from app.embedding import Embedder, Vectors
from app.errors import DocumentNotFound, InvalidRequest, UnknownFilter
from app.ingestion import Ingestor
from app.query_encoding import encode_query
from app.reranking import Reranker
from app.selection import POOL_FACTOR, choose, without_duplicates
from app.self_query import MetadataIndex
from app.settings import IndexSettings, RetrievalSettings
from app.store import NO_FILTERS, Store
from app.telemetry import Stopwatch

MAX_CACHED_PASSAGES = 4096
"""Sentence vectors kept: about 10 kB a passage; the oldest go first."""
RERANKING_SHARE = 0.5
"""Of the search's time: what reranking may take, so that the sentences can still be scored."""

MAX_FILTER_VALUES = 1_000
"""In one request: an engine holds Python's global lock while it compares, a hundred thousand for seconds."""
MAX_FACETS = 100
"""Fields that are offered as filters: those that most documents have. A page with more helps nobody."""
MAX_METADATA_AGE_S = 30.0
"""What this process writes is known at once."""


class Searcher(Protocol):
    """What answering needs of a retriever."""

    async def search(self, query: SearchQuery) -> SearchResult:
        """See `Retriever.search`."""
        ...


class Retriever(Protocol):
    """The part that owns the documents, in one or several collections: finds passages, takes them in, gives them back.

    `collection` names one; None is the configured one. Every method raises `RetrieverUnavailable` when the part is
    down, `CollectionNotFound`, and `CollectionMismatch` when the collection was written with other settings.
    """

    async def search(self, query: SearchQuery) -> SearchResult:
        """Find the passages for a question, best first. Raises `UnknownFilter` for a field that no document has."""
        ...

    async def ingest(self, documents: Sequence[Document], *, collection: str | None = None) -> list[IngestReceipt]:
        """Write documents; one receipt each, in order. A failing document does not stop the others.

        A collection that is not there is created.
        """
        ...

    async def documents(
        self,
        *,
        after: str | None = None,
        limit: int = 100,
        filters: Filters = NO_FILTERS,
        collection: str | None = None,
    ) -> list[StoredDocument]:
        """List a page of the documents that match, in a stable order, starting behind the id `after`.

        Raises `UnknownFilter` for a field that no document has.
        """
        ...

    async def num_documents(self, filters: Filters, *, collection: str | None = None) -> int:
        """Count the documents that match. Raises `UnknownFilter`."""
        ...

    async def document(self, document_id: str, *, collection: str | None = None) -> tuple[StoredDocument, str]:
        """Read one document with its text. Raises `DocumentNotFound`."""
        ...

    async def chunks(
        self, document_id: str, *, version: int, only: int | None = None, collection: str | None = None
    ) -> list[Chunk] | None:
        """Read the chunks of this version of a document, or `only` one by its index; None when it has gone by."""
        ...

    async def delete(self, document_id: str, *, collection: str | None = None) -> DeletionReceipt:
        """Remove a document and all its chunks, proved by queries. Raises `DocumentNotFound` or `DeletionFailed`."""
        ...

    async def info(self, *, collection: str | None = None) -> RetrieverInfo:
        """Say what is held."""
        ...

    async def facets(self, *, limit: int, collection: str | None = None) -> list[Facet]:
        """List the metadata fields that most documents have, by name, each with up to `limit` of its values."""
        ...

    async def collections(self) -> list[CollectionInfo]:
        """List the collections, by name."""
        ...

    async def drop_collection(self, name: str) -> None:
        """Remove a collection with all its documents. Raises `InvalidRequest` for the configured one."""
        ...

    async def reindex(self, settings: IndexSettings, *, collection: str | None = None) -> ReindexStatus:
        """Start building an index by these settings beside the live one, or go on with it; returns at once.

        Raises `ConfigurationError` for settings that cannot be used, `InvalidRequest` while another one is built.
        """
        ...

    async def reindex_status(self, *, collection: str | None = None) -> ReindexStatus:
        """Say how far it is."""
        ...

    async def swap_index(self, *, collection: str | None = None) -> ReindexStatus:
        """Make the new index the live one, between two requests. Raises `InvalidRequest` when it is not built."""
        ...

    async def rollback_index(self, *, collection: str | None = None) -> ReindexStatus:
        """Go back to the index before, with what was written since. Raises `InvalidRequest` when there is none."""
        ...

    async def discard_index(self, *, collection: str | None = None) -> ReindexStatus:
        """Remove all indexes but the live one."""
        ...

    async def close(self) -> None:
        """Release the store."""
        ...


class Index:
    """One collection with the encoder that wrote it: what a search goes through from the question to the passages."""

    def __init__(
        self,
        embedder: Embedder,
        store: Store,
        ingestor: Ingestor,
        settings: RetrievalSettings,
        collection: str,
        reranker: Reranker | None = None,
    ) -> None:
        self._embedder = embedder
        self._store = store
        self._ingestor = ingestor
        self._settings = settings
        self._collection = collection
        self._reranker = reranker
        self._metadata = _HeldMetadata(store)
        self._sentence_vectors: dict[str, tuple[list[str], Vectors]] = {}

    async def search(self, query: SearchQuery) -> SearchResult:
        """Embed the question, search and fuse both lists, rerank, choose passages, score the best ones' sentences."""
        watch = Stopwatch()
        await self._check_filters(query.filters)
        recognised, text = await self._recognise(query)
        filters = {**query.filters, **recognised}
        with watch.stage("embed"):
            vectors = await self._embedder.embed_queries([text, *query.context])
        question, terms = encode_query(text, query.context, vectors)
        num_pooled = POOL_FACTOR * query.top_k
        if self._reranker is not None:
            num_pooled = max(num_pooled, self._reranker.num_candidates)
        with watch.stage("search"):
            pool = await self._store.search(
                question.tolist(),
                terms,
                filters=filters,
                limit=num_pooled,
                num_candidates=max(self._settings.num_candidates, query.top_k),
                weights=self._weights(query.ranking),
            )
            pool = await asyncio.to_thread(without_duplicates, pool)
        ranked, degraded = await self._reranked(text, query.timeout_s, pool, watch)
        passages = choose(ranked, query.top_k)
        with watch.stage("score_sentences"):
            scored = await self._with_sentences(passages[: query.num_scored], question)
        notice = None
        if filters and not passages:
            notice = await asyncio.to_thread((await self._metadata.read()).explain, filters, recognised)
        found = (*scored, *passages[query.num_scored :])
        return SearchResult(found, watch.timings_ms, degraded, recognised, notice)

    async def ingest(self, documents: Sequence[Document]) -> list[IngestReceipt]:
        """Write documents; one receipt each, in order."""
        try:
            return await self._ingestor.ingest(documents)
        finally:
            self._metadata.expire()

    async def documents(
        self, *, after: str | None = None, limit: int = 100, filters: Filters = NO_FILTERS
    ) -> list[StoredDocument]:
        """List a page of documents. Raises `UnknownFilter`."""
        await self._check_filters(filters)
        return await self._store.documents(after=after, limit=limit, filters=filters)

    async def num_documents(self, filters: Filters) -> int:
        """Count the documents that match. Raises `UnknownFilter`."""
        await self._check_filters(filters)
        return await self._store.num_documents(filters)

    async def document(self, document_id: str) -> tuple[StoredDocument, str]:
        """Read one document with its text. Raises `DocumentNotFound`."""
        found = await self._store.document(document_id)
        if found is None:
            raise _not_found(document_id)
        return found

    async def chunks(self, document_id: str, *, version: int, only: int | None = None) -> list[Chunk] | None:
        """Read the chunks of this version of a document, or `only` one; None when it has gone by."""
        return await self._store.chunks(document_id, version=version, only=only)

    async def delete(self, document_id: str) -> DeletionReceipt:
        """Remove a document and all its chunks, proved by queries. Raises `DocumentNotFound` or `DeletionFailed`."""
        receipt = await delete(self._store, document_id)
        if receipt is None:
            raise _not_found(document_id)
        self._metadata.expire()
        return receipt

    async def info(self) -> RetrieverInfo:
        """Say what is held."""
        num_documents, num_chunks = await self._store.counts()
        return RetrieverInfo(
            collection=self._collection,
            num_documents=num_documents,
            num_chunks=num_chunks,
            filter_fields=await self._store.filter_fields(),
            embedding_model=self._embedder.model_name,
        )

    async def facets(self, *, limit: int) -> list[Facet]:
        """List the metadata fields with up to `limit` values each."""
        counts = await self._store.value_counts()
        num_documents = {field: sum(number for _, number in found) for field, found in counts.items()}
        common = sorted(counts, key=lambda field: (-num_documents[field], field))[:MAX_FACETS]
        return [Facet(field, tuple(counts[field][:limit]), len(counts[field])) for field in sorted(common)]

    async def close(self) -> None:
        """Release the store."""
        await self._store.close()

    def _weights(self, ranking: Ranking) -> tuple[float, float]:
        """Weigh the dense and the BM25 list."""
        only = {"dense": (1.0, 0.0), "bm25": (0.0, 1.0)}
        return only.get(ranking, (self._settings.dense_weight, self._settings.sparse_weight))

    async def _check_filters(self, filters: Filters) -> None:
        if not filters:
            return
        num_values = sum(len(wanted) if isinstance(wanted, list) else 1 for wanted in filters.values())
        if num_values > MAX_FILTER_VALUES:
            raise InvalidRequest(f"Filters may name {MAX_FILTER_VALUES} values, not {num_values}.", param="filters")
        known = await self._store.filter_fields()
        unknown = sorted(set(filters) - set(known))
        if unknown:
            raise UnknownFilter(
                f"No document has the field {unknown[0]!r}. Fields that can be filtered: {', '.join(known) or 'none'}.",
                param=f"filters.{unknown[0]}",
            )

    async def _reranked(
        self, question: str, timeout_s: float, passages: list[Passage], watch: Stopwatch
    ) -> tuple[list[Passage], tuple[str, ...]]:
        """Order by the cross-encoder if there is one, and name what the search had to do without."""
        if self._reranker is None:
            return passages, ()
        with watch.stage("rerank"):
            return await self._reranker.rerank(question, passages, timeout_s=RERANKING_SHARE * timeout_s)

    async def _recognise(self, query: SearchQuery) -> tuple[Filters, str]:
        """Read filters from the question; give them and what is left to search for."""
        if not query.recognise_filters:
            return {}, query.text
        found = (await self._metadata.read()).recognise(query.text, query.filters, *query.context[:1])
        return found.filters, found.rest

    async def _with_sentences(self, passages: Sequence[Passage], question: Vectors) -> list[Passage]:
        scored = []
        for passage in passages:
            texts, vectors = await self._sentences(passage)
            scored.append(replace(passage, sentences=tuple(map(Sentence, texts, (vectors @ question).tolist()))))
        return scored

    async def _sentences(self, passage: Passage) -> tuple[list[str], Vectors]:
        """Split a passage and encode its sentences, in a batch of their own.

        In bfloat16 a vector depends a little on its batch: so a passage scores the same whatever it is found with.
        """
        key = _cache_key(passage)
        found = self._sentence_vectors.get(key)
        if found is None:
            texts = await asyncio.to_thread(sentences, passage.text)
            found = self._sentence_vectors[key] = (texts, await self._embedder.embed_documents(texts))
            while len(self._sentence_vectors) > MAX_CACHED_PASSAGES:
                del self._sentence_vectors[next(iter(self._sentence_vectors))]
        return found


class _HeldMetadata:
    """The values that a question may name, read from a store when they are expired."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._index = MetadataIndex({})
        self._expires = 0.0
        self._reading = asyncio.Lock()

    def expire(self) -> None:
        """Have the next call read again, after a write of this process."""
        self._expires = 0.0

    async def read(self) -> MetadataIndex:
        """Give the values, at most `MAX_METADATA_AGE_S` old: other processes may write too."""
        async with self._reading:
            now = asyncio.get_running_loop().time()
            if now >= self._expires:
                # Set before: what is written while this reads expires it again.
                self._expires = now + MAX_METADATA_AGE_S
                try:
                    self._index = await asyncio.to_thread(MetadataIndex, await self._store.metadata_values())
                except BaseException:
                    self.expire()
                    raise
            return self._index


def _cache_key(passage: Passage) -> str:
    # An updated document has the same chunk ids with other texts.
    return f"{passage.chunk_id}\0{hash(passage.text)}"


def _not_found(document_id: str) -> DocumentNotFound:
    return DocumentNotFound(f"There is no document {document_id!r}. GET /v1/documents lists what is there.", param="id")
