"""A service with keys, in this process: tiny real encoder, real store, the engine that quotes."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from app.api import create_api
from app.keys import create_key, keys_path
from app.llm import LLM
from app.services import build_services
from app.settings import AccessSettings, EmbeddingSettings, LLMSettings, Settings, StoreSettings

QUESTION = {"messages": [{"role": "user", "content": "How long did the outage of the harbour crane last?"}]}
ADDRESS = "http://localhost"


@dataclass(frozen=True, slots=True)
class KeyedService:
    """The API, and a client for each key."""

    api: FastAPI
    path: Path

    def client(self, key: str = "", *, address: str = "127.0.0.1", **headers: str) -> httpx.AsyncClient:
        """Reach it from an address, with a key."""
        transport = httpx.ASGITransport(self.api, client=(address, 50_000), raise_app_exceptions=False)
        authorization = {"Authorization": f"Bearer {key}"} if key else {}
        return httpx.AsyncClient(transport=transport, base_url=ADDRESS, headers={**authorization, **headers})

    def create(self, name: str, **rights: Any) -> str:
        """Create a key; give what its owner sends."""
        return create_key(self.path, name, **rights)[1]


def settings_for(folder: Path, encoder: str, *, kind: str = "memory", **access: Any) -> Settings:
    """Settings of a service without a language model."""
    return Settings(
        data_dir=folder,
        embedding=EmbeddingSettings(model=encoder, dtype="float32"),
        store=StoreSettings(kind=kind),
        llm=LLMSettings(engine="extractive"),
        access=AccessSettings(**access),
    )


@asynccontextmanager
async def keyed_service(settings: Settings, llm: LLM | None = None) -> AsyncIterator[KeyedService]:
    """Build it over these settings; its keys are made afterwards."""
    services = await build_services(settings, llm=llm)
    yield KeyedService(create_api(services), keys_path(settings))
    await services.close()


def error_of(response: httpx.Response) -> tuple[int, str]:
    """Read status and code of an error."""
    return response.status_code, response.json()["error"]["code"]


async def add(client: httpx.AsyncClient, document_id: str, text: str, **params: str) -> httpx.Response:
    """Add one document."""
    body = {"documents": [{"id": document_id, "title": document_id, "text": text}]}
    return await client.post("/v1/documents", json=body, params=params)
