"""Route: what the documents can be filtered by."""

from typing import Any

from fastapi import APIRouter, Query

from app.api.bodies import FacetBody, Listed
from app.api.schemas import InCollection
from app.domain import Facet
from app.services import Services


def facets_router(services: Services) -> APIRouter:
    """Build the route over the given parts."""
    router = APIRouter(tags=["documents"])

    @router.get("/v1/facets", responses={200: {"model": Listed[FacetBody]}})
    async def list_facets(
        limit: int = Query(50, ge=1, le=1000, description="of values per field"), collection: InCollection = None
    ) -> dict[str, Any]:
        """List the metadata fields with their most frequent values, and how many documents have each."""
        found = await services.retriever.facets(limit=limit, collection=collection)
        return {"object": "list", "data": [_facet(one) for one in found]}

    return router


def _facet(facet: Facet) -> dict[str, Any]:
    values = [{"value": value, "count": count} for value, count in facet.values]
    return {"object": "facet", "field": facet.field, "values": values, "num_values": facet.num_values}
