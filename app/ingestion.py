"""Documents into the store: chunk, encode, write. The same encoder and chunker settings serve queries later."""

import time
from collections.abc import Iterable, Sequence

from app import sparse
from app.chunking import split
from app.domain import Chunk, Document, EncodedChunk, IngestReceipt
from app.embedding import Embedder
from app.errors import CleaveError, ConfigurationError
from app.settings import ChunkingSettings
from app.store import Manifest, Store
from app.telemetry import logger

MAX_PREFIX_TOKENS = 64
"""Room for title and heading before a chunk's text in what the encoder reads."""
TEXT_FORMAT = "title, heading, text; NFKC; 1"
"""Names how text becomes encoder input; change the number with the code, and old collections are refused."""


class Ingestor:
    """Writes documents through one encoder into one store."""

    def __init__(self, embedder: Embedder, store: Store, settings: ChunkingSettings) -> None:
        check_window(embedder, settings)
        self._embedder = embedder
        self._store = store
        self._max_tokens = settings.max_tokens

    async def ingest(self, documents: Sequence[Document]) -> list[IngestReceipt]:
        """Write each document; one that fails is reported and the rest goes on. Receipts are in the order given."""
        receipts = []
        for document in documents:
            try:
                receipts.append(await self._ingest_one(document))
            except CleaveError as error:
                receipts.append(IngestReceipt(document.id, "failed", error=error.message))
            except Exception:
                logger.exception("ingestion failed", extra={"document_id": document.id})
                receipts.append(
                    IngestReceipt(document.id, "failed", error="Internal error; the service's log says more.")
                )
        return receipts

    async def _ingest_one(self, document: Document) -> IngestReceipt:
        existing = await self._store.document(document.id)
        if existing is not None and existing[0].content_hash == document.content_hash:
            return IngestReceipt(document.id, "unchanged", num_chunks=existing[0].num_chunks)
        started = time.perf_counter()
        chunks = split(document.text, self._embedder, max_tokens=self._max_tokens)
        texts = [self._encoder_text(document, chunk) for chunk in chunks]
        vectors = await self._embedder.embed(texts)
        encoded = [
            EncodedChunk(chunk, vector, sparse.encode_document(text))
            for chunk, text, vector in zip(chunks, texts, vectors.tolist(), strict=True)
        ]
        await self._store.put(document, encoded)
        logger.info(
            "document ingested",
            extra={
                "document_id": document.id,
                "num_chunks": len(chunks),
                "seconds": round(time.perf_counter() - started, 2),
            },
        )
        return IngestReceipt(
            document.id,
            "updated" if existing else "created",
            num_chunks=len(chunks),
            num_truncated_chunks=self._count_truncated(texts),
        )

    def _encoder_text(self, document: Document, chunk: Chunk) -> str:
        prefix = "\n".join(part for part in (document.title, chunk.heading) if part)
        room = min(MAX_PREFIX_TOKENS, self._embedder.window - self._embedder.num_tokens(chunk.text) - 1)
        offsets = self._embedder.offsets(prefix)
        if len(offsets) > room:
            prefix = prefix[: offsets[room][0]].rstrip() if room > 0 else ""
        return f"{prefix}\n{chunk.text}" if prefix else chunk.text

    def _count_truncated(self, texts: Iterable[str]) -> int:
        return sum(self._embedder.num_tokens(text) > self._embedder.window for text in texts)


def check_window(embedder: Embedder, settings: ChunkingSettings) -> None:
    """Refuse chunks that the encoder would cut."""
    largest = embedder.window - embedder.num_tokens("")
    if settings.max_tokens > largest:
        raise ConfigurationError(
            f"chunking.max_tokens: {settings.max_tokens} does not fit the window of {embedder.model_name}; "
            f"set it to {largest} or less."
        )


def manifest(embedder: Embedder, settings: ChunkingSettings) -> Manifest:
    """Say what ingestion uses: stamped into a new collection, compared with the stamp of an old one."""
    return {
        "embedding.model": embedder.model_name,
        "embedding.revision": embedder.revision,
        "embedding.dimension": embedder.dimension,
        "embedding.window": embedder.window,
        "chunking.max_tokens": settings.max_tokens,
        "text.format": TEXT_FORMAT,
        **sparse.MANIFEST,
    }
