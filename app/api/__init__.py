"""The HTTP border: an ordinary FastAPI application over the parts it is given."""

from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles

from app.api.chat import chat_router
from app.api.collections import collections_router
from app.api.documents import documents_router
from app.api.errors import install_error_handlers
from app.api.facets import facets_router
from app.api.health import health_router
from app.api.ingestions import ingestions_router
from app.api.middleware import BodyLimit, RequestContext, SameOrigin
from app.api.models import models_router
from app.api.responses import responses_router
from app.api.search import search_router
from app.api.uploads import uploads_router
from app.api.vector_stores import vector_stores_router
from app.services import Services

WEB = Path(__file__).parent.parent / "web"


def create_api(services: Services) -> FastAPI:
    """Build the application; it holds no state of its own."""
    api = FastAPI(
        title="Cleave",
        version=version("cleave"),
        description="Answers from your own writing, with citations. The chat routes speak OpenAI's API.",
    )
    limits = services.settings.api
    api.add_middleware(BodyLimit, max_bytes=limits.max_body_bytes, max_upload_bytes=limits.max_upload_bytes)
    api.add_middleware(SameOrigin)
    api.add_middleware(RequestContext)
    install_error_handlers(api)
    api.include_router(health_router(services))
    api.include_router(chat_router(services))
    api.include_router(responses_router(services))
    api.include_router(models_router(services))
    api.include_router(vector_stores_router(services))
    api.include_router(uploads_router(services))
    api.include_router(documents_router(services))
    api.include_router(facets_router(services))
    api.include_router(ingestions_router(services))
    api.include_router(search_router(services))
    api.include_router(collections_router(services))
    api.mount("/web", StaticFiles(directory=WEB), name="web")

    @api.get("/", include_in_schema=False)
    async def chat_page() -> FileResponse:
        return FileResponse(WEB / "index.html")

    return api
