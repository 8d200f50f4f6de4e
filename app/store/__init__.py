"""The vector store: one interface, the embedded engine (`edge.py`) and a Qdrant server (`server.py`).

A `Store` is one collection, a `Database` all collections of one place.
"""

from collections.abc import AsyncIterable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias

from app.domain import Chunk, Document, EncodedChunk, Filters, Passage, Scalar, StoredDocument

NO_FILTERS: Filters = {}

Manifest = Mapping[str, str | int | float | bool | None]
"""What a collection was written with: text format, chunker, encoder, sparse settings, prompts."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """What a collection says of itself."""

    manifest: Manifest
    stands_in_for: Manifest | None = None
    """What the service was set to when this collection took another one's place: with that it is served too."""


@dataclass(frozen=True, slots=True)
class Aliases:
    """Which stored collections stand behind one name: that in use, the next one while it is built, the one before."""

    live: str
    candidate: str | None = None
    previous: str | None = None

    def stored(self) -> set[str]:
        """List all of them."""
        return {name for name in (self.live, self.candidate, self.previous) if name is not None}


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

    async def documents(
        self, *, after: str | None = None, limit: int = 100, filters: Filters = NO_FILTERS
    ) -> list[StoredDocument]:
        """A page of the documents that match, in a stable order, starting behind the document id `after`."""
        ...

    async def num_documents(self, filters: Filters) -> int:
        """The number of documents that match, exact."""
        ...

    async def document(self, document_id: str) -> tuple[StoredDocument, str] | None:
        """One document and its whole text, or None."""
        ...

    async def chunks(self, document_id: str, *, version: int, only: int | None = None) -> list[Chunk] | None:
        """All chunks of this version of a document in order, or `only` one by its index.

        None when the document is gone or stands in another version by now.
        """
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

    async def value_counts(self) -> Mapping[str, list[tuple[Scalar, int]]]:
        """The metadata values by field, each with the number of documents that have it, the most frequent first."""
        ...

    async def stamp(self) -> Stamp:
        """What the collection was written with."""
        ...

    async def set_stamp(self, stamp: Stamp) -> None:
        """Say anew what the collection was written with."""
        ...

    async def close(self) -> None:
        """Flush and release; the store is not used afterwards."""
        ...


class Database(Protocol):
    """The collections of one place.

    Clients name a collection `notes`. It is stored under that name, or, when it has been reindexed, under one such as
    `notes.20260131T120000`; `aliases` says which.
    """

    is_shared: bool
    """Other processes may use the same place."""

    async def names(self) -> list[str]:
        """The names that clients use, sorted."""
        ...

    async def aliases(self, name: str) -> Aliases | None:
        """What stands behind a name; None when there is no such collection."""
        ...

    async def set_aliases(self, name: str, aliases: Aliases) -> None:
        """Put other collections behind a name, in one atomic step."""
        ...

    async def open(self, stored: str, *, dimension: int, manifest: Manifest) -> Store:
        """Open the collection stored under a name, or create it. Raises `ConfigurationError`."""
        ...

    async def drop(self, name: str, *, keep: Aliases | None = None) -> None:
        """Remove what is stored for a name, but for what `keep` lists. None of it is open."""
        ...

    async def close(self) -> None:
        """Release what is held; the stores are closed apart."""
        ...
