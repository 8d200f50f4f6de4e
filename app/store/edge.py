"""The embedded store: Qdrant Edge, the engine inside this process, on one folder that it owns alone.

Every call of the engine holds Python's global lock from start to end, so threads gain nothing and many at once would
starve the event loop. Therefore one thread makes all calls: each is short, they never overlap, and a search sees a
document before or after a write, not within it. The one long call, `optimize`, runs in a process of its own before
the folder is opened.
"""

import asyncio
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import qdrant_edge as engine
from qdrant_edge import EdgeShard, FieldCondition, Filter, MatchAny, MatchValue, UpdateOperation

from app.domain import Document, EncodedChunk, Filters, Passage, StoredDocument
from app.errors import ConfigurationError, RetrieverUnavailable
from app.store import Aliases, Manifest, Stamp, Store
from app.store.payload import (
    DENSE,
    INTENT_ID,
    KEYWORD_FIELDS,
    MANIFEST_ID,
    MAX_FIELDS,
    RANK_CONSTANT,
    SPARSE,
    Payload,
    Point,
    best_passages,
    chunk_ids,
    chunk_points,
    client_name,
    intent_point,
    next_revision,
    num_hits,
    record_id,
    record_point,
    split,
    stamp_of,
    stamp_point,
    stored_document,
    terms_of,
)

T = TypeVar("T")
logger = logging.getLogger(__name__)

# Up to here a search that reads every vector takes 3 ms, and building the graph would take longer than it saves.
INDEXING_THRESHOLD_KB = 50_000
# Bounds what is lost in a power cut and what is read again after a kill; a flush takes some 20 ms.
POINTS_PER_FLUSH = 1_000
# The engine maps its files into memory: on a full disk it does not raise, the kernel ends the process (SIGBUS).
RESERVED_BYTES = 128 * 2**20

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
        self._writing = asyncio.Lock()
        self._num_unflushed = 0

    async def put(self, document: Document, chunks: Sequence[EncodedChunk]) -> None:
        """Write a document with all its chunks; an older version under the same id is gone afterwards."""
        early, last = split(chunks)
        async with self._writing:
            previous = await self._run(_record, self._shard, document.id)
            revision = next_revision(previous)
            staged: list[str] = []
            for piece in early:
                staged += await self._run(self._stage, document, piece, revision)
            record = record_point(document, len(chunks), revision)
            stale = sorted({*chunk_ids(previous)} - {*chunk_ids(record.payload)}) if previous else []
            await self._run(self._commit, record, partial(chunk_points, document, last, revision), staged, stale)

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
        """Fuse the dense and the sparse list by weighted reciprocal rank in the engine."""
        return await self._run(self._search, dense, sparse, filters, limit, num_candidates, weights)

    async def documents(self, *, after: str | None = None, limit: int = 100) -> list[StoredDocument]:
        """Give a page of documents, in the order of their record ids."""
        return await self._run(self._documents, after, limit)

    async def document(self, document_id: str) -> tuple[StoredDocument, str] | None:
        """Give one document and its whole text, or None."""
        record = await self._run(_record, self._shard, document_id)
        return (stored_document(record), record["text"]) if record else None

    async def delete(self, document_id: str) -> bool:
        """Remove a document and all its chunks in one operation; False when there was none."""
        async with self._writing:
            return await self._run(self._delete, document_id)

    async def counts(self) -> tuple[int, int]:
        """Count documents and chunks."""
        return await self._run(self._counts)

    async def filter_fields(self) -> tuple[str, ...]:
        """List the metadata fields of all documents, sorted."""
        return await self._run(self._filter_fields)

    async def stamp(self) -> Stamp:
        """Tell what the collection was written with."""
        return stamp_of(await self._run(_read, self._shard, MANIFEST_ID))

    async def set_stamp(self, stamp: Stamp) -> None:
        """Say anew what the collection was written with."""
        async with self._writing:
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

    def _stage(self, document: Document, piece: Sequence[EncodedChunk], revision: int) -> list[str]:
        """Write chunks that no search finds yet; give their ids."""
        points = chunk_points(document, piece, revision, staged=True)
        self._write(points)
        return [point.id for point in points]

    def _commit(
        self, record: Point, last_chunks: Callable[[], list[Point]], staged: list[str], stale: list[str]
    ) -> None:
        """Make a version the valid one. An operation is wholly in the write-ahead log or not at all.

        A new document is one operation. Else the intent makes sure that the rest is done, now or at the next start.
        """
        points = [record, *last_chunks()]
        if not staged and not stale:
            self._write(points)
            return
        self._write([*points, intent_point(staged, stale)])
        _finish(self._shard, staged, stale)

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
        matching = Filter(must=[_is("kind", "chunk"), *(_any_of("terms", terms) for terms in terms_of(filters))])
        queries: list[tuple[float, engine.Query]] = []
        if weights[0] > 0:
            queries.append((weights[0], engine.Query.Nearest(list(dense), using=DENSE)))
        if weights[1] > 0 and sparse:
            queries.append((weights[1], engine.Query.Nearest(_sparse_vector(sparse), using=SPARSE)))
        if not queries:
            return []
        fusion = engine.Fusion.Rrf(k=RANK_CONSTANT, weights=[weight for weight, _ in queries])
        request = engine.QueryRequest(
            prefetches=[engine.Prefetch(query=query, filter=matching, limit=num_candidates) for _, query in queries],
            query=fusion,  # type: ignore[arg-type]  # The stubs miss that Rrf is a Fusion.
            limit=num_hits(limit),
            with_payload=True,
        )
        return best_passages([(_payload(point), point.score) for point in self._shard.query(request)], limit)

    def _documents(self, after: str | None, limit: int) -> list[StoredDocument]:
        # The page starts at the id `after`, which may be deleted by now: one more is read and that one left out.
        start = record_id(after) if after is not None else None
        request = engine.ScrollRequest(
            offset=start,
            limit=limit + 1,
            filter=Filter(must=[_is("kind", "document")]),
            with_payload=engine.PayloadSelector.Exclude(["text"]),
        )
        records, _ = self._shard.scroll(request)
        return [stored_document(_payload(record)) for record in records if str(record.id) != start][:limit]

    def _delete(self, document_id: str) -> bool:
        record = _record(self._shard, document_id)
        if record is None:
            return False
        self._shard.update(UpdateOperation.delete_points([record_id(document_id), *chunk_ids(record)]))
        return True

    def _counts(self) -> tuple[int, int]:
        return self._count("document"), self._count("chunk")

    def _count(self, kind: str) -> int:
        return self._shard.count(engine.CountRequest(filter=Filter(must=[_is("kind", kind)]), exact=True))

    def _filter_fields(self) -> tuple[str, ...]:
        hits = self._shard.facet(engine.FacetRequest(key="fields", limit=MAX_FIELDS, exact=True)).hits
        return tuple(sorted(str(hit.value) for hit in hits if hit.count))


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
            draft = path.with_name(f".{path.name}")
            with draft.open("w", encoding="utf-8") as file:
                json.dump(asdict(aliases), file)
                file.flush()
                os.fsync(file.fileno())
            draft.rename(path)
            _sync_folder(self._folder)

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
    """Complete the write that a kill cut short, or drop what it staged and never committed."""
    intent = _read(shard, INTENT_ID)
    if intent is not None:
        _finish(shard, intent["staged"], intent["stale"])
    request = engine.ScrollRequest(filter=Filter(must=[_is("kind", "staged")]), limit=100_000, with_payload=False)
    left, _ = shard.scroll(request)
    shard.update(UpdateOperation.delete_points([point.id for point in left]))


def _finish(shard: EdgeShard, staged: Sequence[str], stale: Sequence[str]) -> None:
    """Publish the staged chunks of a new version and remove those of the old one; done twice, it does the same.

    By id, not by a filter: after a kill the engine repeats operations on an index that may be ahead of them, so a
    filter would miss points that it met the first time.
    """
    if staged:
        shard.update(UpdateOperation.set_payload([*staged], {"kind": "chunk"}))
    shard.update(UpdateOperation.delete_points([*stale, INTENT_ID]))


def _record(shard: EdgeShard, document_id: str) -> Payload | None:
    return _read(shard, record_id(document_id))


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
            raise ConfigurationError(
                f"The folder {path} is open in another process, and the embedded store has exactly one owner: "
                "stop the other process, or run a Qdrant server and set store.kind to server."
            ) from error
        raise ConfigurationError(f"The embedded store cannot open {path}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]


def _sync_folder(folder: Path) -> None:
    """Make a rename survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _explained_files(folder: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError(f"The collections in {folder} cannot be read or changed ({error}).") from error
