"""The vector store: one interface, the embedded engine (`edge.py`) and a Qdrant server (`server.py`)."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from app.domain import Document, EncodedChunk, Filters, Passage, Scalar, StoredDocument

Manifest = Mapping[str, str | int | float | bool | None]
"""What the collection was written with: encoder, chunker, sparse settings. Stamped when it is created."""


class Store(Protocol):
    """One collection of documents and their chunks.

    A document is wholly in its old version or wholly in its new one, also after `kill -9`. Every method may be
    called concurrently and none blocks the event loop.
    """

    async def put(self, document: Document, chunks: Sequence[EncodedChunk]) -> None:
        """Write a document with all its chunks; an older version under the same id is gone afterwards."""
        ...

    async def search(
        self,
        dense: Sequence[float],
        sparse: Mapping[int, float],
        *,
        filters: Filters,
        limit: int,
        num_candidates: int,
        weights: tuple[float, float],
    ) -> list[Passage]:
        """Fuse the dense and the sparse list (`num_candidates` each) by weighted reciprocal rank in the engine.

        Best first, at most `limit`. `weights` are (dense, sparse). Filters apply to both lists; the caller has
        checked their fields against `filter_fields`.
        """
        ...

    async def documents(self, *, after: str | None = None, limit: int = 100) -> list[StoredDocument]:
        """A page of documents in a stable order, starting behind the document id `after`."""
        ...

    async def document(self, document_id: str) -> tuple[StoredDocument, str] | None:
        """One document and its whole text, or None."""
        ...

    async def delete(self, document_id: str) -> bool:
        """Remove a document and all its chunks in one operation; False when there was none."""
        ...

    async def counts(self) -> tuple[int, int]:
        """Numbers of documents and of chunks, exact."""
        ...

    async def filter_fields(self) -> tuple[str, ...]:
        """Metadata fields that a filter may name, sorted."""
        ...

    async def metadata_values(self) -> Mapping[str, list[Scalar]]:
        """The values that chunks hold, by metadata field; of very many the most frequent."""
        ...

    async def close(self) -> None:
        """Flush and release; the store is not used afterwards."""
        ...
