"""The store on a Qdrant server, for a collection that several processes share; `:memory:` is for tests.

Same points, filters and fusion as the embedded store. A write first stages its chunks, which no search finds. Then it
puts its record in the place of the one it has read, if that is still there: of several processes that write the same
document one after the other succeeds, each on top of the one before. What then remains, to publish the new chunks and
to remove those of the replaced write, is one request. The record says that it is pending until this is done, and
whoever meets it meanwhile completes it: to do it twice is to do it once. So a kill leaves nothing half done.
"""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict
from typing import Any

from qdrant_client import AsyncQdrantClient, models
from qdrant_client.common.client_exceptions import QdrantException, ResourceExhaustedResponse
from qdrant_client.http.exceptions import ApiException, ResponseHandlingException, UnexpectedResponse

from app.domain import Chunk, Document, Filters, Passage, Scalar, StoredDocument
from app.errors import ConfigurationError, RetrieverUnavailable, WriteConflict
from app.store import NO_FILTERS, Aliases, Chunks, Located, Manifest, Stamp, Store, Vectors
from app.store.payload import (
    DENSE,
    KEYWORD_FIELDS,
    MANIFEST_ID,
    MAX_FIELDS,
    MAX_VALUES,
    SPARSE,
    Hits,
    Payload,
    Point,
    best_passages,
    chunk_ids,
    chunk_points,
    chunks_of_points,
    client_name,
    counts_by_field,
    current_writes,
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

IN_MEMORY = ":memory:"
OLDEST_VERSION = (1, 17)
"""An older server ignores `update_mode`, by which one of many processes stamps a new collection."""
TIMEOUT_S = 30
RETRY_AFTER_S = 5
MAX_TRIES = 100
"""Of a write that others get ahead of each time: as many may write the same document at once."""
STAGED_LIFETIME_S = 24 * 3600
"""What a process that was killed has staged is removed after this, when the collection is next opened."""
QUERIES_PER_REQUEST = 64
PAGE_SIZE = 1_000

# Too many requests are no `ApiException`, and a page that is no JSON comes as the parser's own error.
_CLIENT_ERRORS = (ApiException, QdrantException, json.JSONDecodeError)


async def open_server_store(
    *, url: str, api_key: str | None, collection: str, dimension: int, manifest: Manifest
) -> "ServerStore":
    """Open a collection on the server at `url`, or create it there."""
    client = await connect(url, api_key)
    try:
        return await open_on_server(client, url, collection, dimension=dimension, manifest=manifest)
    except BaseException:
        await client.close()
        raise


async def connect(url: str, api_key: str | None) -> AsyncQdrantClient:
    """Connect to the server at `url`. Raises `ConfigurationError`."""
    # The client's own version check would block the event loop.
    client = AsyncQdrantClient(location=url, api_key=api_key, timeout=TIMEOUT_S, check_compatibility=False)
    try:
        with _explained(url):
            await _check_version(client, url)
    except BaseException:
        await client.close()
        raise
    return client


async def open_on_server(
    client: AsyncQdrantClient,
    url: str,
    collection: str,
    *,
    dimension: int,
    manifest: Manifest,
    is_client_shared: bool = False,
) -> "ServerStore":
    """Open a collection, or create it, stamped with the manifest. A shared client stays open when it is closed."""
    with _explained(url):
        if not await client.collection_exists(collection):
            await _create(client, collection, dimension)
        if url != IN_MEMORY:
            await _index_payload(client, collection)
        await _stamp_new(client, collection, manifest)
        store = ServerStore(client, collection, is_client_shared=is_client_shared)
        await store.finish_writes()
    return store


async def open_server_database(*, url: str, api_key: str | None) -> "ServerDatabase":
    """Connect to the server at `url`. Raises `ConfigurationError`."""
    return ServerDatabase(await connect(url, api_key), url)


class ServerStore:
    """One collection on a server; see `Store`."""

    def __init__(self, client: AsyncQdrantClient, collection: str, *, is_client_shared: bool = False) -> None:
        self._client = client
        self._collection = collection
        self._is_client_shared = is_client_shared

    async def put(self, document: Document, chunks: Chunks) -> None:
        """Write a document with all its chunks; an older version under the same id is gone afterwards."""
        token = new_token()
        num_chunks = 0
        try:
            async for piece in pieces(chunks):
                async with _translated():
                    await self._client.upsert(self._collection, _structs(chunk_points(document, piece, token)))
                num_chunks += len(piece)
        except BaseException:
            with suppress(*_CLIENT_ERRORS):
                await self._drop(document.id, token)
            raise
        async with _translated():
            # A caller that leaves does not leave it half done.
            await asyncio.shield(self._commit(document, token, num_chunks))

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
        """Fuse the dense and the sparse list, which are asked for in one request."""
        matching = _matching("chunk", filters)
        queries = [(DENSE, list(dense), weights[0]), (SPARSE, _sparse_vector(sparse), weights[1] if sparse else 0.0)]
        requests = [
            models.QueryRequest(query=vector, using=name, filter=matching, limit=num_candidates, with_payload=True)
            for name, vector, weight in queries
            if weight > 0
        ]
        async with _translated():
            responses = await self._client.query_batch_points(self._collection, requests) if requests else []
        answers = iter(responses)
        found = [_hits(next(answers)) if weight > 0 else [] for _, _, weight in queries]
        return best_passages(*found, weights=weights, num_candidates=num_candidates, limit=limit)

    async def documents(
        self, *, after: str | None = None, limit: int = 100, filters: Filters = NO_FILTERS
    ) -> list[StoredDocument]:
        """Give a page of documents, in the order of their record ids."""
        # The page starts at the id `after`, which may be deleted by now: one more is read and that one left out.
        start = record_id(after) if after is not None else None
        async with _translated():
            records, _ = await self._client.scroll(
                self._collection,
                scroll_filter=_matching("document", filters),
                offset=start,
                limit=limit + 1,
                with_payload=models.PayloadSelectorExclude(exclude=["text"]),
            )
        return [stored_document(record.payload or {}) for record in records if record.id != start][:limit]

    async def num_documents(self, filters: Filters) -> int:
        """Count the documents that match."""
        async with _translated():
            return await self._count("document", filters)

    async def document(self, document_id: str) -> tuple[StoredDocument, str] | None:
        """Give one document and its whole text, or None."""
        async with _translated():
            record = await self._settled_record(document_id, with_text=True)
        return (stored_document(record), record["text"]) if record else None

    async def chunks(self, document_id: str, *, version: int, only: int | None = None) -> list[Chunk] | None:
        """Give the chunks of a version of a document, a page at a time."""
        async with _translated():
            record = await self._settled_record(document_id)
            if record is None or stored_document(record).version != version:
                return None
            ids = chunk_ids(record, only)
            found: list[models.Record] = []
            for start in range(0, len(ids), PAGE_SIZE):
                found += await self._client.retrieve(self._collection, ids[start : start + PAGE_SIZE])
        return chunks_of_points((point.payload or {} for point in found), num_expected=len(ids))

    async def locate(self, document_id: str) -> Located | None:
        """Say what a deletion has to remove, or None."""
        async with _translated():
            record = await self._settled_record(document_id)
            if record is None:
                return None
            ids = sampled_ids(record)
            chunks = await self._client.retrieve(self._collection, ids, with_payload=False, with_vectors=True)
        return Located(stored_document(record), record["write"], [_vectors_of(chunk) for chunk in chunks])

    async def remove(self, document_id: str, writes: Collection[str]) -> None:
        """Remove the record and the chunks of these writes of a document, in one operation."""
        of_writes = models.Filter(must=[_is("document_id", document_id), _any_of("write", list(writes))])
        async with _translated():
            await self._client.delete(self._collection, models.FilterSelector(filter=of_writes))

    async def find_leftovers(self, document_id: str, vectors: Sequence[Vectors]) -> Mapping[str, set[str]]:
        """Look for chunks of a document that should be gone, by its id and by the vectors that they had."""
        async with _translated():
            current = current_writes(await self._record(document_id))
            of_document = _chunks_of(document_id, current)
            points, _ = await self._client.scroll(
                self._collection, scroll_filter=of_document, limit=PAGE_SIZE, with_payload=["write"]
            )
            found = {
                "filter": _writes(points),
                DENSE: await self._query_writes(DENSE, [list(dense) for dense, _ in vectors], of_document),
                SPARSE: await self._query_writes(
                    SPARSE, [_sparse_vector(terms) for _, terms in vectors if terms], of_document
                ),
            }
            current |= current_writes(await self._record(document_id))
        return {check: writes - current for check, writes in found.items()}

    async def counts(self) -> tuple[int, int]:
        """Count documents and chunks."""
        async with _translated():
            return await self._count("document"), await self._count("chunk")

    async def filter_fields(self) -> tuple[str, ...]:
        """List the metadata fields of all documents, sorted."""
        async with _translated():
            found = await self._client.facet(self._collection, "fields", limit=MAX_FIELDS, exact=True)
        return tuple(sorted(str(hit.value) for hit in found.hits if hit.count))

    async def metadata_values(self) -> Mapping[str, list[Scalar]]:
        """List the metadata values of all chunks by field."""
        of_chunks = models.Filter(must=[_is("kind", "chunk")])
        async with _translated():
            found = await self._client.facet(self._collection, "terms", facet_filter=of_chunks, limit=MAX_VALUES)
        return values_by_field(str(hit.value) for hit in found.hits if hit.count)

    async def value_counts(self) -> Mapping[str, list[tuple[Scalar, int]]]:
        """Count the documents of each metadata value by field."""
        of_documents = models.Filter(must=[_is("kind", "document")])
        async with _translated():
            found = await self._client.facet(self._collection, "terms", facet_filter=of_documents, limit=MAX_VALUES)
        return counts_by_field((str(hit.value), hit.count) for hit in found.hits if hit.count)

    async def stamp(self) -> Stamp:
        """Tell what the collection was written with."""
        async with _translated():
            found = await self._client.retrieve(self._collection, [MANIFEST_ID])
        return stamp_of(found[0].payload if found else None)

    async def set_stamp(self, stamp: Stamp) -> None:
        """Say anew what the collection was written with."""
        async with _translated():
            await self._client.upsert(self._collection, _structs([stamp_point(stamp)]))

    async def close(self) -> None:
        """Close the connections."""
        if not self._is_client_shared:
            await self._client.close()

    async def finish_writes(self) -> None:
        """Complete the writes that a kill cut short, and remove what was staged long ago and never committed."""
        pending = models.Filter(must=[_is("state", "pending")])
        while records := (await self._client.scroll(self._collection, scroll_filter=pending, limit=PAGE_SIZE))[0]:
            for record in records:
                await self._settle(record.payload or {})
        long_ago = models.Range(lt=time.time() - STAGED_LIFETIME_S)
        forgotten = [_is("kind", "staged"), models.FieldCondition(key="staged_at", range=long_ago)]
        await self._client.delete(self._collection, models.FilterSelector(filter=models.Filter(must=forgotten)))

    async def _commit(self, document: Document, token: str, num_chunks: int) -> None:
        """Put the record in the place of the one that stands there now, and do what it then asks for."""
        for _ in range(MAX_TRIES):
            previous = await self._settled_record(document.id)
            record = record_point(document, num_chunks, next_write(token, previous))
            record.payload["replaces"] = previous["write"] if previous else ""
            record.payload["state"] = "pending"
            await self._place(record, previous)
            stored = await self._record(document.id)
            if stored is not None and stored["write"] == token:
                await self._settle(stored)
                return
            # Others were faster, or they have already completed this write and replaced or deleted it.
            if await self._count_staged(document.id, token) < num_chunks:
                return
        await self._drop(document.id, token)
        raise WriteConflict(f"Others write the document {document.id!r} at the same time; send it again.")

    async def _place(self, record: Point, previous: Payload | None) -> None:
        """Write a record if `previous` is still what stands there."""
        if previous is None:
            await self._client.upsert(self._collection, _structs([record]), update_mode=models.UpdateMode.INSERT_ONLY)
            return
        unchanged = [models.HasIdCondition(has_id=[record.id]), _is("write", previous["write"])]
        await self._client.overwrite_payload(self._collection, record.payload, models.Filter(must=unchanged))

    async def _settle(self, record: Payload) -> None:
        """Complete a write: publish its chunks and remove those of the write that it replaces.

        Filters name writes, so that one who comes late, when the next write is done already, meets nothing.
        """
        document_id, token = record["document_id"], record["write"]
        of_document, of_write = _is("document_id", document_id), _is("write", token)
        staged = models.Filter(must=[of_document, of_write, _is("kind", "staged")])
        replaced = models.Filter(must=[of_document, _is("write", record["replaces"]), _is("kind", "chunk")])
        own_record = models.Filter(must=[of_document, of_write, _is("kind", "document")])
        await self._client.batch_update_points(
            self._collection,
            [
                _set_payload(published(record["revision"]), staged),
                models.DeleteOperation(delete=models.FilterSelector(filter=replaced)),
                _set_payload({"state": "done"}, own_record),
            ],
        )

    async def _settled_record(self, document_id: str, *, with_text: bool = False) -> Payload | None:
        """Read a record, and complete its write if that is still pending."""
        record = await self._record(document_id, with_text=with_text)
        if record is not None and record["state"] == "pending":
            await self._settle(record)
        return record

    async def _record(self, document_id: str, *, with_text: bool = False) -> Payload | None:
        selected = True if with_text else models.PayloadSelectorExclude(exclude=["text"])
        found = await self._client.retrieve(self._collection, [record_id(document_id)], with_payload=selected)
        return found[0].payload if found else None

    async def _drop(self, document_id: str, token: str) -> None:
        staged = models.Filter(must=_staged(document_id, token))
        await self._client.delete(self._collection, models.FilterSelector(filter=staged))

    async def _count_staged(self, document_id: str, token: str) -> int:
        staged = models.Filter(must=_staged(document_id, token))
        return (await self._client.count(self._collection, count_filter=staged, exact=True)).count

    async def _query_writes(
        self, name: str, queries: Sequence[list[float] | models.SparseVector], matching: models.Filter
    ) -> set[str]:
        requests = [
            models.QueryRequest(query=query, using=name, filter=matching, limit=1, with_payload=["write"])
            for query in queries
        ]
        writes: set[str] = set()
        for start in range(0, len(requests), QUERIES_PER_REQUEST):
            some = requests[start : start + QUERIES_PER_REQUEST]
            for answer in await self._client.query_batch_points(self._collection, some):
                writes |= _writes(answer.points)
        return writes

    async def _count(self, kind: str, filters: Filters = NO_FILTERS) -> int:
        matching = _matching(kind, filters)
        return (await self._client.count(self._collection, count_filter=matching, exact=True)).count


class ServerDatabase:
    """All collections of one server; see `Database`.

    The server has aliases of its own: `notes.live`, `notes.candidate`, `notes.previous`.
    """

    def __init__(self, client: AsyncQdrantClient, url: str) -> None:
        self._client = client
        self._url = url
        self.is_shared = url != IN_MEMORY

    async def names(self) -> list[str]:
        """List the names that clients use: others may keep collections on the same server, without our stamp."""
        async with _translated():
            names = []
            for name in sorted({*filter(None, map(client_name, await self._stored()))}):
                aliases = await self._aliases(name)
                if aliases and await self._client.retrieve(aliases.live, [MANIFEST_ID], with_payload=False):
                    names.append(name)
            return names

    async def aliases(self, name: str) -> Aliases | None:
        """Ask for the aliases of a name; without them, its collection is stored under it."""
        async with _translated():
            return await self._aliases(name)

    async def set_aliases(self, name: str, aliases: Aliases) -> None:
        """Point all three aliases anew, which the server does in one step."""
        async with _translated():
            operations: list[models.AliasOperations] = [
                models.DeleteAliasOperation(delete_alias=models.DeleteAlias(alias_name=f"{name}.{role}"))
                for role in await self._roles(name)
            ]
            operations += [
                models.CreateAliasOperation(
                    create_alias=models.CreateAlias(collection_name=stored, alias_name=f"{name}.{role}")
                )
                for role, stored in asdict(aliases).items()
                if stored is not None
            ]
            await self._client.update_collection_aliases(operations)

    async def open(self, stored: str, *, dimension: int, manifest: Manifest) -> Store:
        """Open a collection, or create it."""
        return await open_on_server(
            self._client, self._url, stored, dimension=dimension, manifest=manifest, is_client_shared=True
        )

    async def drop(self, name: str, *, keep: Aliases | None = None) -> None:
        """Delete the collections of a name; their aliases go with them."""
        kept = keep.stored() if keep else set()
        async with _translated():
            for stored in await self._stored():
                if client_name(stored) == name and stored not in kept:
                    await self._client.delete_collection(stored)

    async def close(self) -> None:
        """Close the connections, which the stores share."""
        await self._client.close()

    async def _stored(self) -> list[str]:
        return [one.name for one in (await self._client.get_collections()).collections]

    async def _aliases(self, name: str) -> Aliases | None:
        roles = await self._roles(name)
        if "live" in roles:
            return Aliases(**roles)
        return Aliases(name) if await self._client.collection_exists(name) else None

    async def _roles(self, name: str) -> dict[str, str]:
        """Give the stored collection behind each alias of a name."""
        found = (await self._client.get_aliases()).aliases
        return {
            one.alias_name.partition(".")[2]: one.collection_name
            for one in found
            if one.alias_name.partition(".")[0] == name
        }


async def _check_version(client: AsyncQdrantClient, url: str) -> None:
    version = (await client.info()).version
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < OLDEST_VERSION:
        needed = ".".join(map(str, OLDEST_VERSION))
        raise ConfigurationError(f"store.url: the Qdrant server at {url} is {version}; Cleave needs {needed} or newer.")


async def _create(client: AsyncQdrantClient, collection: str, dimension: int) -> None:
    try:
        await client.create_collection(
            collection,
            vectors_config={DENSE: models.VectorParams(size=dimension, distance=models.Distance.COSINE)},
            sparse_vectors_config={SPARSE: models.SparseVectorParams(modifier=models.Modifier.IDF)},
        )
    except UnexpectedResponse as error:
        # Conflict: another process has created it since we looked.
        if error.status_code != 409:
            raise


async def _index_payload(client: AsyncQdrantClient, collection: str) -> None:
    """Index the fields that filters name; one that is indexed stays as it is."""
    for field in (*KEYWORD_FIELDS, "state"):
        await client.create_payload_index(collection, field, models.PayloadSchemaType.KEYWORD)


async def _stamp_new(client: AsyncQdrantClient, collection: str, manifest: Manifest) -> None:
    """Stamp a collection that holds nothing. Others may open it now: the first one's stamp stays."""
    stored = await client.retrieve(collection, [MANIFEST_ID])
    if not stored and (await client.count(collection, exact=True)).count == 0:
        stamp = _structs([stamp_point(Stamp(manifest))])
        await client.upsert(collection, stamp, update_mode=models.UpdateMode.INSERT_ONLY)


def _set_payload(payload: Payload, matching: models.Filter) -> models.SetPayloadOperation:
    return models.SetPayloadOperation(set_payload=models.SetPayload(payload=payload, filter=matching))


def _staged(document_id: str, token: str) -> list[models.Condition]:
    return [_is("document_id", document_id), _is("write", token), _is("kind", "staged")]


def _chunks_of(document_id: str, current: Collection[str]) -> models.Filter:
    """Match the chunks of a document but those of its current writes."""
    must_not: list[models.Condition] = [_any_of("write", list(current))] if current else []
    return models.Filter(must=[_is("kind", "chunk"), _is("document_id", document_id)], must_not=must_not)


def _writes(points: Iterable[models.Record | models.ScoredPoint]) -> set[str]:
    return {(point.payload or {})["write"] for point in points}


def _vectors_of(chunk: models.Record) -> Vectors:
    vectors: Any = chunk.vector or {}
    sparse = vectors.get(SPARSE)
    return vectors[DENSE], dict(zip(sparse.indices, sparse.values, strict=True)) if sparse else {}


def _structs(points: Iterable[Point]) -> list[models.PointStruct]:
    return [models.PointStruct(id=point.id, vector=_vectors(point), payload=point.payload) for point in points]


def _vectors(point: Point) -> dict[str, Any]:
    vectors: dict[str, Any] = {}
    if point.dense is not None:
        vectors[DENSE] = list(point.dense)
    if point.sparse:
        vectors[SPARSE] = _sparse_vector(point.sparse)
    return vectors


def _sparse_vector(weights: Mapping[int, float]) -> models.SparseVector:
    return models.SparseVector(indices=list(weights), values=list(weights.values()))


def _hits(response: models.QueryResponse) -> Hits:
    return [(point.payload or {}, point.score) for point in response.points]


def _matching(kind: str, filters: Filters) -> models.Filter:
    return models.Filter(must=[_is("kind", kind), *(_any_of("terms", terms) for terms in terms_of(filters))])


def _is(field: str, value: str) -> models.FieldCondition:
    return models.FieldCondition(key=field, match=models.MatchValue(value=value))


def _any_of(field: str, values: list[str]) -> models.FieldCondition:
    return models.FieldCondition(key=field, match=models.MatchAny(any=values))


@contextmanager
def _explained(url: str) -> Iterator[None]:
    """Turn what the client raises at the start into one line that says what to change."""
    try:
        yield
    except _CLIENT_ERRORS as error:
        raise ConfigurationError(_unusable(url, error)) from error


def _unusable(url: str, error: Exception) -> str:
    if isinstance(error, UnexpectedResponse) and error.status_code in (401, 403):
        return f"store.url: the Qdrant server at {url} refuses the key; set store.api_key or QDRANT_API_KEY."
    return f"store.url: no Qdrant server answers at {url} ({_one_line(error)}); start one, or change store.url."


def _one_line(error: Exception) -> str:
    # Of a timeout there is nothing but its name, under the client's own error.
    cause = error.source if isinstance(error, ResponseHandlingException) else error
    return " ".join(str(cause).split()) or type(cause).__name__


@asynccontextmanager
async def _translated() -> AsyncIterator[None]:
    """Turn what the client raises while the service runs into `RetrieverUnavailable`."""
    try:
        yield
    except _CLIENT_ERRORS as error:
        has_answered = isinstance(error, UnexpectedResponse | ResourceExhaustedResponse)
        raise RetrieverUnavailable(
            f"The Qdrant server {'answers with an error' if has_answered else 'does not answer'}: {_one_line(error)}",
            retry_after_s=error.retry_after_s if isinstance(error, ResourceExhaustedResponse) else RETRY_AFTER_S,
        ) from error
