"""The HTTP border: an ordinary FastAPI application over the parts it is given."""

from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

from app.api.authentication import Authentication
from app.api.batches import batches_router
from app.api.chat import chat_router
from app.api.collections import collections_router
from app.api.description import API
from app.api.documents import documents_router
from app.api.errors import install_error_handlers
from app.api.facets import facets_router
from app.api.files import files_router
from app.api.guards import guarded
from app.api.health import health_router
from app.api.ingestions import ingestions_router
from app.api.middleware import BodyLimit, RequestContext, SameOrigin
from app.api.models import models_router
from app.api.responses import responses_router
from app.api.search import search_router
from app.api.uploads import uploads_router
from app.api.vector_stores import vector_stores_router
from app.keys import KeyFile
from app.rates import Rates
from app.services import Services

WEB = Path(__file__).parent.parent / "web"
ROUTERS = (
    chat_router,
    responses_router,
    models_router,
    vector_stores_router,
    uploads_router,
    documents_router,
    facets_router,
    ingestions_router,
    search_router,
    collections_router,
    files_router,
    batches_router,
)


def create_api(services: Services) -> FastAPI:
    """Build the application. Its own state is what it has read of the keys, and the rates that it counts."""
    api = API(
        title="Cleave",
        version=version("cleave"),
        description="Answers from your own writing, with citations. The chat routes speak OpenAI's API.",
    )
    settings, keys = services.settings, KeyFile(services.settings)
    rates = Rates(settings.access)
    limits = settings.api
    api.add_middleware(BodyLimit, max_bytes=limits.max_body_bytes, max_upload_bytes=limits.max_upload_bytes)
    api.add_middleware(SameOrigin)
    api.add_middleware(Authentication, settings=settings, keys=keys, rates=rates)
    api.add_middleware(RequestContext)
    install_error_handlers(api)
    api.include_router(health_router(services, keys))
    reachable = guarded(services, rates)
    for router in ROUTERS:
        api.include_router(router(reachable))
    api.mount("/web", StaticFiles(directory=WEB), name="web")

    @api.get("/", include_in_schema=False)
    async def chat_page() -> FileResponse:
        return FileResponse(WEB / "index.html")

    return api
