"""Documents into the store: chunk, encode, write. The same encoder and chunker settings serve queries later."""

import asyncio
from collections.abc import Awaitable, Iterable, Iterator, Mapping, Sequence
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
from app.store import Manifest, Store
from app.telemetry import logger

B = TypeVar("B", bound=Branch)

MAX_PREFIX_TOKENS = 64
"""Room for title and heading before a chunk's text in what the encoder reads."""
TEXT_FORMAT = "title, heading, text; 1"
"""Names how a chunk becomes encoder input; change the number with the code, and old collections are refused."""
DISTANCE = "cosine"


@dataclass(frozen=True, slots=True)
class _Draft:
    """A document cut into chunks, with what the encoder reads of each and its BM25 terms."""

    document: Document
    chunks: Sequence[Chunk]
    texts: Sequence[str]
    terms: Sequence[Mapping[int, float]]
    num_truncated: int
    is_update: bool


class Ingestor:
    """Writes documents through one encoder into one store."""

    def __init__(self, embedder: Embedder, store: Store, settings: ChunkingSettings) -> None:
        check_window(embedder, settings)
        self._embedder = embedder
        self._store = store
        self._max_tokens = settings.max_tokens

    async def ingest(self, documents: Sequence[Document]) -> list[IngestReceipt]:
        """Write each document; one that fails is reported and the rest goes on. Receipts are in the order given."""
        return [receipt for run in _without_repetition(documents) for receipt in await self._ingest(run)]

    async def _ingest(self, documents: Sequence[Document]) -> list[IngestReceipt]:
        outcomes = [await self._reported(document, self._draft(document)) for document in documents]
        drafts = [outcome for outcome in outcomes if isinstance(outcome, _Draft)]
        # All in one call: short documents share the encoder's batches.
        vectors = iter((await self._embedder.embed([text for draft in drafts for text in draft.texts])).tolist())
        receipts = []
        for outcome in outcomes:
            if isinstance(outcome, _Draft):
                own = [next(vectors) for _ in outcome.chunks]
                outcome = await self._reported(outcome.document, self._write(outcome, own))
            assert isinstance(outcome, IngestReceipt)
            receipts.append(outcome)
        return receipts

    async def _draft(self, document: Document) -> _Draft | IngestReceipt:
        """Cut a document that is new or changed into chunks."""
        existing = await self._store.document(document.id)
        if existing is not None and existing[0].content_hash == document.content_hash:
            return IngestReceipt(document.id, "unchanged", num_chunks=existing[0].num_chunks)
        return await asyncio.to_thread(self._cut, document, existing is not None)

    def _cut(self, document: Document, is_update: bool) -> _Draft:
        chunks = split(document.text, self._embedder, max_tokens=self._max_tokens)
        texts = [self._encoder_text(document, chunk) for chunk in chunks]
        terms = [sparse.encode_document(text) for text in texts]
        return _Draft(document, chunks, texts, terms, self._count_truncated(texts), is_update)

    async def _write(self, draft: _Draft, vectors: Sequence[Sequence[float]]) -> IngestReceipt:
        encoded = [
            EncodedChunk(chunk, tuple(vector), terms)
            for chunk, terms, vector in zip(draft.chunks, draft.terms, vectors, strict=True)
        ]
        await self._store.put(draft.document, encoded)
        logger.info("document ingested", extra={"document_id": draft.document.id, "num_chunks": len(encoded)})
        return IngestReceipt(
            draft.document.id,
            "updated" if draft.is_update else "created",
            num_chunks=len(encoded),
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

    def _count_truncated(self, texts: Iterable[str]) -> int:
        return sum(self._embedder.num_tokens(text) > self._embedder.window for text in texts)


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
        "embedding.query_prompt": embedder.query_prompt,
        "embedding.document_prompt": embedder.document_prompt,
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
