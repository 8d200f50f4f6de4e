"""The embedded store: Qdrant Edge, the engine inside this process, on one folder that it owns alone.

Every call of the engine holds Python's global lock from start to end, so threads gain nothing and many at once would
starve the event loop. Therefore one thread makes all calls: each is short, they never overlap, and a search sees a
document before or after a write, not within it. The one long call, `optimize`, runs in a process of its own before
the folder is opened.
"""

import asyncio
import json
import logging
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import qdrant_edge as engine
from qdrant_edge import EdgeShard, FieldCondition, Filter, MatchAny, MatchValue, UpdateOperation

from app.domain import Chunk, Document, EncodedChunk, Filters, Passage, Scalar, StoredDocument
from app.durable import write_whole
from app.errors import ConfigurationError, RetrieverUnavailable, StoreInUse
from app.store import NO_FILTERS, Aliases, Chunks, Located, Manifest, Stamp, Store, Vectors
from app.store.payload import (
    DENSE,
    INTENT_ID,
    KEYWORD_FIELDS,
    MANIFEST_ID,
    MAX_FIELDS,
    MAX_VALUES,
    SPARSE,
    Hits,
    Payload,
    Point,
    best_passages,
    chunk_id,
    chunk_ids,
    chunk_points,
    chunks_of_points,
    client_name,
    counts_by_field,
    current_writes,
    intent_point,
    new_token,
    next_write,
    pieces,
    published,
    record_id,
    record_point,
    sampled_ids,
    stamp_of,
    stamp_point,
    stored_document,
    terms_of,
    values_by_field,
)

T = TypeVar("T")
logger = logging.getLogger(__name__)

# Up to here a search that reads every vector takes 3 ms, and building the graph would take longer than it saves.
INDEXING_THRESHOLD_KB = 50_000
# Bounds what is lost in a power cut and what is read again after a kill; a flush takes some 20 ms.
POINTS_PER_FLUSH = 1_000
# The engine maps its files into memory: on a full disk it does not raise, the kernel ends the process (SIGBUS).
RESERVED_BYTES = 128 * 2**20
QUERIES_PER_CALL = 32
"""So that a long deletion lets searches in between."""
CHUNKS_PER_CALL = 512
"""Likewise when a long document is read."""
MAX_LEFTOVERS = 100_000

ALIASES_SUFFIX = ".aliases.json"
# A leading dot keeps a folder that is being removed from being taken for a collection.
REMOVED_PREFIX = ".removed-"

# Builds the graph over new vectors and drops the remains of deleted ones. In a process of its own, because it can
# take minutes, in which no other Python code of the process would run. It ends with its parent, whether by Ctrl-C or
# by a kill (prctl's first option, PR_SET_PDEATHSIG): left alone it would keep the folder from the next owner.
_TIDY = """
import ctypes, signal, sys, qdrant_edge
signal.signal(signal.SIGINT, signal.SIG_DFL)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
shard = qdrant_edge.EdgeShard.load(sys.argv[1])
shard.optimize()
shard.close()
"""


def open_edge_store(path: Path, *, dimension: int, manifest: Manifest) -> "EdgeStore":
    """Open the collection in the folder `path`, or create it there, stamped with the manifest. Blocks."""
    with _explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if not (path / "edge_config.json").exists():
            _require_space(path.parent, ConfigurationError)
            _create(path, dimension, manifest)
        else:
            logger.info("tidying the collection", extra={"folder": str(path)})
            # Whether it succeeds does not matter here; what hinders it hinders the load below, which says so.
            subprocess.run([sys.executable, "-c", _TIDY, str(path)], check=False, capture_output=True)
            _require_space(path, ConfigurationError)
        shard = EdgeShard.load(str(path))
        try:
            _finish_writes(shard)
        except BaseException:
            shard.close()
            raise
    return EdgeStore(shard, path)


class EdgeStore:
    """One collection in one folder; see `Store`."""

    def __init__(self, shard: EdgeShard, path: Path) -> None:
        self._shard = shard
        self._path = path
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="edge-store")
        self._num_unflushed = 0

    async def put(self, document: Document, chunks: Chunks) -> None:
        """Write a document with all its chunks; an older version under the same id is gone afterwards."""
        token = new_token()
        staged: list[str] = []
        last: Sequence[EncodedChunk] = ()
        try:
            # The last piece is written with the record, so that a short document is one operation.
            async for piece in pieces(chunks):
                staged += [chunk_id(document.id, token, encoded.chunk.index) for encoded in last]
                if last:
                    await self._run(self._write, chunk_points(document, last, token))
                last = piece
        except BaseException:
            await self._run(self._drop, staged)
            raise
        await self._run(self._commit, document, last, token, staged)

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
        """Fuse the dense and the sparse list; both are read in one go, so of one state."""
        return await self._run(self._search, dense, sparse, filters, limit, num_candidates, weights)

    async def documents(
        self, *, after: str | None = None, limit: int = 100, filters: Filters = NO_FILTERS
    ) -> list[StoredDocument]:
        """Give a page of documents, in the order of their record ids."""
        return await self._run(self._documents, after, limit, filters)

    async def num_documents(self, filters: Filters) -> int:
        """Count the documents that match."""
        return await self._run(self._count, "document", filters)

    async def document(self, document_id: str) -> tuple[StoredDocument, str] | None:
        """Give one document and its whole text, or None."""
        record = await self._run(_read, self._shard, record_id(document_id))
        return (stored_document(record), record["text"]) if record else None

    async def chunks(self, document_id: str, *, version: int, only: int | None = None) -> list[Chunk] | None:
        """Give the chunks of a version of a document, a few per call of the engine."""
        record = await self._run(_record, self._shard, document_id)
        if record is None or stored_document(record).version != version:
            return None
        ids = chunk_ids(record, only)
        found: list[engine.Record] = []
        for start in range(0, len(ids), CHUNKS_PER_CALL):
            found += await self._run(self._read_chunks, ids[start : start + CHUNKS_PER_CALL])
        return chunks_of_points(map(_payload, found), num_expected=len(ids))

    async def locate(self, document_id: str) -> Located | None:
        """Say what a deletion has to remove, or None."""
        return await self._run(self._locate, document_id)

    async def remove(self, document_id: str, writes: Collection[str]) -> None:
        """Remove the record and the chunks of these writes of a document, in one operation."""
        await self._run(self._remove, document_id, writes)

    async def find_leftovers(self, document_id: str, vectors: Sequence[Vectors]) -> Mapping[str, set[str]]:
        """Look for chunks of a document that should be gone, by its id and by the vectors that they had."""
        current = current_writes(await self._run(_record, self._shard, document_id))
        of_document = _chunks_of(document_id, current)
        found = {"filter": await self._run(self._scroll_writes, of_document)}
        for name, position in ((DENSE, 0), (SPARSE, 1)):
            queries = [pair[position] for pair in vectors if pair[position]]
            found[name] = set()
            for start in range(0, len(queries), QUERIES_PER_CALL):
                some = queries[start : start + QUERIES_PER_CALL]
                found[name] |= await self._run(self._query_writes, name, some, of_document)
        current |= current_writes(await self._run(_record, self._shard, document_id))
        return {check: writes - current for check, writes in found.items()}

    async def counts(self) -> tuple[int, int]:
        """Count documents and chunks."""
        return await self._run(self._counts)

    async def filter_fields(self) -> tuple[str, ...]:
        """List the metadata fields of all documents, sorted."""
        return await self._run(self._filter_fields)

    async def metadata_values(self) -> Mapping[str, list[Scalar]]:
        """List the metadata values of all chunks by field."""
        return await self._run(self._metadata_values)

    async def value_counts(self) -> Mapping[str, list[tuple[Scalar, int]]]:
        """Count the documents of each metadata value by field."""
        return await self._run(self._value_counts)

    async def stamp(self) -> Stamp:
        """Tell what the collection was written with."""
        return stamp_of(await self._run(_read, self._shard, MANIFEST_ID))

    async def set_stamp(self, stamp: Stamp) -> None:
        """Say anew what the collection was written with."""
        await self._run(self._write, [stamp_point(stamp)])

    async def close(self) -> None:
        """Flush and release the folder."""
        await self._run(self._shard.close)
        self._thread.shutdown(wait=False)

    async def _run(self, call: Callable[..., T], *arguments: Any) -> T:
        """Make a call on the engine's thread; if the caller is cancelled, the call still ends whole."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, call, *arguments)
        except Exception as error:
            if type(error) is not Exception:
                raise
            # The engine raises bare Exception and nothing else does.
            raise RetrieverUnavailable(f"The embedded store in {self._path} failed: {_first_line(error)}") from error

    def _commit(self, document: Document, last: Sequence[EncodedChunk], token: str, staged: list[str]) -> None:
        """Make a version the valid one. An operation is wholly in the write-ahead log or not at all.

        A new document is one operation. Else the intent makes sure that the rest is done, now or at the next start.
        """
        _carry_out_intent(self._shard)
        previous = _record(self._shard, document.id)
        write = next_write(token, previous)
        stale = chunk_ids(previous) if previous else []
        record = record_point(document, len(staged) + len(last), write)
        points = [record, *chunk_points(document, last, token, write.revision)]
        if not staged and not stale:
            self._write(points)
            return
        self._write([*points, intent_point(staged, stale, write.revision)])
        _carry_out_intent(self._shard)

    def _drop(self, staged: Sequence[str]) -> None:
        if staged:
            self._shard.update(UpdateOperation.delete_points(list(staged)))

    def _write(self, points: Sequence[Point]) -> None:
        _require_space(self._path, RetrieverUnavailable)
        self._shard.update(_upsert(points))
        self._num_unflushed += len(points)
        if self._num_unflushed >= POINTS_PER_FLUSH:
            self._shard.flush()
            self._num_unflushed = 0

    def _search(
        self,
        dense: Sequence[float],
        sparse: Mapping[int, float],
        filters: Filters,
        limit: int,
        num_candidates: int,
        weights: tuple[float, float],
    ) -> list[Passage]:
        matching = _matching("chunk", filters)
        found = [
            self._nearest(query, matching, num_candidates) if weight > 0 else []
            for query, weight in (
                (engine.Query.Nearest(list(dense), using=DENSE), weights[0]),
                (engine.Query.Nearest(_sparse_vector(sparse), using=SPARSE), weights[1] if sparse else 0.0),
            )
        ]
        return best_passages(*found, weights=weights, num_candidates=num_candidates, limit=limit)

    def _nearest(self, query: engine.Query, matching: Filter, limit: int) -> Hits:
        request = engine.QueryRequest(query=query, filter=matching, limit=limit, with_payload=True)
        return [(_payload(point), point.score) for point in self._shard.query(request)]

    def _read_chunks(self, ids: Sequence[str]) -> list[engine.Record]:
        return list(self._shard.retrieve([*ids], with_payload=True, with_vector=False))

    def _documents(self, after: str | None, limit: int, filters: Filters) -> list[StoredDocument]:
        # The page starts at the id `after`, which may be deleted by now: one more is read and that one left out.
        start = record_id(after) if after is not None else None
        request = engine.ScrollRequest(
            offset=start,
            limit=limit + 1,
            filter=_matching("document", filters),
            with_payload=engine.PayloadSelector.Exclude(["text"]),
        )
        records, _ = self._shard.scroll(request)
        return [stored_document(_payload(record)) for record in records if str(record.id) != start][:limit]

    def _locate(self, document_id: str) -> Located | None:
        record = _record(self._shard, document_id)
        if record is None:
            return None
        chunks = self._shard.retrieve([*sampled_ids(record)], with_payload=False, with_vector=True)
        return Located(stored_document(record), record["write"], [_vectors_of(chunk) for chunk in chunks])

    def _remove(self, document_id: str, writes: Collection[str]) -> None:
        of_writes = Filter(must=[_is("document_id", document_id), _any_of("write", list(writes))])
        request = engine.ScrollRequest(filter=of_writes, limit=MAX_LEFTOVERS, with_payload=False)
        found, _ = self._shard.scroll(request)
        if found:
            self._shard.update(UpdateOperation.delete_points([point.id for point in found]))

    def _scroll_writes(self, matching: Filter) -> set[str]:
        request = engine.ScrollRequest(
            filter=matching, limit=MAX_LEFTOVERS, with_payload=engine.PayloadSelector.Include(["write"])
        )
        found, _ = self._shard.scroll(request)
        return {_payload(point)["write"] for point in found}

    def _query_writes(self, name: str, queries: Sequence[Any], matching: Filter) -> set[str]:
        writes = set()
        for query in queries:
            vector = _sparse_vector(query) if name == SPARSE else query
            request = engine.QueryRequest(
                query=engine.Query.Nearest(vector, using=name),
                filter=matching,
                limit=1,
                with_payload=engine.PayloadSelector.Include(["write"]),
            )
            writes |= {_payload(point)["write"] for point in self._shard.query(request)}
        return writes

    def _counts(self) -> tuple[int, int]:
        return self._count("document"), self._count("chunk")

    def _count(self, kind: str, filters: Filters = NO_FILTERS) -> int:
        return self._shard.count(engine.CountRequest(filter=_matching(kind, filters), exact=True))

    def _filter_fields(self) -> tuple[str, ...]:
        hits = self._shard.facet(engine.FacetRequest(key="fields", limit=MAX_FIELDS, exact=True)).hits
        return tuple(sorted(str(hit.value) for hit in hits if hit.count))

    def _metadata_values(self) -> Mapping[str, list[Scalar]]:
        of_chunks = Filter(must=[_is("kind", "chunk")])
        # Exact counts would be read point by point: 180 ms in place of 5 for 10,000 chunks, with the same values.
        request = engine.FacetRequest(key="terms", limit=MAX_VALUES, exact=False, filter=of_chunks)
        return values_by_field(str(hit.value) for hit in self._shard.facet(request).hits if hit.count)

    def _value_counts(self) -> Mapping[str, list[tuple[Scalar, int]]]:
        of_documents = Filter(must=[_is("kind", "document")])
        request = engine.FacetRequest(key="terms", limit=MAX_VALUES, exact=False, filter=of_documents)
        return counts_by_field((str(hit.value), hit.count) for hit in self._shard.facet(request).hits if hit.count)


class EdgeDatabase:
    """All collections under one folder, which this process owns alone; see `Database`.

    A collection is a folder; a small file says when another one stands behind its name.
    """

    is_shared = False

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    async def names(self) -> list[str]:
        """List the names that clients use."""
        names = {client_name(stored) for stored in await asyncio.to_thread(self._stored)}
        return [name for name in sorted(filter(None, names)) if await self.aliases(name)]

    async def aliases(self, name: str) -> Aliases | None:
        """Read the file of a name; without one, its collection is stored under it."""
        return await asyncio.to_thread(self._aliases, name)

    async def set_aliases(self, name: str, aliases: Aliases) -> None:
        """Write the file of a name beside the old one and rename it, so that there is always a whole one."""
        await asyncio.to_thread(self._set_aliases, name, aliases)

    async def open(self, stored: str, *, dimension: int, manifest: Manifest) -> Store:
        """Open the folder of a collection, or create it."""
        return await asyncio.to_thread(open_edge_store, self._folder / stored, dimension=dimension, manifest=manifest)

    async def drop(self, name: str, *, keep: Aliases | None = None) -> None:
        """Remove the folders of a name, each by a rename first: after a kill it is there or not."""
        await asyncio.to_thread(self._drop, name, keep)

    async def close(self) -> None:
        """Nothing is held."""

    def _stored(self) -> list[str]:
        return [path.parent.name for path in self._folder.glob("[!.]*/edge_config.json")]

    def _aliases(self, name: str) -> Aliases | None:
        with _explained_files(self._folder):
            path = self._folder / f"{name}{ALIASES_SUFFIX}"
            aliases = Aliases(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else Aliases(name)
            # A removal that was cut short leaves a file that names nothing.
            return next((one for one in (aliases, Aliases(name)) if self._is_stored(one.live)), None)

    def _is_stored(self, stored: str) -> bool:
        return (self._folder / stored / "edge_config.json").exists()

    def _set_aliases(self, name: str, aliases: Aliases) -> None:
        with _explained_files(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / f"{name}{ALIASES_SUFFIX}"
            write_whole(path, json.dumps(asdict(aliases)).encode())

    def _drop(self, name: str, keep: Aliases | None) -> None:
        with _explained_files(self._folder):
            kept = keep.stored() if keep else set()
            for stored in sorted(self._stored()):
                if client_name(stored) == name and stored not in kept:
                    removed = tempfile.mkdtemp(dir=self._folder, prefix=REMOVED_PREFIX)
                    (self._folder / stored).rename(Path(removed, stored))
            if keep is None:
                (self._folder / f"{name}{ALIASES_SUFFIX}").unlink(missing_ok=True)
            for folder in self._folder.glob(f"{REMOVED_PREFIX}*"):
                shutil.rmtree(folder, ignore_errors=True)


def _create(path: Path, dimension: int, manifest: Manifest) -> None:
    """Lay out an empty collection beside `path` and move it there, so that a kill leaves no half of one."""
    config = engine.EdgeConfig(
        vectors={DENSE: engine.EdgeVectorParams(size=dimension, distance=engine.Distance.Cosine)},
        sparse_vectors={SPARSE: engine.EdgeSparseVectorParams(modifier=engine.Modifier.Idf)},
        optimizers=engine.EdgeOptimizersConfig(indexing_threshold=INDEXING_THRESHOLD_KB),
    )
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".creating-") as folder:
        unfinished = Path(folder, path.name)
        shard = EdgeShard.create(str(unfinished), config)
        for field in KEYWORD_FIELDS:
            shard.update(UpdateOperation.create_field_index(field, engine.PayloadSchemaType.Keyword))
        shard.update(_upsert([stamp_point(Stamp(manifest))]))
        shard.close()
        unfinished.rename(path)


def _finish_writes(shard: EdgeShard) -> None:
    """Complete the write that a kill cut short, and drop what was staged and never committed."""
    _carry_out_intent(shard)
    request = engine.ScrollRequest(filter=Filter(must=[_is("kind", "staged")]), limit=MAX_LEFTOVERS, with_payload=False)
    while left := shard.scroll(request)[0]:
        shard.update(UpdateOperation.delete_points([point.id for point in left]))


def _carry_out_intent(shard: EdgeShard) -> None:
    """Publish the staged chunks of a new version and remove those of the old one; done twice, it does the same.

    By id, not by a filter: after a kill the engine repeats operations on an index that may be ahead of them, so a
    filter would miss points that it met the first time.
    """
    intent = _read(shard, INTENT_ID)
    if intent is None:
        return
    if intent["staged"]:
        shard.update(UpdateOperation.set_payload(intent["staged"], published(intent["revision"])))
    shard.update(UpdateOperation.delete_points([*intent["stale"], INTENT_ID]))


def _record(shard: EdgeShard, document_id: str) -> Payload | None:
    """Read what stands for a document, without its text, which may be long."""
    no_text = engine.PayloadSelector.Exclude(["text"])
    found = shard.retrieve([record_id(document_id)], with_payload=no_text, with_vector=False)
    return _payload(found[0]) if found else None


def _read(shard: EdgeShard, point_id: str) -> Payload | None:
    found = shard.retrieve([point_id], with_payload=True, with_vector=False)
    return _payload(found[0]) if found else None


def _payload(point: engine.Record | engine.ScoredPoint) -> Payload:
    return point.payload or {}


def _upsert(points: Iterable[Point]) -> UpdateOperation:
    return UpdateOperation.upsert_points([engine.Point(point.id, _vectors(point), point.payload) for point in points])


def _vectors(point: Point) -> dict[str, Any]:
    vectors: dict[str, Any] = {}
    if point.dense is not None:
        vectors[DENSE] = list(point.dense)
    if point.sparse:
        vectors[SPARSE] = _sparse_vector(point.sparse)
    return vectors


def _sparse_vector(weights: Mapping[int, float]) -> engine.SparseVector:
    return engine.SparseVector(indices=list(weights), values=list(weights.values()))


def _vectors_of(chunk: engine.Record) -> Vectors:
    vectors: Any = chunk.vector or {}
    sparse = vectors.get(SPARSE)
    return vectors[DENSE], dict(zip(sparse.indices, sparse.values, strict=True)) if sparse else {}


def _chunks_of(document_id: str, current: Collection[str]) -> Filter:
    """Match the chunks of a document but those of its current writes."""
    chunks = [_is("kind", "chunk"), _is("document_id", document_id)]
    return Filter(must=[*chunks], must_not=[_any_of("write", list(current))]) if current else Filter(must=[*chunks])


def _matching(kind: str, filters: Filters) -> Filter:
    return Filter(must=[_is("kind", kind), *(_any_of("terms", terms) for terms in terms_of(filters))])


def _is(field: str, value: str) -> FieldCondition:
    return FieldCondition(field, match=MatchValue(value))


def _any_of(field: str, values: list[str]) -> FieldCondition:
    return FieldCondition(field, match=MatchAny(values))


def _require_space(path: Path, error: type[ConfigurationError] | type[RetrieverUnavailable]) -> None:
    free = shutil.disk_usage(path).free
    if free < RESERVED_BYTES:
        raise error(
            f"The disk of {path} has {free // 2**20} MiB free and the embedded store needs "
            f"{RESERVED_BYTES // 2**20} MiB: free some space, or move data_dir."
        )


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Turn what the file system and the engine raise into one line that says what to change."""
    try:
        yield
    except OSError as error:
        raise ConfigurationError(f"The embedded store cannot use the folder {path}: {error.strerror}.") from error
    except Exception as error:
        if type(error) is not Exception:
            raise
        # The engine raises bare Exception; only the words tell the cause.
        if "WouldBlock" in str(error):
            raise StoreInUse(
                f"The folder {path} is open in another process, and the embedded store has exactly one owner: "
                "stop the other process, or run a Qdrant server and set store.kind to server."
            ) from error
        raise ConfigurationError(f"The embedded store cannot open {path}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


@contextmanager
def _explained_files(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError(f"The collections in {folder} cannot be read or changed ({error}).") from error
