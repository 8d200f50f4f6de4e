"""Routes: the collections of the service, and the rebuilding of their indexes."""

from dataclasses import asdict
from typing import Any

from fastapi import APIRouter

from app.api.bodies import Collection, DeletedCollection, Listed, Reindexing
from app.api.json_bodies import JSONRoute
from app.api.schemas import CollectionName, InCollection
from app.domain import ReindexStatus
from app.errors import ConfigurationError, InvalidRequest
from app.services import Services
from app.settings import IndexSettings


def collections_router(services: Services) -> APIRouter:
    """Build the routes over the given parts."""
    router = APIRouter(tags=["collections"], route_class=JSONRoute)
    retriever = services.retriever

    @router.get("/v1/collections", responses={200: {"model": Listed[Collection]}})
    async def list_collections() -> dict[str, Any]:
        """List the collections. A new one is made by adding documents to it."""
        found = await retriever.collections()
        return {"object": "list", "data": [{"object": "collection", **asdict(one)} for one in found]}

    @router.delete("/v1/collections/{name}", responses={200: {"model": DeletedCollection}})
    async def delete_collection(name: CollectionName) -> dict[str, Any]:
        """Remove a collection with all its documents; the configured one stays."""
        await retriever.drop_collection(name)
        return {"object": "collection.deleted", "name": name, "deleted": True}

    @router.get("/v1/reindex", responses={200: {"model": Reindexing}})
    async def read_reindex(collection: InCollection = None) -> dict[str, Any]:
        """Say how far the new index is, if one is being built."""
        return _reindex(await retriever.reindex_status(collection=collection))

    @router.post("/v1/reindex", status_code=202, responses={202: {"model": Reindexing}})
    async def start_reindex(body: IndexSettings, collection: InCollection = None) -> dict[str, Any]:
        """Start building a new index from the stored documents, or go on with it; `live` stays as it is."""
        try:
            return _reindex(await retriever.reindex(body, collection=collection))
        except ConfigurationError as error:
            # These settings are not the service's own: whoever sent them can send others.
            raise InvalidRequest(error.message) from None

    @router.post("/v1/reindex/swap", responses={200: {"model": Reindexing}})
    async def swap_index(collection: InCollection = None) -> dict[str, Any]:
        """Put the new index in the place of the live one; no request fails or sees both."""
        return _reindex(await retriever.swap_index(collection=collection))

    @router.post("/v1/reindex/rollback", responses={200: {"model": Reindexing}})
    async def rollback_index(collection: InCollection = None) -> dict[str, Any]:
        """Go back to the index before, with what was written since."""
        return _reindex(await retriever.rollback_index(collection=collection))

    @router.delete("/v1/reindex", responses={200: {"model": Reindexing}})
    async def discard_index(collection: InCollection = None) -> dict[str, Any]:
        """Remove the new index and the one before, and keep the live one."""
        return _reindex(await retriever.discard_index(collection=collection))

    return router


def _reindex(status: ReindexStatus) -> dict[str, Any]:
    return {"object": "reindex", **asdict(status)}
