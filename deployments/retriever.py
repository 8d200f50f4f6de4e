"""The tier that owns the documents: encoder, store, search, ingestion."""

from collections.abc import Sequence
from contextlib import suppress

from ray import serve

from app.config import check_single_owner
from app.domain import (
    Chunk,
    CollectionInfo,
    DeletionReceipt,
    Document,
    Facet,
    Filters,
    IngestReceipt,
    ReindexStatus,
    RetrieverInfo,
    SearchQuery,
    SearchResult,
    StoredDocument,
)
from app.errors import CollectionMismatch
from app.services import build_retriever, spare_from_collection
from app.settings import IndexSettings, Settings
from app.telemetry import configure_logging
from deployments.replica import max_replicas


@serve.deployment(
    name="Retriever",
    max_ongoing_requests=64,
    max_queued_requests=256,
    autoscaling_config={"min_replicas": 1, "max_replicas": 1, "target_ongoing_requests": 16},
    health_check_period_s=5,
    graceful_shutdown_timeout_s=30,
)
class Retriever:
    """An `app.retrieval.Retriever` as a deployment."""

    async def __init__(self, settings: Settings) -> None:  # type: ignore[misc]  # Serve awaits it.
        configure_logging(settings.logging)
        check_single_owner(settings, owner="Retriever", max_replicas=max_replicas())
        self._retriever = await build_retriever(settings)
        spare_from_collection()

    async def search(self, query: SearchQuery) -> SearchResult:
        """Find passages."""
        return await self._retriever.search(query)

    async def ingest(self, documents: Sequence[Document], *, collection: str | None) -> list[IngestReceipt]:
        """Write documents."""
        return await self._retriever.ingest(documents, collection=collection)

    async def documents(
        self, *, after: str | None, limit: int, filters: Filters, collection: str | None
    ) -> list[StoredDocument]:
        """List documents."""
        return await self._retriever.documents(after=after, limit=limit, filters=filters, collection=collection)

    async def num_documents(self, filters: Filters, *, collection: str | None) -> int:
        """Count documents."""
        return await self._retriever.num_documents(filters, collection=collection)

    async def document(self, document_id: str, *, collection: str | None) -> tuple[StoredDocument, str]:
        """Read one document."""
        return await self._retriever.document(document_id, collection=collection)

    async def chunks(
        self, document_id: str, *, version: int, only: int | None, collection: str | None
    ) -> list[Chunk] | None:
        """Read the chunks of one document."""
        return await self._retriever.chunks(document_id, version=version, only=only, collection=collection)

    async def delete(self, document_id: str, *, collection: str | None) -> DeletionReceipt:
        """Remove one document."""
        return await self._retriever.delete(document_id, collection=collection)

    async def info(self, *, collection: str | None) -> RetrieverInfo:
        """Say what is held."""
        return await self._retriever.info(collection=collection)

    async def facets(self, *, limit: int, collection: str | None) -> list[Facet]:
        """List metadata fields and values."""
        return await self._retriever.facets(limit=limit, collection=collection)

    async def collections(self) -> list[CollectionInfo]:
        """List the collections."""
        return await self._retriever.collections()

    async def drop_collection(self, name: str) -> None:
        """Remove a collection."""
        await self._retriever.drop_collection(name)

    async def reindex(self, settings: IndexSettings, *, collection: str | None) -> ReindexStatus:
        """Start building a new index."""
        return await self._retriever.reindex(settings, collection=collection)

    async def reindex_status(self, *, collection: str | None) -> ReindexStatus:
        """Say how far it is."""
        return await self._retriever.reindex_status(collection=collection)

    async def swap_index(self, *, collection: str | None) -> ReindexStatus:
        """Make the new index the live one."""
        return await self._retriever.swap_index(collection=collection)

    async def rollback_index(self, *, collection: str | None) -> ReindexStatus:
        """Go back to the index before."""
        return await self._retriever.rollback_index(collection=collection)

    async def discard_index(self, *, collection: str | None) -> ReindexStatus:
        """Remove all indexes but the live one."""
        return await self._retriever.discard_index(collection=collection)

    async def check_health(self) -> None:
        """Fail when the store no longer answers; Serve then replaces the replica."""
        # A new replica would meet the same collection.
        with suppress(CollectionMismatch):
            await self._retriever.info()

    async def __del__(self) -> None:
        """Flush and release the store when Serve stops the replica."""
        if hasattr(self, "_retriever"):
            await self._retriever.close()
