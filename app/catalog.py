"""The documents in this process: its collections, opened when they are first asked for."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from app.collection import POLL_S, Collection, IndexBuilder, to_the_end
from app.domain import (
    Chunk,
    CollectionInfo,
    DeletionReceipt,
    Document,
    Facet,
    Filters,
    IngestReceipt,
    ReindexStatus,
    RetrieverInfo,
    SearchQuery,
    SearchResult,
    StoredDocument,
)
from app.errors import CollectionNotFound, InvalidRequest
from app.retrieval import Index
from app.settings import IndexSettings
from app.store import NO_FILTERS, Database
from app.telemetry import logger


class LocalRetriever:
    """A `Retriever` in this process: the collections of one database. `open` makes one."""

    def __init__(self, database: Database, builder: IndexBuilder, settings: IndexSettings, default: str) -> None:
        self._database = database
        self._builder = builder
        self._settings = settings
        self._default = default
        self._collections: dict[str, Collection] = {}
        self._opening = asyncio.Lock()
        self._watch = asyncio.create_task(self._follow()) if database.is_shared else None

    @classmethod
    async def open(
        cls, database: Database, builder: IndexBuilder, settings: IndexSettings, default: str
    ) -> "LocalRetriever":
        """Open the default collection, or create it. Raises `ConfigurationError`."""
        retriever = cls(database, builder, settings, default)
        try:
            await retriever._collection(default, create=True)
        except BaseException:
            await retriever.close()
            raise
        return retriever

    async def search(self, query: SearchQuery) -> SearchResult:
        """See `Retriever.search`."""
        collection = await self._collection(query.collection)
        async with collection.reading(query.index) as index:
            return await index.search(query)

    async def ingest(self, documents: Sequence[Document], *, collection: str | None = None) -> list[IngestReceipt]:
        """See `Retriever.ingest`."""
        async with self._writing(collection, create=True) as index:
            return await index.ingest(documents)

    async def documents(
        self,
        *,
        after: str | None = None,
        limit: int = 100,
        filters: Filters = NO_FILTERS,
        collection: str | None = None,
    ) -> list[StoredDocument]:
        """See `Retriever.documents`."""
        async with self._reading(collection) as index:
            return await index.documents(after=after, limit=limit, filters=filters)

    async def num_documents(self, filters: Filters, *, collection: str | None = None) -> int:
        """See `Retriever.num_documents`."""
        async with self._reading(collection) as index:
            return await index.num_documents(filters)

    async def document(self, document_id: str, *, collection: str | None = None) -> tuple[StoredDocument, str]:
        """See `Retriever.document`."""
        async with self._reading(collection) as index:
            return await index.document(document_id)

    async def chunks(
        self, document_id: str, *, version: int, only: int | None = None, collection: str | None = None
    ) -> list[Chunk] | None:
        """See `Retriever.chunks`."""
        async with self._reading(collection) as index:
            return await index.chunks(document_id, version=version, only=only)

    async def delete(self, document_id: str, *, collection: str | None = None) -> DeletionReceipt:
        """See `Retriever.delete`."""
        async with self._writing(collection) as index:
            return await index.delete(document_id)

    async def info(self, *, collection: str | None = None) -> RetrieverInfo:
        """See `Retriever.info`."""
        async with self._reading(collection) as index:
            return await index.info()

    async def facets(self, *, limit: int, collection: str | None = None) -> list[Facet]:
        """See `Retriever.facets`."""
        async with self._reading(collection) as index:
            return await index.facets(limit=limit)

    async def collections(self) -> list[CollectionInfo]:
        """See `Retriever.collections`."""
        found = [await self._collection(name) for name in await self._database.names()]
        return [await one.info() for one in found]

    async def drop_collection(self, name: str) -> None:
        """See `Retriever.drop_collection`."""
        if name == self._default:
            raise InvalidRequest(
                f"The collection {name!r} is the service's own (store.collection) and stays; delete its documents.",
                param="name",
            )
        await self._collection(name)
        await to_the_end(self._drop(name))

    async def reindex(self, settings: IndexSettings, *, collection: str | None = None) -> ReindexStatus:
        """See `Retriever.reindex`."""
        return await to_the_end((await self._collection(collection)).reindex(settings))

    async def reindex_status(self, *, collection: str | None = None) -> ReindexStatus:
        """See `Retriever.reindex_status`."""
        return await to_the_end((await self._collection(collection)).status())

    async def swap_index(self, *, collection: str | None = None) -> ReindexStatus:
        """See `Retriever.swap_index`."""
        return await to_the_end((await self._collection(collection)).swap())

    async def rollback_index(self, *, collection: str | None = None) -> ReindexStatus:
        """See `Retriever.rollback_index`."""
        return await to_the_end((await self._collection(collection)).rollback())

    async def discard_index(self, *, collection: str | None = None) -> ReindexStatus:
        """See `Retriever.discard_index`."""
        return await to_the_end((await self._collection(collection)).discard())

    async def close(self) -> None:
        """See `Retriever.close`."""
        if self._watch:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        for collection in self._collections.values():
            await collection.close()
        await self._database.close()

    @asynccontextmanager
    async def _reading(self, name: str | None) -> AsyncIterator[Index]:
        collection = await self._collection(name)
        async with collection.reading() as index:
            yield index

    @asynccontextmanager
    async def _writing(self, name: str | None, *, create: bool = False) -> AsyncIterator[Index]:
        collection = await self._collection(name, create=create)
        async with collection.writing() as index:
            yield index

    async def _collection(self, name: str | None, *, create: bool = False) -> Collection:
        name = name or self._default
        found = self._collections.get(name)
        return found if found is not None else await to_the_end(self._open(name, create=create))

    async def _open(self, name: str, *, create: bool) -> Collection:
        async with self._opening:
            if name not in self._collections:
                self._collections[name] = await Collection.open(
                    name,
                    self._database,
                    self._builder,
                    self._settings,
                    is_default=name == self._default,
                    create=create,
                )
            return self._collections[name]

    async def _drop(self, name: str) -> None:
        async with self._opening:
            collection = self._collections.pop(name, None)
            if collection is not None:
                await collection.close()
                await self._database.drop(name)

    async def _follow(self) -> None:
        """Take over what other processes put behind the names."""
        while True:
            await asyncio.sleep(POLL_S)
            for name, collection in list(self._collections.items()):
                try:
                    await collection.refresh()
                except CollectionNotFound:
                    self._collections.pop(name, None)
                    await collection.close()
                except Exception:
                    # Whatever it was, the next look may succeed, and nobody else would take over a swap.
                    logger.warning("a collection cannot be looked up", extra={"collection": name}, exc_info=True)
