"""What both engines write and read, in plain Python: points, their ids and payloads, and the order of a result.

A document is one record point (its text, and what the store says of it) and one point per chunk. Each carries
`document_id` and `revision`, the time of the write, which only rises for a document: so it is known of two versions
which is the older.
"""

import json
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, TypeAlias

from app.domain import Document, EncodedChunk, Filters, Metadata, Passage, Scalar, StoredDocument
from app.store import Manifest, Stamp

Payload: TypeAlias = dict[str, Any]

DENSE = "dense"
SPARSE = "sparse"
KEYWORD_FIELDS = ("kind", "document_id", "terms", "fields")
"""Payload fields with an index for exact match."""

# The k of reciprocal rank fusion. The engine divides a list's ranks by its weight, and from 4 on that works the wrong
# way round: the top of the heavier list blurs and the lighter one decides. On SQuAD, where BM25 is the better list,
# weights of 1 and 2 for it give nDCG@10 0.851 and 0.858 with a k of 2, but 0.841 and 0.831 with the usual 60.
# Evenly weighted, the two find equally well: mean over Cranfield, SQuAD and MTRAG 0.722 and 0.721.
RANK_CONSTANT = 2
MAX_FIELDS = 10_000
MAX_CHUNKS_PER_OPERATION = 128
"""A longer document is staged piece by piece, so that no single call holds up the others."""
MICROSECONDS = 1_000_000

_STORED_NAME = re.compile(r"(?P<name>[A-Za-z0-9_-]{1,64})(?:\.\d{8}T\d{12})?")
_ABSENT = object()
_NAMESPACE = uuid.UUID("6f1d6c1e-5d0b-5b8e-9c55-0a1c1ea7e000")


@dataclass(frozen=True, slots=True)
class Point:
    """A point of either engine; a record has no vectors."""

    id: str
    payload: Payload
    dense: Sequence[float] | None = None
    sparse: Mapping[int, float] | None = None


MANIFEST_ID = str(uuid.uuid5(_NAMESPACE, "manifest"))
INTENT_ID = str(uuid.uuid5(_NAMESPACE, "intent"))


def record_id(document_id: str) -> str:
    """Name the record point of a document, whatever its version."""
    return str(uuid.uuid5(_NAMESPACE, f"document\n{document_id}"))


def chunk_id(document_id: str, version: str, index: int) -> str:
    """Name a chunk point; chunks of another version have other ids and never overwrite these."""
    return str(uuid.uuid5(_NAMESPACE, f"chunk\n{version}\n{index}\n{document_id}"))


def chunk_ids(record: Payload) -> list[str]:
    """Name all chunk points of the version that a record stands for."""
    document_id, version = record["document_id"], record["content_hash"]
    return [chunk_id(document_id, version, index) for index in range(record["num_chunks"])]


def record_point(document: Document, num_chunks: int, revision: int) -> Point:
    """Make the point that stands for the whole document."""
    payload = {
        "kind": "document",
        "document_id": document.id,
        "title": document.title,
        "url": document.url,
        "metadata": dict(document.metadata),
        "fields": sorted(document.metadata),
        "text": document.text,
        "content_hash": document.content_hash,
        "num_chunks": num_chunks,
        "num_characters": len(document.text),
        "ingested_at": revision / MICROSECONDS,
        "revision": revision,
    }
    return Point(record_id(document.id), payload)


def chunk_points(
    document: Document, chunks: Iterable[EncodedChunk], revision: int, *, staged: bool = False
) -> list[Point]:
    """Make the points of some chunks of a document; staged ones are not found until they are published."""
    version = document.content_hash
    shared = {
        "kind": "staged" if staged else "chunk",
        "document_id": document.id,
        "version": version,
        "title": document.title,
        "url": document.url,
        "metadata": dict(document.metadata),
        "terms": [term(field, value) for field, value in document.metadata.items()],
        "revision": revision,
    }
    return [
        Point(
            chunk_id(document.id, version, encoded.chunk.index),
            {
                **shared,
                "index": encoded.chunk.index,
                "text": encoded.chunk.text,
                "heading": encoded.chunk.heading,
                "start": encoded.chunk.start,
                "end": encoded.chunk.end,
            },
            encoded.dense,
            encoded.sparse,
        )
        for encoded in chunks
    ]


def intent_point(staged: Sequence[str], stale: Sequence[str]) -> Point:
    """Make the note of what remains to do for a write: points to publish and points to remove, by id."""
    return Point(INTENT_ID, {"kind": "intent", "staged": list(staged), "stale": list(stale)})


def stamp_point(stamp: Stamp) -> Point:
    """Make the point that says what the collection is written with."""
    return Point(MANIFEST_ID, {"kind": "manifest", **asdict(stamp)})


def stamp_of(payload: Payload | None) -> Stamp:
    """Read that point; a collection without one was written with nothing that is known."""
    return Stamp(payload["manifest"], payload.get("stands_in_for")) if payload else Stamp({})


def new_stored_name(name: str) -> str:
    """Make up a name under which another version of a collection is stored beside those that there are."""
    return f"{name}.{datetime.now(UTC):%Y%m%dT%H%M%S%f}"


def client_name(stored: str) -> str | None:
    """Tell which name a collection is stored for; None when it is not one of ours."""
    match = _STORED_NAME.fullmatch(stored)
    return match["name"] if match else None


def split(chunks: Sequence[EncodedChunk]) -> tuple[list[Sequence[EncodedChunk]], Sequence[EncodedChunk]]:
    """Cut a document's chunks into pieces to stage first and the last piece, which its record is written with."""
    size = MAX_CHUNKS_PER_OPERATION
    *early, last = [chunks[start : start + size] for start in range(0, len(chunks), size)] or [()]
    return early, last


def next_revision(previous: Payload | None) -> int:
    """Give the time of a write: now, but behind the document's previous one even if the clock was set back.

    In whole microseconds, because the engine reads a fraction back with an error in its last digit.
    """
    now = int(time.time() * MICROSECONDS)
    return max(now, previous["revision"] + 1) if previous else now


def term(field: str, value: Scalar) -> str:
    """Write a metadata entry as one keyword, such as `year=2024` or `lang="en"`.

    So one index serves every field, whatever its name and type, and fields whose type varies; the engine's own
    filters know neither booleans nor floats nor a field name with a quotation mark.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # JSON does not tell 1 from 1.0, nor does the reader of a filter.
    return f"{field}={json.dumps(value, ensure_ascii=False)}"


def terms_of(filters: Filters) -> Iterator[list[str]]:
    """Give for each filter the keywords of which a chunk must have one."""
    for field, wanted in filters.items():
        values = wanted if isinstance(wanted, list) else [wanted]
        yield [term(field, value) for value in values]


def stored_document(payload: Payload) -> StoredDocument:
    """Read a record."""
    return StoredDocument(
        id=payload["document_id"],
        title=payload["title"],
        url=payload["url"],
        metadata=_metadata(payload),
        num_chunks=payload["num_chunks"],
        num_characters=payload["num_characters"],
        content_hash=payload["content_hash"],
        ingested_at=payload["ingested_at"],
    )


def passage(payload: Payload, score: float) -> Passage:
    """Read a chunk that was found."""
    return Passage(
        chunk_id=f"{payload['document_id']}#{payload['index']}",
        document_id=payload["document_id"],
        title=payload["title"],
        url=payload["url"],
        metadata=_metadata(payload),
        text=payload["text"],
        score=score,
    )


def num_hits(limit: int) -> int:
    """Say how many hits to ask for: more than wanted, so that ties and old versions at the cut cost nothing."""
    return 2 * limit


def best_passages(hits: Sequence[tuple[Payload, float]], limit: int) -> list[Passage]:
    """Keep the newest version of each document, order by score, and break ties, which the engine leaves to chance."""
    newest: dict[str, int] = {}
    for payload, _ in hits:
        document_id = payload["document_id"]
        newest[document_id] = max(payload["revision"], newest.get(document_id, 0))
    current = [hit for hit in hits if hit[0]["revision"] == newest[hit[0]["document_id"]]]
    current.sort(key=lambda hit: (-hit[1], hit[0]["document_id"], hit[0]["index"]))
    return [passage(payload, score) for payload, score in current[:limit]]


def changed_keys(stored: Manifest, wanted: Manifest) -> list[str]:
    """List the keys in which two manifests differ, sorted."""
    return sorted(key for key in {*stored, *wanted} if stored.get(key, _ABSENT) != wanted.get(key, _ABSENT))


def difference(stored: Manifest, wanted: Manifest) -> str:
    """Say on one line how two manifests differ; empty when they do not."""
    changed = changed_keys(stored, wanted)
    return "; ".join(f"{key}: was {_shown(stored, key)}, now {_shown(wanted, key)}" for key in changed)


def _shown(manifest: Manifest, key: str) -> str:
    return repr(manifest[key]) if key in manifest else "absent"


def _metadata(payload: Payload) -> Metadata:
    metadata: Metadata = payload["metadata"]
    return metadata
