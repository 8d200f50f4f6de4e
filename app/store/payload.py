"""What both engines write and read, in plain Python: points, their ids and payloads, and the order of a result.

A document is one record point (its text, and what the store says of it) and one point per chunk. Each carries
`document_id`, `write`, the token of the write that it comes from, and `revision`, the time of that write, which only
rises for a document: so it is known of two versions which is the older. A chunk without a revision is staged: no
search finds it.
"""

import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, TypeAlias

from app.domain import Chunk, Document, EncodedChunk, Filters, Metadata, Passage, Scalar, StoredDocument
from app.fusion import fuse
from app.store import Chunks, Manifest, Stamp

Payload: TypeAlias = dict[str, Any]
Hits: TypeAlias = Sequence[tuple[Payload, float]]
"""What a query found, best first: payload and score."""

DENSE = "dense"
SPARSE = "sparse"
KEYWORD_FIELDS = ("kind", "document_id", "terms", "fields")
"""Payload fields with an index for exact match."""

MAX_FIELDS = 10_000
MAX_VALUES = 20_000
"""Metadata values that are listed: the most frequent, so that those of a single document are left out first."""
MAX_CHUNKS_PER_OPERATION = 128
"""A longer document is staged piece by piece, so that no single call holds up the others."""
MAX_SAMPLES = 256
"""Chunks whose vectors are looked for after a deletion, evenly spread over the document."""
MICROSECONDS = 1_000_000
SCORE_DIGITS = 6

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


def chunk_id(document_id: str, write: str, index: int) -> str:
    """Name a chunk point; chunks of another write have other ids and never overwrite these."""
    return str(uuid.uuid5(_NAMESPACE, f"chunk\n{write}\n{index}\n{document_id}"))


def chunk_ids(record: Payload, only: int | None = None) -> list[str]:
    """Name all chunk points of the write that a record stands for, or `only` one if there is such a one."""
    indexes = range(record["num_chunks"])
    wanted = indexes if only is None else [only] if only in indexes else []
    return [chunk_id(record["document_id"], record["write"], index) for index in wanted]


def sampled_ids(record: Payload) -> list[str]:
    """Name up to `MAX_SAMPLES` of them, evenly spread."""
    ids = chunk_ids(record)
    return ids[:: max(1, -(-len(ids) // MAX_SAMPLES))]


@dataclass(frozen=True, slots=True)
class Write:
    """One write of a document: its own token, its time, and what it makes of the versions before it."""

    token: str
    revision: int
    version: int
    ingested_at: float


def new_token() -> str:
    """Name a write as no other is named, also not one of another process."""
    return uuid.uuid4().hex


def next_write(token: str, previous: Payload | None) -> Write:
    """Say what a write becomes that follows the one of the record `previous`.

    Its revision is now, but behind the previous one even if the clock was set back; in whole microseconds, because
    the engine reads a fraction back with an error in its last digit.
    """
    now = int(time.time() * MICROSECONDS)
    if previous is None:
        return Write(token, now, 1, now / MICROSECONDS)
    return Write(token, max(now, previous["revision"] + 1), previous["version"] + 1, previous["ingested_at"])


def record_point(document: Document, num_chunks: int, write: Write) -> Point:
    """Make the point that stands for the whole document."""
    payload = {
        "kind": "document",
        "document_id": document.id,
        "title": document.title,
        "url": document.url,
        "metadata": dict(document.metadata),
        "fields": sorted(document.metadata),
        "terms": _terms(document),
        "text": document.text,
        "content_hash": document.content_hash,
        "num_chunks": num_chunks,
        "num_characters": len(document.text),
        "write": write.token,
        "revision": write.revision,
        "version": write.version,
        "ingested_at": write.ingested_at,
    }
    return Point(record_id(document.id), payload)


def chunk_points(
    document: Document, chunks: Iterable[EncodedChunk], token: str, revision: int | None = None
) -> list[Point]:
    """Make the points of some chunks of a document; without a revision they are staged."""
    state = {"kind": "staged", "staged_at": int(time.time())} if revision is None else published(revision)
    shared = {
        **state,
        "document_id": document.id,
        "write": token,
        "title": document.title,
        "url": document.url,
        "metadata": dict(document.metadata),
        "terms": _terms(document),
    }
    return [
        Point(
            chunk_id(document.id, token, encoded.chunk.index),
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


def chunks_of_points(payloads: Iterable[Payload], *, num_expected: int) -> list[Chunk] | None:
    """Read chunk points, in the order of the text; None when some are missing: another write has replaced them."""
    names = ("index", "text", "start", "end", "heading")
    chunks = [Chunk(**{name: payload[name] for name in names}) for payload in payloads]
    return sorted(chunks, key=lambda chunk: chunk.index) if len(chunks) == num_expected else None


def published(revision: int) -> Payload:
    """Give the entries that make a staged chunk findable."""
    return {"kind": "chunk", "revision": revision}


def intent_point(staged: Sequence[str], stale: Sequence[str], revision: int) -> Point:
    """Make the note of what remains to do for a write: points to publish and points to remove, by id."""
    return Point(INTENT_ID, {"kind": "intent", "staged": list(staged), "stale": list(stale), "revision": revision})


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


async def pieces(chunks: Chunks) -> AsyncIterator[Sequence[EncodedChunk]]:
    """Cut a document's chunks into runs that one operation takes."""
    if isinstance(chunks, Sequence):
        for piece in _runs(chunks):
            yield piece
        return
    async for several in chunks:
        for piece in _runs(several):
            yield piece


def _runs(chunks: Sequence[EncodedChunk]) -> Iterator[Sequence[EncodedChunk]]:
    size = MAX_CHUNKS_PER_OPERATION
    return (chunks[start : start + size] for start in range(0, len(chunks), size))


def term(field: str, value: Scalar) -> str:
    """Write a metadata entry as one keyword, such as `year=2024` or `lang="en"`.

    So one index serves every field, whatever its name and type, and fields whose type varies; the engine's own
    filters know neither booleans nor floats nor a field name with a quotation mark.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # JSON does not tell 1 from 1.0, nor does the reader of a filter.
    return f"{field}={json.dumps(value, ensure_ascii=False)}"


def _terms(document: Document) -> list[str]:
    return [term(field, value) for field, value in document.metadata.items()]


def metadata_entry(keyword: str) -> tuple[str, Scalar]:
    """Read what `term` wrote: the field and the value. A field may itself hold "=" signs."""
    field, _, value = keyword.partition("=")
    while True:
        try:
            return field, json.loads(value)
        except ValueError:
            more, _, value = value.partition("=")
            field = f"{field}={more}"


def values_by_field(keywords: Iterable[str]) -> Mapping[str, list[Scalar]]:
    """Group keywords that `term` wrote by their field."""
    found: dict[str, list[Scalar]] = {}
    for field, value in map(metadata_entry, keywords):
        found.setdefault(field, []).append(value)
    return found


def counts_by_field(hits: Iterable[tuple[str, int]]) -> Mapping[str, list[tuple[Scalar, int]]]:
    """Group counted keywords that `term` wrote by their field, in an order that does not vary."""
    found: dict[str, list[tuple[Scalar, int]]] = {}
    for keyword, count in sorted(hits, key=lambda hit: (-hit[1], hit[0])):
        field, value = metadata_entry(keyword)
        found.setdefault(field, []).append((value, count))
    return found


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
        version=payload.get("version", 1),
        ingested_at=payload["ingested_at"],
        updated_at=payload["revision"] / MICROSECONDS,
    )


def current_writes(record: Payload | None) -> set[str]:
    """Name the writes that chunks which are found may come from: the record's, and until that is done the previous."""
    return {record["write"], record.get("replaces", "")} if record else set()


def passage(payload: Payload, score: float, similarity: float | None = None) -> Passage:
    """Read a chunk that was found."""
    return Passage(
        chunk_id=f"{payload['document_id']}#{payload['index']}",
        document_id=payload["document_id"],
        title=payload["title"],
        url=payload["url"],
        metadata=_metadata(payload),
        text=payload["text"],
        score=score,
        start=payload["start"],
        end=payload["end"],
        similarity=similarity,
    )


def best_passages(
    dense: Hits, sparse: Hits, *, weights: tuple[float, float], num_candidates: int, limit: int
) -> list[Passage]:
    """Fuse what the dense and the sparse query found, in the newest version of each document.

    Ties, which an engine leaves to chance, are broken by document and place; what is nearly equal counts as equal,
    since engines differ in the last digits.
    """
    newest: dict[str, int] = {}
    for payload, _ in (*dense, *sparse):
        document_id = payload["document_id"]
        newest[document_id] = max(payload["revision"], newest.get(document_id, 0))
    current: dict[tuple[str, int], Payload] = {}
    lists: list[dict[tuple[str, int], float]] = []
    for hits in (dense, sparse):
        lists.append({})
        for payload, score in hits:
            if payload["revision"] == newest[payload["document_id"]]:
                key = (payload["document_id"], payload["index"])
                current[key] = payload
                lists[-1][key] = score
    fused = fuse(lists, weights, length=num_candidates)
    order = sorted(fused, key=lambda key: (-round(fused[key], SCORE_DIGITS), key))
    return [passage(current[key], fused[key], lists[0].get(key)) for key in order[:limit]]


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
