"""The tier that owns the documents: encoder, store, search, ingestion."""

from collections.abc import Sequence

from ray import serve

from app.config import check_single_owner
from app.domain import (
    DeletionReceipt,
    Document,
    IngestReceipt,
    RetrieverInfo,
    SearchQuery,
    SearchResult,
    StoredDocument,
)
from app.services import build_retriever
from app.settings import Settings
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

    async def search(self, query: SearchQuery) -> SearchResult:
        """Find passages."""
        return await self._retriever.search(query)

    async def ingest(self, documents: Sequence[Document]) -> list[IngestReceipt]:
        """Write documents."""
        return await self._retriever.ingest(documents)

    async def documents(self, *, after: str | None, limit: int) -> list[StoredDocument]:
        """List documents."""
        return await self._retriever.documents(after=after, limit=limit)

    async def document(self, document_id: str) -> tuple[StoredDocument, str]:
        """Read one document."""
        return await self._retriever.document(document_id)

    async def delete(self, document_id: str) -> DeletionReceipt:
        """Remove one document."""
        return await self._retriever.delete(document_id)

    async def info(self) -> RetrieverInfo:
        """Say what is held."""
        return await self._retriever.info()

    async def check_health(self) -> None:
        """Fail when the store no longer answers; Serve then replaces the replica."""
        await self._retriever.info()

    async def __del__(self) -> None:
        """Flush and release the store when Serve stops the replica."""
        if hasattr(self, "_retriever"):
            await self._retriever.close()
