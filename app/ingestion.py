"""Documents into the store: chunk, encode, write. The same encoder and chunker settings serve queries later."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from app import prompts, sparse
from app.chunking import CHUNKER_VERSION, split
from app.domain import Chunk, Document, EncodedChunk, IngestReceipt
from app.embedding import Embedder
from app.errors import CleaveError, ConfigurationError
from app.loaders import CLEANER_VERSION
from app.settings import Branch, ChunkingSettings, EmbeddingSettings
from app.store import Chunks, Manifest, Store
from app.telemetry import logger

B = TypeVar("B", bound=Branch)

MAX_PREFIX_TOKENS = 64
"""Room for title and heading before a chunk's text in what the encoder reads."""
TEXT_FORMAT = "title, heading, text; 1"
"""Names how a chunk becomes encoder input; change the number with the code, and old collections are refused."""
DISTANCE = "cosine"


MAX_CHUNKS_AT_ONCE = 512
"""Encoded and held with their vectors at one time: 16 batches of the encoder, and some 10 MB."""


@dataclass(slots=True)
class _Draft:
    """A document cut into chunks; `num_truncated` counts those encoded so far that the encoder would cut."""

    document: Document
    chunks: Sequence[Chunk]
    is_update: bool
    num_truncated: int = 0


class Ingestor:
    """Writes documents through one encoder into one store.

    Short documents are encoded together, `MAX_CHUNKS_AT_ONCE` at a time, and share the encoder's batches; a longer one
    is encoded and written piece by piece. So the memory does not grow with the number of chunks.
    """

    def __init__(self, embedder: Embedder, store: Store, settings: ChunkingSettings) -> None:
        check_window(embedder, settings)
        self._embedder = embedder
        self._store = store
        self._max_tokens = settings.max_tokens

    async def ingest(self, documents: Sequence[Document]) -> list[IngestReceipt]:
        """Write each document; one that fails is reported and the rest goes on. Receipts are in the order given."""
        return [receipt for run in _without_repetition(documents) for receipt in await self._ingest(run)]

    async def _ingest(self, documents: Sequence[Document]) -> list[IngestReceipt]:
        receipts: list[IngestReceipt] = []
        outcomes: list[_Draft | IngestReceipt] = []
        num_chunks = 0
        for document in documents:
            outcome = await self._reported(document, self._draft(document))
            needed = len(outcome.chunks) if isinstance(outcome, _Draft) else 0
            if num_chunks + needed > MAX_CHUNKS_AT_ONCE:
                receipts += await self._write(outcomes)
                outcomes, num_chunks = [], 0
            outcomes.append(outcome)
            num_chunks += needed
        return receipts + await self._write(outcomes)

    async def _draft(self, document: Document) -> _Draft | IngestReceipt:
        """Cut a document that is new or changed into chunks."""
        existing = await self._store.document(document.id)
        if existing is not None and existing[0].content_hash == document.content_hash:
            return IngestReceipt(document.id, "unchanged", num_chunks=existing[0].num_chunks)
        chunks = await asyncio.to_thread(split, document.text, self._embedder, max_tokens=self._max_tokens)
        return _Draft(document, chunks, is_update=existing is not None)

    async def _write(self, outcomes: Sequence[_Draft | IngestReceipt]) -> list[IngestReceipt]:
        """Encode and write drafts: several short ones, or one long one."""
        parts = [(one, chunk) for one in outcomes if isinstance(one, _Draft) for chunk in one.chunks]
        is_long = len(parts) > MAX_CHUNKS_AT_ONCE
        together = iter([] if is_long else await self._encode(parts))
        receipts = []
        for outcome in outcomes:
            if isinstance(outcome, _Draft):
                own = self._encoded_in_turns(parts) if is_long else [*itertools.islice(together, len(outcome.chunks))]
                outcome = await self._reported(outcome.document, self._put(outcome, own))
            assert isinstance(outcome, IngestReceipt)
            receipts.append(outcome)
        return receipts

    async def _encoded_in_turns(self, parts: Sequence[tuple[_Draft, Chunk]]) -> AsyncIterator[list[EncodedChunk]]:
        for start in range(0, len(parts), MAX_CHUNKS_AT_ONCE):
            yield await self._encode(parts[start : start + MAX_CHUNKS_AT_ONCE])

    async def _encode(self, parts: Sequence[tuple[_Draft, Chunk]]) -> list[EncodedChunk]:
        texts, terms = await asyncio.to_thread(self._read, parts)
        vectors = await self._embedder.embed_documents(texts)
        return [
            EncodedChunk(chunk, tuple(vector.tolist()), weights)
            for (_, chunk), vector, weights in zip(parts, vectors, terms, strict=True)
        ]

    def _read(self, parts: Sequence[tuple[_Draft, Chunk]]) -> tuple[list[str], list[Mapping[int, float]]]:
        """Give what the encoder reads of each chunk, and its BM25 terms."""
        texts = [self._encoder_text(draft.document, chunk) for draft, chunk in parts]
        for (draft, _), text in zip(parts, texts, strict=True):
            draft.num_truncated += self._embedder.num_tokens(text) > self._embedder.window
        return texts, [sparse.encode_document(text) for text in texts]

    async def _put(self, draft: _Draft, chunks: Chunks) -> IngestReceipt:
        await self._store.put(draft.document, chunks)
        num_chunks = len(draft.chunks)
        logger.info("document ingested", extra={"document_id": draft.document.id, "num_chunks": num_chunks})
        return IngestReceipt(
            draft.document.id,
            "updated" if draft.is_update else "created",
            num_chunks=num_chunks,
            num_truncated_chunks=draft.num_truncated,
        )

    async def _reported(self, document: Document, work: Awaitable[_Draft | IngestReceipt]) -> _Draft | IngestReceipt:
        """Turn a failure into a receipt, so that it stops this document and no other."""
        try:
            return await work
        except CleaveError as error:
            return IngestReceipt(document.id, "failed", error=error.message)
        except Exception:
            logger.exception("ingestion failed", extra={"document_id": document.id})
            return IngestReceipt(document.id, "failed", error="Internal error; the service's log says more.")

    def _encoder_text(self, document: Document, chunk: Chunk) -> str:
        prefix = "\n".join(part for part in (document.title, chunk.heading) if part)
        room = min(MAX_PREFIX_TOKENS, self._embedder.window - self._embedder.num_tokens(chunk.text) - 1)
        offsets = self._embedder.offsets(prefix)
        if len(offsets) > room:
            prefix = prefix[: offsets[room][0]].rstrip() if room > 0 else ""
        return f"{prefix}\n{chunk.text}" if prefix else chunk.text


def _without_repetition(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Cut before an id that comes again, since the later version is compared with the stored earlier one."""
    run: dict[str, Document] = {}
    for document in documents:
        if document.id in run:
            yield list(run.values())
            run = {}
        run[document.id] = document
    yield list(run.values())


def check_window(embedder: Embedder, settings: ChunkingSettings) -> None:
    """Refuse chunks that the encoder would cut."""
    largest = embedder.window - embedder.num_tokens("")
    if settings.max_tokens > largest:
        raise ConfigurationError(
            f"chunking.max_tokens: {settings.max_tokens} does not fit the window of {embedder.model_name}; "
            f"set it to {largest} or less."
        )


def manifest(embedder: Embedder, settings: ChunkingSettings, *, chat_template: Path | None = None) -> Manifest:
    """Say what documents and questions go through: stamped into a collection, compared with the stamp of an old one.

    A key named after a setting holds that setting; see `recorded_settings`.
    """
    return {
        "text.cleaner": CLEANER_VERSION,
        "text.format": TEXT_FORMAT,
        "chunking.version": CHUNKER_VERSION,
        "chunking.max_tokens": settings.max_tokens,
        "embedding.model": embedder.model_name,
        "embedding.revision": embedder.revision,
        "embedding.tokenizer": embedder.tokenizer,
        "embedding.window": embedder.window,
        "embedding.query_prefix": embedder.query_prefix,
        "embedding.document_prefix": embedder.document_prefix,
        "embedding.dimension": embedder.dimension,
        "embedding.distance": DISTANCE,
        **sparse.MANIFEST,
        **prompts.manifest(chat_template),
    }


def recorded_settings(
    stamped: Manifest, embedding: EmbeddingSettings, chunking: ChunkingSettings
) -> tuple[EmbeddingSettings, ChunkingSettings]:
    """Give the settings that a collection was written with; what a manifest does not hold is about the machine."""
    return _recorded(stamped, "embedding", embedding), _recorded(stamped, "chunking", chunking)


def _recorded(stamped: Manifest, branch: str, settings: B) -> B:
    recorded = {
        name: stamped[f"{branch}.{name}"] for name in type(settings).model_fields if f"{branch}.{name}" in stamped
    }
    return settings.model_copy(update=recorded)
