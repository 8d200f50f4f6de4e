"""The store on a Qdrant server, for a collection that several processes share; `:memory:` is for tests.

Same points, filters and fusion as the embedded store. One request makes a new version valid and removes the older
one; a search that falls in between keeps the newer.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict
from typing import Any

from qdrant_client import AsyncQdrantClient, models
from qdrant_client.common.client_exceptions import QdrantException, ResourceExhaustedResponse
from qdrant_client.http.exceptions import ApiException, ResponseHandlingException, UnexpectedResponse

from app.domain import Document, EncodedChunk, Filters, Passage, StoredDocument
from app.errors import ConfigurationError, RetrieverUnavailable
from app.store import Aliases, Manifest, Stamp, Store
from app.store.payload import (
    DENSE,
    KEYWORD_FIELDS,
    MANIFEST_ID,
    MAX_FIELDS,
    RANK_CONSTANT,
    SPARSE,
    Payload,
    Point,
    best_passages,
    chunk_points,
    client_name,
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

IN_MEMORY = ":memory:"
OLDEST_VERSION = (1, 17)
"""An older server ignores the weights of the fusion."""
TIMEOUT_S = 30
RETRY_AFTER_S = 5

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
    return ServerStore(client, collection, is_client_shared=is_client_shared)


async def open_server_database(*, url: str, api_key: str | None) -> "ServerDatabase":
    """Connect to the server at `url`. Raises `ConfigurationError`."""
    return ServerDatabase(await connect(url, api_key), url)


class ServerStore:
    """One collection on a server; see `Store`."""

    def __init__(self, client: AsyncQdrantClient, collection: str, *, is_client_shared: bool = False) -> None:
        self._client = client
        self._collection = collection
        self._is_client_shared = is_client_shared
        self._writing = asyncio.Lock()

    async def put(self, document: Document, chunks: Sequence[EncodedChunk]) -> None:
        """Write a document with all its chunks; an older version under the same id is gone afterwards."""
        early, last = split(chunks)
        async with self._writing, _translated():
            revision = next_revision(await self._record(document.id))
            for piece in early:
                staged = chunk_points(document, piece, revision, staged=True)
                await self._client.upsert(self._collection, _structs(staged))
            points = [record_point(document, len(chunks), revision), *chunk_points(document, last, revision)]
            await self._client.batch_update_points(
                self._collection,
                [
                    models.UpsertOperation(upsert=models.PointsList(points=_structs(points))),
                    *_publishing(document.id, revision),
                ],
            )

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
        matching = models.Filter(must=[_is("kind", "chunk"), *(_any_of("terms", terms) for terms in terms_of(filters))])
        queries: list[tuple[float, str, list[float] | models.SparseVector]] = []
        if weights[0] > 0:
            queries.append((weights[0], DENSE, list(dense)))
        if weights[1] > 0 and sparse:
            queries.append((weights[1], SPARSE, _sparse_vector(sparse)))
        if not queries:
            return []
        prefetch = [
            models.Prefetch(query=vector, using=name, filter=matching, limit=num_candidates)
            for _, name, vector in queries
        ]
        fusion = models.Rrf(k=RANK_CONSTANT, weights=[weight for weight, _, _ in queries])
        async with _translated():
            found = await self._client.query_points(
                self._collection, prefetch=prefetch, query=models.RrfQuery(rrf=fusion), limit=num_hits(limit)
            )
        return best_passages([(point.payload or {}, point.score) for point in found.points], limit)

    async def documents(self, *, after: str | None = None, limit: int = 100) -> list[StoredDocument]:
        """Give a page of documents, in the order of their record ids."""
        # The page starts at the id `after`, which may be deleted by now: one more is read and that one left out.
        start = record_id(after) if after is not None else None
        async with _translated():
            records, _ = await self._client.scroll(
                self._collection,
                scroll_filter=models.Filter(must=[_is("kind", "document")]),
                offset=start,
                limit=limit + 1,
                with_payload=models.PayloadSelectorExclude(exclude=["text"]),
            )
        return [stored_document(record.payload or {}) for record in records if record.id != start][:limit]

    async def document(self, document_id: str) -> tuple[StoredDocument, str] | None:
        """Give one document and its whole text, or None."""
        async with _translated():
            record = await self._record(document_id)
        return (stored_document(record), record["text"]) if record else None

    async def delete(self, document_id: str) -> bool:
        """Remove a document and all its chunks in one operation; False when there was none."""
        async with self._writing, _translated():
            if await self._record(document_id) is None:
                return False
            everything = models.Filter(must=[_is("document_id", document_id)])
            await self._client.delete(self._collection, models.FilterSelector(filter=everything))
            return True

    async def counts(self) -> tuple[int, int]:
        """Count documents and chunks."""
        async with _translated():
            return await self._count("document"), await self._count("chunk")

    async def filter_fields(self) -> tuple[str, ...]:
        """List the metadata fields of all documents, sorted."""
        async with _translated():
            found = await self._client.facet(self._collection, "fields", limit=MAX_FIELDS, exact=True)
        return tuple(sorted(str(hit.value) for hit in found.hits if hit.count))

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

    async def _record(self, document_id: str) -> Payload | None:
        found = await self._client.retrieve(self._collection, [record_id(document_id)])
        return found[0].payload if found else None

    async def _count(self, kind: str) -> int:
        matching = models.Filter(must=[_is("kind", kind)])
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
    for field in KEYWORD_FIELDS:
        await client.create_payload_index(collection, field, models.PayloadSchemaType.KEYWORD)
    await client.create_payload_index(collection, "revision", models.PayloadSchemaType.INTEGER)


async def _stamp_new(client: AsyncQdrantClient, collection: str, manifest: Manifest) -> None:
    """Stamp a collection that holds nothing. Others may open it now: the first one's stamp stays."""
    stored = await client.retrieve(collection, [MANIFEST_ID])
    if not stored and (await client.count(collection, exact=True)).count == 0:
        stamp = _structs([stamp_point(Stamp(manifest))])
        await client.upsert(collection, stamp, update_mode=models.UpdateMode.INSERT_ONLY)


def _publishing(document_id: str, revision: int) -> list[models.UpdateOperation]:
    """Make a version's staged chunks findable and remove all that is older."""
    of_document = _is("document_id", document_id)
    this_write = models.Range(gte=revision, lte=revision)
    staged = [of_document, _is("kind", "staged"), models.FieldCondition(key="revision", range=this_write)]
    older = [of_document, models.FieldCondition(key="revision", range=models.Range(lt=revision))]
    return [
        models.SetPayloadOperation(
            set_payload=models.SetPayload(payload={"kind": "chunk"}, filter=models.Filter(must=staged))
        ),
        models.DeleteOperation(delete=models.FilterSelector(filter=models.Filter(must=older))),
    ]


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
