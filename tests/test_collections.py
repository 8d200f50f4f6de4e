"""Several collections in one service, and what happens when one was written with other settings than the service's.

The encoders are tiny and real; the services have real stores and the engine that quotes.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from app import prompts
from app.api import create_api
from app.services import Services, build_services
from app.settings import ChunkingSettings, EmbeddingSettings, LLMSettings, Settings, StoreSettings
from tests.tiny_models import make_encoder

QUESTION = {"messages": [{"role": "user", "content": "How long did the outage of the harbour crane last?"}]}
FACT = "The outage of the harbour crane lasted 52 minutes."


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_encoder(tmp_path_factory.mktemp("models") / "encoder"))


def settings_for(folder: Path, encoder: str, **changes: Any) -> Settings:
    """Settings of a service without a language model, with the embedded store in `folder`."""
    return Settings(
        data_dir=folder,
        embedding=EmbeddingSettings(model=encoder, dtype="float32"),
        llm=LLMSettings(engine="extractive", chat_template=changes.pop("chat_template", None)),
        **changes,
    )


@asynccontextmanager
async def serving(settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    services: Services = await build_services(settings)
    transport = httpx.ASGITransport(create_api(services))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client
    await services.close()


@pytest.fixture(params=["embedded", "memory"])
async def client(request: pytest.FixtureRequest, tmp_path: Path, encoder: str) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(settings_for(tmp_path, encoder, store=StoreSettings(kind=request.param))) as found:
        yield found


async def add(client: httpx.AsyncClient, document_id: str, text: str, **params: str) -> None:
    body = {"documents": [{"id": document_id, "title": document_id, "text": text}]}
    response = await client.post("/v1/documents", json=body, params=params)
    assert response.json()["data"][0]["status"] in ("created", "updated"), response.text


async def found(client: httpx.AsyncClient, **body: str) -> list[str]:
    response = await client.post("/v1/search", json={"query": "the harbour crane", **body})
    assert response.status_code == 200, response.text
    return [one["document_id"] for one in response.json()["data"]]


def error_of(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


# --- Several collections ---------------------------------------------------------------------------------------------


async def test_a_collection_comes_with_its_first_document_and_is_apart(client: httpx.AsyncClient) -> None:
    await add(client, "outage", FACT)
    await add(client, "other", "The crane of the museum has not moved since 1950.", collection="museum")
    assert await found(client) == ["outage"]
    assert await found(client, collection="museum") == ["other"]
    assert await found(client, collection="default") == ["outage"]
    listed = (await client.get("/v1/documents", params={"collection": "museum"})).json()
    assert ([one["id"] for one in listed["data"]], listed["total"]) == (["other"], 1)
    assert (await client.get("/v1/documents/other", params={"collection": "museum"})).status_code == 200
    assert error_of(await client.get("/v1/documents/other")) == (404, "document_not_found")

    answer = (await client.post("/v1/chat/completions", json={**QUESTION, "rag": {"collection": "museum"}})).json()
    assert {one["document_id"] for one in answer["rag"]["sources"]} == {"other"}

    await client.delete("/v1/documents/other", params={"collection": "museum"})
    assert await found(client, collection="museum") == []
    assert await found(client) == ["outage"]


async def test_collections_are_listed_and_deleted(client: httpx.AsyncClient, encoder: str) -> None:
    await add(client, "outage", FACT)
    await add(client, "other", "The crane of the museum.", collection="museum")
    listed = (await client.get("/v1/collections")).json()
    kept = {"object": "collection", "num_documents": 1, "num_chunks": 1, "embedding_model": encoder}
    default = {**kept, "name": "default", "is_default": True}
    assert listed == {"object": "list", "data": [default, {**kept, "name": "museum", "is_default": False}]}
    deleted = (await client.delete("/v1/collections/museum")).json()
    assert deleted == {"object": "collection.deleted", "name": "museum", "deleted": True}
    assert (await client.get("/v1/collections")).json()["data"] == [default]
    assert error_of(await client.delete("/v1/collections/default")) == (400, "invalid_value")
    await add(client, "again", "The crane is back.", collection="museum")
    assert await found(client, collection="museum") == ["again"]


async def test_a_collection_that_is_not_there_is_named_with_those_that_are(client: httpx.AsyncClient) -> None:
    for response in (
        await client.get("/v1/documents", params={"collection": "nowhere"}),
        await client.get("/v1/documents/x", params={"collection": "nowhere"}),
        await client.delete("/v1/documents/x", params={"collection": "nowhere"}),
        await client.post("/v1/search", json={"query": "x", "collection": "nowhere"}),
        await client.post("/v1/chat/completions", json={**QUESTION, "rag": {"collection": "nowhere"}}),
        await client.delete("/v1/collections/nowhere"),
        await client.get("/v1/reindex", params={"collection": "nowhere"}),
    ):
        assert error_of(response) == (404, "collection_not_found")
        assert "there are: default." in response.json()["error"]["message"]


@pytest.mark.parametrize("name", ["", "a/b", "../a", "a.b", "x" * 65, "ä"])
async def test_a_name_that_is_none_is_refused(client: httpx.AsyncClient, name: str) -> None:
    for response in (
        await client.get("/v1/documents", params={"collection": name}),
        await client.post("/v1/documents", params={"collection": name}, json={"documents": [{"text": "x"}]}),
        await client.post("/v1/search", json={"query": "x", "collection": name}),
        await client.post("/v1/chat/completions", json={**QUESTION, "rag": {"collection": name}}),
    ):
        assert error_of(response) == (400, "invalid_value")


async def test_collections_are_there_after_a_restart(tmp_path: Path, encoder: str) -> None:
    settings = settings_for(tmp_path, encoder)
    async with serving(settings) as client:
        await add(client, "other", "The crane of the museum.", collection="museum")
    async with serving(settings) as client:
        assert [one["name"] for one in (await client.get("/v1/collections")).json()["data"]] == ["default", "museum"]
        assert await found(client, collection="museum") == ["other"]


# --- Other settings --------------------------------------------------------------------------------------------------


async def readiness(client: httpx.AsyncClient) -> tuple[int, str, str]:
    response = await client.get("/readyz")
    body = response.json()
    return response.status_code, body["status"], body.get("parts", {}).get("retriever", {}).get("error", "")


async def test_other_settings_make_a_service_that_is_not_ready_and_says_what_to_do(
    tmp_path: Path, encoder: str
) -> None:
    async with serving(settings_for(tmp_path, encoder)) as client:
        await add(client, "outage", FACT)
    async with serving(settings_for(tmp_path, encoder, chunking=ChunkingSettings(max_tokens=99))) as client:
        status, state, line = await readiness(client)
        assert (status, state) == (503, "not_ready")
        assert "(chunking.max_tokens: was 160, now 99)" in line
        assert "`cleave reindex`" in line
        assert (await client.get("/livez")).status_code == 200
        for response in (
            await client.post("/v1/search", json={"query": "x"}),
            await client.post("/v1/chat/completions", json=QUESTION),
            await client.post("/v1/chat/completions", json={**QUESTION, "stream": True}),
            await client.post("/v1/documents", json={"documents": [{"text": "x"}]}),
            await client.get("/v1/documents"),
            await client.get("/v1/documents/outage"),
            await client.delete("/v1/documents/outage"),
        ):
            assert error_of(response) == (503, "collection_mismatch")
            assert response.json()["error"]["message"] == line
        [held] = (await client.get("/v1/collections")).json()["data"]
        assert held["num_documents"] == 1
    async with serving(settings_for(tmp_path, encoder)) as client:
        assert await readiness(client) == (200, "ready", "")
        assert await found(client) == ["outage"]


async def test_another_model_under_the_same_name_is_noticed(tmp_path: Path) -> None:
    encoder = str(make_encoder(tmp_path / "encoder", seed=1))
    async with serving(settings_for(tmp_path / "data", encoder)):
        pass
    make_encoder(tmp_path / "encoder", seed=2)
    async with serving(settings_for(tmp_path / "data", encoder)) as client:
        assert "(embedding.revision: was 'sha256:" in (await readiness(client))[2]


async def test_other_prompts_need_a_new_stamp_and_nothing_is_encoded(
    tmp_path: Path, encoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages }}", encoding="utf-8")
    async with serving(settings_for(tmp_path, encoder)) as client:
        await add(client, "outage", FACT)
    monkeypatch.setattr(prompts, "PLAIN_INSTRUCTIONS", "Answer in one word.")
    settings = settings_for(tmp_path, encoder, chat_template=template)
    async with serving(settings) as client:
        status, _, line = await readiness(client)
        assert status == 503
        assert 'prompt.chat_template: was "the model\'s own", now' in line
        assert "prompt.format: was" in line
        wanted = settings.model_dump(mode="json", include={"embedding", "chunking"})
        stamped = (await client.post("/v1/reindex", json=wanted)).json()
        assert (stamped["state"], stamped["candidate"]) == ("current", None)
        assert (await readiness(client))[0] == 200
        assert await found(client) == ["outage"]
    async with serving(settings) as client:
        assert (await readiness(client))[0] == 200
