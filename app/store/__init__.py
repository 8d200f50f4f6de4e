"""The vector store: one interface, the embedded engine (`edge.py`) and a Qdrant server (`server.py`)."""

from collections.abc import AsyncIterable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from app.domain import Document, EncodedChunk, Filters, Passage, Scalar, StoredDocument

Manifest = Mapping[str, str | int | float | bool | None]
"""What the collection was written with: encoder, chunker, sparse settings. Stamped when it is created."""


Chunks: TypeAlias = Sequence[EncodedChunk] | AsyncIterable[Sequence[EncodedChunk]]
"""All chunks of a document in order: at hand, or some at a time as they are made."""
Vectors: TypeAlias = tuple[Sequence[float], Mapping[int, float]]
"""The dense and the sparse vector of a chunk."""


@dataclass(frozen=True, slots=True)
class Located:
    """A document as it stands: which write it comes from, and the vectors of some of its chunks, evenly spread."""

    stored: StoredDocument
    write: str
    vectors: Sequence[Vectors]


class Store(Protocol):
    """One collection of documents and their chunks.

    A document is wholly in its old version or wholly in its new one, also after `kill -9`, and also while others
    write or delete it: these happen one after the other. Every method may be called concurrently and none blocks the
    event loop.
    """

    async def put(self, document: Document, chunks: Chunks) -> None:
        """Write a document with all its chunks; an older version under the same id is gone afterwards.

        No search finds any of them before the last one is there. Raises `WriteConflict` when others write the same
        document faster than this call can.
        """
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
        """Fuse the dense and the sparse list (`num_candidates` each) by their scores.

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

    async def locate(self, document_id: str) -> Located | None:
        """Say what a deletion has to remove, or None."""
        ...

    async def remove(self, document_id: str, writes: Collection[str]) -> None:
        """Remove the record and the chunks of these writes of a document, in one operation."""
        ...

    async def find_leftovers(self, document_id: str, vectors: Sequence[Vectors]) -> Mapping[str, set[str]]:
        """Look for chunks of a document that should be gone; give the writes they come from, per kind of query.

        The kinds are those of `DeletionReceipt.checks`. Chunks of a version that stands now are none.
        """
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
