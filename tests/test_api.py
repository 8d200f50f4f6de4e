"""The HTTP border over real parts; the engine is scripted where a test needs one that fails or waits."""

import asyncio
import io
import json
import re
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import openai
import pytest
import pytest_asyncio
import uvicorn
from fastapi import FastAPI
from fastapi.openapi.models import OpenAPI
from hypothesis import given
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from reportlab.lib.pdfencrypt import StandardEncryption
from reportlab.pdfgen.canvas import Canvas

from app.api import create_api, health, sse
from app.batch_queue import LocalQueue
from app.batches import BatchStore
from app.catalog import LocalRetriever
from app.chat import REFUSAL, ChatService
from app.domain import Document, Grounding, RetrieverInfo, SearchQuery, SearchResult
from app.errors import ContextTooLong, DeadlineExceeded, LLMUnavailable, Overloaded, RetrieverUnavailable
from app.files import FileStore
from app.ingestion_jobs import IngestionJobs
from app.llm import LLM
from app.llm.extractive import ExtractiveEngine
from app.retrieval import Retriever
from app.services import Services, build_retriever
from app.settings import APISettings, Settings, StoreSettings
from tests.scripted_llm import ScriptedLLM

in_one_loop = pytest.mark.asyncio(loop_scope="module")

SETTINGS = Settings(
    store=StoreSettings(kind="memory"),
    api=APISettings(max_file_bytes=20_000, max_body_bytes=50_000, max_upload_bytes=50_000),
)
QUESTION = "How long did the Reading Room outage last?"
FACT = "The Reading Room outage lasted 52 minutes."
SUPPORTED = "The outage lasted 52 minutes."
DOCUMENTS = [
    Document(
        "notes/outage.md", "Post-mortem", f"{FACT} Nobody was on call.", "https://wiki.example/o", {"author": "Noor"}
    ),
    Document("cache #1?.md", "KV cache", "The cache of the larger model takes 40 GB.", metadata={"author": "Teodor"}),
]
JSON = {"content-type": "application/json"}
UPLOADS = tempfile.TemporaryDirectory(prefix="cleave-uploads-")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def retriever() -> AsyncIterator[LocalRetriever]:
    found = await build_retriever(SETTINGS)
    assert {receipt.status for receipt in await found.ingest(DOCUMENTS)} == {"created"}
    yield found
    await found.close()


def api_of(retriever: Retriever, llm: LLM, grounding: Grounding = "gate") -> FastAPI:
    chat = ChatService(retriever, llm, grounding=grounding, settings=SETTINGS.answer)
    ingestions = IngestionJobs(Path(UPLOADS.name), retriever, SETTINGS.api)
    files = FileStore(Path(UPLOADS.name), SETTINGS.api, SETTINGS.batch)
    batches = BatchStore(Path(UPLOADS.name), files)
    return create_api(Services(SETTINGS, retriever, llm, chat, ingestions, files, batches, LocalQueue()))


def client_of(retriever: Retriever, llm: LLM, grounding: Grounding = "gate") -> httpx.AsyncClient:
    transport = httpx.ASGITransport(api_of(retriever, llm, grounding), raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://localhost")


@pytest_asyncio.fixture(loop_scope="module")
async def client(retriever: LocalRetriever) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(retriever, ScriptedLLM(SUPPORTED)) as found:
        yield found


def asking(question: str = QUESTION, **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}], **options}


async def ask(client: httpx.AsyncClient, **options: Any) -> httpx.Response:
    return await client.post("/v1/chat/completions", json=asking(**options))


async def streamed(client: httpx.AsyncClient, **options: Any) -> list[Any]:
    """Read a stream as its chunks; `[DONE]` stays a text."""
    response = await ask(client, stream=True, **options)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    *events, rest = response.text.split("\n\n")
    assert rest == ""
    data = [event.removeprefix("data: ") for event in events]
    return [one if one == "[DONE]" else json.loads(one) for one in data]


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """Read an error, which has the one shape on every route."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    message = body["error"]["message"]
    assert message.endswith(".")
    assert not message.endswith("..")
    assert "\n" not in message
    error: dict[str, Any] = body["error"]
    return error


@asynccontextmanager
async def serving(api: FastAPI) -> AsyncIterator[tuple[str, int]]:
    """Serve on a real port, for what shows only there: pieces that arrive one by one, clients that leave."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(api, log_config=None, lifespan="off"))
        running = asyncio.create_task(server.serve(sockets=[listening]))
        try:
            yield listening.getsockname()
        finally:
            server.should_exit = server.force_exit = True
            await running


# --- Answers ---------------------------------------------------------------------------------------------------------


@in_one_loop
async def test_an_answer_is_an_openai_completion_with_its_sources(client: httpx.AsyncClient) -> None:
    response = await ask(client)
    body = response.json()
    assert response.status_code == 200
    assert (body["object"], body["model"]) == ("chat.completion", "cleave")
    [choice] = body["choices"]
    text = choice["message"]["content"]
    assert (text, choice["finish_reason"], choice["message"]["role"]) == (f"{SUPPORTED} [1]", "stop", "assistant")
    [annotation] = choice["message"]["annotations"]
    cited = annotation["url_citation"]
    assert (annotation["type"], cited["url"], cited["title"]) == ("url_citation", DOCUMENTS[0].url, "Post-mortem")
    assert text[cited["start_index"] : cited["end_index"]] == "[1]"
    assert body["usage"] == {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}
    rag = body["rag"]
    assert rag["request_id"] == response.headers["x-request-id"]
    assert (rag["cited"], rag["grounded"], rag["unsupported"], rag["degraded"]) == ([1], "model", [], [])
    assert (rag["rewritten_query"], rag["removed_markers"]) == (QUESTION, 0)
    first = rag["sources"][0]
    assert (first["n"], first["document_id"], first["chunk_id"]) == (1, "notes/outage.md", "notes/outage.md#0")
    assert (first["text"], first["metadata"]) == (DOCUMENTS[0].text, {"author": "Noor"})
    assert [one["n"] for one in rag["sources"]] == [1, 2] == rag["presented"]
    assert rag["timings_ms"]["total"] > 0


@in_one_loop
@pytest.mark.parametrize("with_usage", [False, True])
async def test_a_stream_has_its_sources_first_and_its_summary_before_the_end(
    client: httpx.AsyncClient, with_usage: bool
) -> None:
    options = {"stream_options": {"include_usage": True}} if with_usage else {}
    *chunks, done = await streamed(client, **options)
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    if with_usage:
        *chunks, last = chunks
        assert (last["choices"], last["usage"]["total_tokens"]) == ([], 101)
        assert all(chunk["usage"] is None for chunk in chunks)
    else:
        assert not any("usage" in chunk for chunk in chunks)
    first, *pieces, summary, end = chunks
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert [one["n"] for one in first["rag"]["sources"]] == [1, 2]
    assert [piece["choices"][0]["delta"]["content"] for piece in pieces] == [f"{SUPPORTED} [1]"]
    [annotation] = summary["choices"][0]["delta"]["annotations"]
    assert annotation["url_citation"]["url"] == DOCUMENTS[0].url
    assert (summary["rag"]["cited"], "sources" in summary["rag"]) == ([1], False)
    assert (end["choices"][0]["delta"], end["choices"][0]["finish_reason"]) == ({}, "stop")
    assert [chunk["choices"][0]["finish_reason"] for chunk in [first, *pieces, summary]] == [None] * (len(pieces) + 2)


@in_one_loop
async def test_a_stream_and_a_whole_answer_say_the_same(client: httpx.AsyncClient) -> None:
    whole = (await ask(client)).json()
    chunks = [chunk for chunk in await streamed(client) if chunk != "[DONE]"]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]
    changing = {"request_id", "timings_ms"}
    joined = chunks[0]["rag"] | chunks[-2]["rag"]
    assert {key: joined[key] for key in joined.keys() - changing} == {
        key: whole["rag"][key] for key in whole["rag"].keys() - changing
    }


@in_one_loop
async def test_pieces_leave_while_the_engine_still_works(retriever: LocalRetriever) -> None:
    goes_on = asyncio.Event()
    llm = ScriptedLLM("The outage ", goes_on, "lasted.")
    async with (
        serving(api_of(retriever, llm, "flag")) as (host, port),
        httpx.AsyncClient(trust_env=False, timeout=60) as web,
    ):
        url = f"http://{host}:{port}/v1/chat/completions"
        async with web.stream("POST", url, json=asking(stream=True)) as response:
            seen = ""
            async for text in response.aiter_text():
                seen += text
                if "The outage" in seen and not goes_on.is_set():
                    assert not llm.closed.is_set()
                    goes_on.set()
    assert seen.endswith("data: [DONE]\n\n")


@in_one_loop
async def test_a_reader_that_leaves_a_stream_frees_the_engine(retriever: LocalRetriever) -> None:
    llm = ScriptedLLM("The outage ", asyncio.Event())
    async with (
        serving(api_of(retriever, llm, "flag")) as (host, port),
        httpx.AsyncClient(trust_env=False, timeout=60) as web,
    ):
        url = f"http://{host}:{port}/v1/chat/completions"
        async with web.stream("POST", url, json=asking(stream=True)) as response:
            async for text in response.aiter_text():
                if "The outage" in text:
                    break
        async with asyncio.timeout(60):
            await llm.closed.wait()


@in_one_loop
async def test_silence_is_filled_with_comments_that_clients_skip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "HEARTBEAT_S", 0.01)
    goes_on = asyncio.Event()

    async def lines() -> AsyncIterator[str]:
        yield "first"
        await goes_on.wait()
        yield "last"

    stream = sse.with_heartbeats(lines())  # type: ignore[arg-type]
    assert [await anext(stream) for _ in range(3)] == ["first", ": ping\n\n", ": ping\n\n"]
    goes_on.set()
    assert [line async for line in stream if line != ": ping\n\n"] == ["last"]


@in_one_loop
async def test_a_source_without_an_address_is_cited_by_one_that_resolves_here(retriever: LocalRetriever) -> None:
    async with client_of(retriever, ExtractiveEngine()) as client:
        body = (await ask(client, question="How much does the cache of the larger model take?")).json()
        url = body["choices"][0]["message"]["annotations"][0]["url_citation"]["url"]
        assert url == "http://localhost/v1/documents/cache%20%231%3F.md#0"
        assert (await client.get(url)).json()["id"] == "cache #1?.md"


@in_one_loop
async def test_what_the_documents_do_not_hold_is_refused_in_words(client: httpx.AsyncClient) -> None:
    body = (await ask(client, question="Who won the 1998 football World Cup?")).json()
    assert body["choices"][0]["message"]["content"] == REFUSAL
    assert (body["rag"]["grounded"], body["rag"]["cited"], body["usage"]["total_tokens"]) == ("refused", [], 0)
    assert body["rag"]["refusal"]["reason"] == "off_topic"
    assert body["rag"]["refusal"]["score"] < 0.4


@in_one_loop
async def test_options_of_retrieval_are_kept(client: httpx.AsyncClient) -> None:
    sources = (await ask(client, rag={"top_k": 1})).json()["rag"]["sources"]
    assert [one["document_id"] for one in sources] == ["notes/outage.md"]
    sources = (await ask(client, rag={"filters": {"author": ["Teodor"]}})).json()["rag"]["sources"]
    assert [one["document_id"] for one in sources] == ["cache #1?.md"]


@in_one_loop
@pytest.mark.parametrize("options", [{"model": "scripted"}, {"rag": {"enabled": False}}])
async def test_the_model_alone_answers_without_documents(retriever: LocalRetriever, options: dict[str, Any]) -> None:
    llm = ScriptedLLM("print(x[0])")
    async with client_of(retriever, llm) as client:
        body = (await ask(client, question="Write code.", **options)).json()
    assert body["choices"][0]["message"]["content"] == "print(x[0])"
    assert body["model"] == options.get("model", "cleave")
    assert (body["rag"]["sources"], body["rag"]["grounded"]) == ([], "unchecked")
    assert llm.requests[0].passages == ()


@in_one_loop
async def test_what_is_asked_of_the_engine_reaches_it(retriever: LocalRetriever) -> None:
    llm = ScriptedLLM("It lasted 52 minutes.")
    parts = [{"type": "text", "text": "How long did the"}, {"type": "text", "text": "Reading Room outage last?"}]
    messages = [{"role": "developer", "content": "Be terse."}, {"role": "user", "content": parts}]
    sampling = {"max_completion_tokens": 7, "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "seed": 3, "stop": "."}
    ignored = {"user": "me", "store": False, "logprobs": False, "tools": [], "n": 1, "stream": None}
    async with client_of(retriever, llm, "flag") as client:
        response = await client.post(
            "/v1/chat/completions",
            json={"model": "cleave", "messages": messages, **sampling, **ignored, "response_format": {"type": "text"}},
        )
    assert response.status_code == 200, response.text
    [sent] = llm.requests
    assert [message.role for message in sent.messages] == ["system", "user"]
    assert sent.messages[-1].content == "How long did the\nReading Room outage last?"
    asked = sent.sampling
    assert (asked.max_tokens, asked.temperature, asked.top_p, asked.seed, asked.stop) == (7, 0.5, 0.9, 3, (".",))


@in_one_loop
async def test_two_requests_under_one_id_do_not_collide_in_the_engine(retriever: LocalRetriever) -> None:
    llm = ScriptedLLM(SUPPORTED)
    async with client_of(retriever, llm) as client:
        for _ in range(2):
            await client.post("/v1/chat/completions", json=asking(), headers={"x-request-id": "mine"})
    ids = [request.request_id for request in llm.requests]
    assert len(set(ids)) == 2
    assert all(one.startswith("mine-") for one in ids)


# --- The official client ---------------------------------------------------------------------------------------------


@pytest.fixture
def sync_client(live_service: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live_service}/v1", api_key="none", max_retries=0) as found:
        yield found


OUTAGE = "How long did the Reading Room outage on 14 October 2025 last?"


def test_the_official_client_reads_an_answer(sync_client: openai.OpenAI) -> None:
    completion = sync_client.chat.completions.create(
        model="cleave",
        messages=[{"role": "user", "content": OUTAGE}],
        extra_body={"rag": {"filters": {"author": "Noor Hallivant"}, "top_k": 4}},
    )
    ChatCompletion.model_validate(completion.model_dump(), strict=True)
    message = completion.choices[0].message
    assert "52 minutes" in (message.content or "")
    assert message.annotations
    assert message.annotations[0].url_citation.url.startswith("https://wiki.lanternfish.example/")
    assert completion.model_extra
    sources = completion.model_extra["rag"]["sources"]
    assert len(sources) == 4
    assert {one["metadata"]["author"] for one in sources} == {"Noor Hallivant"}


def test_the_official_client_reads_a_stream(sync_client: openai.OpenAI) -> None:
    stream = sync_client.chat.completions.create(
        model="cleave",
        messages=[{"role": "user", "content": OUTAGE}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert "52 minutes" in text
    assert chunks[0].model_extra
    assert chunks[0].model_extra["rag"]["sources"]
    assert chunks[-1].usage
    assert chunks[-2].choices[0].finish_reason == "stop"


def test_the_official_client_lists_the_models_and_names_a_wrong_one(sync_client: openai.OpenAI) -> None:
    assert [model.id for model in sync_client.models.list()] == ["cleave", "extractive"]
    with pytest.raises(openai.NotFoundError) as caught:
        sync_client.chat.completions.create(model="gpt-9", messages=[{"role": "user", "content": "Hi"}])
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


@in_one_loop
async def test_the_asynchronous_client_works_too(retriever: LocalRetriever) -> None:
    async with client_of(retriever, ScriptedLLM(SUPPORTED)) as web:
        client = openai.AsyncOpenAI(base_url="http://localhost/v1", api_key="none", max_retries=0, http_client=web)
        completion = await client.chat.completions.create(
            model="cleave", messages=[{"role": "user", "content": QUESTION}], extra_body={"rag": {"top_k": 1}}
        )
        stream = await client.chat.completions.create(
            model="cleave", messages=[{"role": "user", "content": QUESTION}], stream=True
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
        assert text == completion.choices[0].message.content == f"{SUPPORTED} [1]"
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="cleave", messages=[])
        assert caught.value.param == "messages"


@in_one_loop
async def test_the_asynchronous_client_raises_what_breaks_a_stream(retriever: LocalRetriever) -> None:
    llm = ScriptedLLM("The outage", LLMUnavailable("The engine died."))
    async with client_of(retriever, llm, "flag") as web:
        client = openai.AsyncOpenAI(base_url="http://localhost/v1", api_key="none", max_retries=0, http_client=web)
        stream = await client.chat.completions.create(
            model="cleave", messages=[{"role": "user", "content": QUESTION}], stream=True
        )
        with pytest.raises(openai.APIError, match=r"The engine died\."):
            _ = [chunk async for chunk in stream]


# --- Errors ----------------------------------------------------------------------------------------------------------

IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
TOOL = {"type": "function", "function": {"name": "f"}}


def json_schema(**wrong: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": {}} | wrong}


ANSWERED = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]


@in_one_loop
@pytest.mark.parametrize(
    ("options", "code", "param"),
    [
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": "Hi"}, "invalid_value", "messages"),
        ({"messages": None}, "invalid_value", "messages"),
        ({"messages": [{"role": "user", "content": ""}]}, "invalid_value", "messages.0.content"),
        ({"messages": [*ANSWERED, {"role": "user", "content": " \n"}]}, "invalid_value", "messages.2.content"),
        ({"messages": ANSWERED}, "invalid_value", "messages"),
        ({"messages": [{"role": "robot", "content": "Hi"}]}, "invalid_value", "messages.0.role"),
        ({"messages": [{"role": "user", "content": 3}]}, "invalid_value", "messages.0.content"),
        ({"messages": [{"role": "user"}]}, "invalid_value", "messages.0.content"),
        ({"messages": IMAGE}, "invalid_value", "messages.0.content"),
        ({"model": 3}, "invalid_value", "model"),
        ({"temperature": "hot"}, "invalid_value", "temperature"),
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"temperature": float("nan")}, "invalid_value", "temperature"),
        ({"top_p": float("inf")}, "invalid_value", "top_p"),
        ({"max_tokens": 0}, "invalid_value", "max_tokens"),
        ({"stream": "perhaps"}, "invalid_value", "stream"),
        ({"stop": ""}, "invalid_value", "stop"),
        ({"stop": ["a"] * 5}, "unsupported_parameter", "stop"),
        ({"n": 2}, "unsupported_parameter", "n"),
        ({"tools": [TOOL]}, "unsupported_parameter", "tools"),
        ({"logprobs": True}, "unsupported_parameter", "logprobs"),
        ({"logit_bias": {"1": 101}}, "invalid_value", "logit_bias.1"),
        ({"logit_bias": {"the": 1}}, "invalid_value", "logit_bias.the.[key]"),
        ({"modalities": ["text", "audio"]}, "unsupported_parameter", "modalities"),
        ({"response_format": {"type": "grammar"}}, "invalid_value", "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "invalid_value", "response_format.json_schema"),
        ({"response_format": json_schema(name="a b")}, "invalid_value", "response_format.json_schema.name"),
        ({"response_format": json_schema(schema=[])}, "invalid_value", "response_format.json_schema.schema"),
        ({"response_format": json_schema(schema={"type": 3})}, "invalid_value", "response_format.json_schema.schema"),
        ({"rag": {"dialect": "latex"}}, "invalid_value", "rag.dialect"),
        ({"rag": {"top_k": 0}}, "invalid_value", "rag.top_k"),
        ({"rag": {"top_k": 51}}, "invalid_value", "rag.top_k"),
        ({"rag": {"topk": 5}}, "invalid_value", "rag.topk"),
        ({"rag": {"timeout_s": 0}}, "invalid_value", "rag.timeout_s"),
        ({"rag": {"filters": {"author": None}}}, "invalid_value", "rag.filters.author"),
        ({"rag": {"filters": {"author": {"not": "Noor"}}}}, "invalid_value", "rag.filters.author"),
        ({"rag": {"filters": {"autor": "Noor"}}}, "unknown_filter", "filters.autor"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_wrong_request_says_which_part_is_wrong(
    client: httpx.AsyncClient, options: dict[str, Any], code: str, param: str, stream: bool
) -> None:
    body = json.dumps(asking() | {"stream": stream} | options)
    error = error_of(await client.post("/v1/chat/completions", content=body, headers=JSON), 400)
    assert (error["code"], error["param"], error["type"]) == (code, param, "invalid_request_error")


@in_one_loop
async def test_an_unknown_filter_names_those_that_are_known(client: httpx.AsyncClient) -> None:
    error = error_of(await ask(client, rag={"filters": {"autor": "Noor"}}), 400)
    assert error["message"] == "No document has the field 'autor'. Fields that can be filtered: author."


@in_one_loop
async def test_an_unknown_model_names_those_that_are_served(client: httpx.AsyncClient) -> None:
    error = error_of(await ask(client, model="gpt-9"), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "'cleave' or 'scripted'" in error["message"]


@in_one_loop
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "not valid JSON"),
        (b'{"messages": [}', "not valid JSON"),
        (b"", "not a JSON object"),
        (b"[1]", "not a JSON object"),
        (b'"Hi"', "not a JSON object"),
        (b'{"model": "\xff"}', "send UTF-8"),
        (b"[" * 15_000, "nested less deeply|not valid JSON"),
    ],
)
async def test_a_body_that_is_no_json_object_is_refused(
    client: httpx.AsyncClient, content: bytes, message: str
) -> None:
    response = await client.post("/v1/chat/completions", content=content, headers=JSON)
    assert re.search(message, error_of(response, 400)["message"])


@in_one_loop
async def test_a_body_of_another_type_is_refused_with_the_type_to_send(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/chat/completions", content=json.dumps(asking()))
    assert "Content-Type: application/json" in error_of(response, 400)["message"]


@in_one_loop
@pytest.mark.parametrize(
    "body",
    [
        '{"messages": [{"role": "user", "content": "a \\ud800 b"}]}',
        '{"messages": [{"role": "user", "content": "a"}], "rag": {"filters": {"author": "\\ud800"}}}',
        '{"messages": [{"role": "user", "content": "a"}], "rag": {"filters": {"\\ud800": "a"}}}',
        '{"messages": [{"role": "user", "content": "a"}], "model": "\\ud800"}',
    ],
)
async def test_text_that_is_no_unicode_is_refused(client: httpx.AsyncClient, body: str) -> None:
    error_of(await client.post("/v1/chat/completions", content=body, headers=JSON), 400)


KEYS = st.sampled_from("role content type text filters top_k author format schema key value name json_schema".split())
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=8,
)
BODIES = {
    "/v1/chat/completions": (
        asking(),
        "messages model stream stop rag seed temperature stream_options n response_format logit_bias".split(),
    ),
    "/v1/responses": ({"input": "Hi"}, "input model stream rag text tools include tool_choice instructions".split()),
    "/v1/vector_stores/default/search": (
        {"query": "Hi"},
        "query filters max_num_results ranking_options rewrite_query".split(),
    ),
}


@given(st.sampled_from(sorted(BODIES)), st.data())
def test_no_body_is_answered_with_an_internal_error(route: str, data: st.DataObject) -> None:
    class Nothing:
        """A retriever that finds nothing."""

        async def search(self, query: SearchQuery) -> SearchResult:
            return SearchResult(())

    body, fields = BODIES[route]
    body = body | {data.draw(st.sampled_from(fields)): data.draw(VALUES)}

    async def post() -> httpx.Response:
        async with client_of(Nothing(), ScriptedLLM("Hi.")) as client:  # type: ignore[arg-type]
            return await client.post(route, content=json.dumps(body), headers=JSON)

    response = asyncio.run(post())
    assert response.status_code in (200, 400, 404), response.text


@in_one_loop
async def test_routes_and_methods_that_there_are_not(client: httpx.AsyncClient) -> None:
    error = error_of(await client.get("/v1/nothing"), 404)
    assert (error["code"], error["message"]) == ("not_found", "There is no GET /v1/nothing. See /docs for the routes.")
    response = await client.put("/v1/documents", json={})
    assert error_of(response, 405)["code"] == "method_not_allowed"
    assert {"GET", "POST"} & set(response.headers["allow"].split(", "))
    assert error_of(await client.get("/web/nothing.js"), 404)["code"] == "not_found"
    assert error_of(await client.get("/web/..%2f__init__.py"), 404)["code"] == "not_found"


async def endless(size: int) -> AsyncIterator[bytes]:
    """Send a body without saying how long it is."""
    for _ in range(size // 1000):
        yield b" " * 1000


@in_one_loop
@pytest.mark.parametrize("route", ["/v1/chat/completions", "/v1/documents", "/v1/search"])
@pytest.mark.parametrize("is_declared", [True, False])
async def test_a_body_over_the_limit_is_refused(client: httpx.AsyncClient, route: str, is_declared: bool) -> None:
    content = b" " * 60_000 if is_declared else endless(60_000)
    error = error_of(await client.post(route, content=content, headers=JSON), 413)
    assert (error["code"], error["message"]) == (
        "too_large",
        "The body is over the limit of 50000 bytes. Send less at once.",
    )


@in_one_loop
async def test_a_form_over_the_limit_is_refused(client: httpx.AsyncClient) -> None:
    async def form() -> AsyncIterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.md"\r\n\r\n'
        async for piece in endless(60_000):
            yield piece

    headers = {"content-type": "multipart/form-data; boundary=x"}
    assert error_of(await client.post("/v1/documents", content=form(), headers=headers), 413)["code"] == "too_large"


@in_one_loop
@pytest.mark.parametrize(
    ("failure", "status", "code", "retry_after"),
    [
        (ContextTooLong("Too long.", param="messages"), 400, "context_length_exceeded", None),
        (Overloaded("Full.", retry_after_s=2), 429, "overloaded", "2"),
        (DeadlineExceeded("Late."), 504, "deadline_exceeded", None),
        (LLMUnavailable("Down.", retry_after_s=10), 503, "llm_unavailable", "10"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_an_error_before_the_first_token_keeps_its_status(
    retriever: LocalRetriever, failure: Any, status: int, code: str, retry_after: str | None, stream: bool
) -> None:
    async with client_of(retriever, ScriptedLLM(failure)) as client:
        response = await ask(client, stream=stream, rag={"enabled": False})
    assert error_of(response, status)["code"] == code
    assert response.headers.get("retry-after") == retry_after


@in_one_loop
async def test_an_error_inside_a_stream_is_one_chunk_and_the_end(retriever: LocalRetriever) -> None:
    failure = LLMUnavailable("The engine died.", retry_after_s=10)
    async with client_of(retriever, ScriptedLLM("The outage", failure), "flag") as client:
        *chunks, last = await streamed(client)
    assert last == {
        "error": {"message": "The engine died.", "type": "server_error", "param": None, "code": "llm_unavailable"}
    }
    assert len(chunks) == 2
    assert all(chunk["choices"][0]["finish_reason"] is None for chunk in chunks)


class Defective(ScriptedLLM):
    """An engine with an error that nobody foresaw, before or after its first token."""

    def __init__(self, *script: str) -> None:
        super().__init__(*script, finish_reason=None)

    async def generate(self, request: Any) -> AsyncIterator[Any]:  # type: ignore[override]
        async for delta in super().generate(request):
            yield delta
        raise ZeroDivisionError("secret")


@in_one_loop
@pytest.mark.parametrize("stream", [False, True])
async def test_an_unforeseen_error_is_answered_with_the_id_to_look_for(retriever: LocalRetriever, stream: bool) -> None:
    async with client_of(retriever, Defective()) as client:
        response = await client.post(
            "/v1/chat/completions", json=asking(stream=stream), headers={"x-request-id": "find-me"}
        )
    error = error_of(response, 500)
    assert (error["code"], response.headers["x-request-id"]) == ("internal_error", "find-me")
    assert "'find-me'" in error["message"]
    assert "secret" not in response.text


@in_one_loop
async def test_an_unforeseen_error_inside_a_stream_tells_no_secret(retriever: LocalRetriever) -> None:
    async with client_of(retriever, Defective("The outage"), "flag") as client:
        *_, last = await streamed(client)
    assert last["error"]["code"] == "internal_error"
    assert "secret" not in json.dumps(last)


# --- Models and health -----------------------------------------------------------------------------------------------


@in_one_loop
async def test_the_models_are_the_profile_and_the_engines_own(client: httpx.AsyncClient) -> None:
    body = (await client.get("/v1/models")).json()
    assert body["object"] == "list"
    assert [(model["id"], model["object"]) for model in body["data"]] == [("cleave", "model"), ("scripted", "model")]


@in_one_loop
async def test_an_engine_that_is_down_is_not_listed(retriever: LocalRetriever) -> None:
    async with client_of(retriever, ScriptedLLM(down=LLMUnavailable("Down."))) as client:
        assert [model["id"] for model in (await client.get("/v1/models")).json()["data"]] == ["cleave"]
        assert error_of(await ask(client, model="scripted"), 503)["code"] == "llm_unavailable"


class DownRetriever:
    """A retriever that does not answer, which the one in this process cannot be made to be."""

    async def search(self, query: SearchQuery) -> SearchResult:
        raise RetrieverUnavailable("The retriever does not answer.", retry_after_s=5)

    async def info(self, *, collection: str | None = None) -> RetrieverInfo:
        raise RetrieverUnavailable("The retriever does not answer.", retry_after_s=5)


class StuckRetriever(DownRetriever):
    """A retriever that never answers."""

    async def info(self, *, collection: str | None = None) -> RetrieverInfo:
        await asyncio.Event().wait()
        raise AssertionError


class BrokenRetriever(DownRetriever):
    """A retriever with an error that nobody foresaw."""

    async def info(self, *, collection: str | None = None) -> RetrieverInfo:
        raise ZeroDivisionError("secret")


@in_one_loop
@pytest.mark.parametrize("route", ["/livez", "/health"])
async def test_a_process_lives_whatever_its_parts_do(route: str) -> None:
    async with client_of(DownRetriever(), ScriptedLLM(down=LLMUnavailable("down"))) as client:  # type: ignore[arg-type]
        response = await client.get(route)
    assert (response.status_code, response.json()) == (200, {"status": "ok"})


@in_one_loop
async def test_a_service_with_all_its_parts_is_ready(client: httpx.AsyncClient) -> None:
    assert (await client.get("/readyz")).json() == {"status": "ready"}
    body = (await client.get("/readyz?verbose")).json()
    assert body["parts"]["retriever"]["status"] == body["parts"]["llm"]["status"] == "ok"
    assert body["parts"]["retriever"]["filter_fields"] == ["author"]
    assert body["parts"]["llm"]["id"] == "scripted"


@in_one_loop
async def test_a_service_without_its_engine_is_degraded_and_answers(retriever: LocalRetriever) -> None:
    down = LLMUnavailable("The engine is down.")
    async with client_of(retriever, ScriptedLLM(down, down=down)) as client:
        response = await client.get("/readyz?verbose")
        assert (response.status_code, response.json()["status"]) == (200, "degraded")
        assert response.json()["parts"]["llm"] == {
            "status": "unavailable",
            "error": "The engine is down.",
            "code": "llm_unavailable",
        }
        rag = (await ask(client)).json()["rag"]
    assert (rag["degraded"], rag["grounded"]) == (["llm_unavailable"], "quotes")


@in_one_loop
@pytest.mark.parametrize("kind", [DownRetriever, StuckRetriever, BrokenRetriever])
async def test_a_service_without_its_retriever_is_not_ready_and_says_why(
    kind: type[DownRetriever], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "PROBE_TIMEOUT_S", 0.05)
    async with client_of(kind(), ScriptedLLM("Hi.")) as client:  # type: ignore[arg-type]
        response = await client.get("/readyz")
        assert (response.status_code, response.json()["status"]) == (503, "not_ready")
        assert response.json()["parts"]["retriever"]["error"]
        assert "secret" not in response.text
        for answer in (await ask(client), await ask(client, stream=True)):
            assert error_of(answer, 503)["code"] == "retriever_unavailable"
            assert answer.headers["retry-after"] == "5"


# --- Documents -------------------------------------------------------------------------------------------------------


def encrypted_pdf() -> bytes:
    buffer = io.BytesIO()
    canvas = Canvas(buffer, encrypt=StandardEncryption("password", canPrint=0))
    canvas.drawString(100, 700, "Hidden")
    canvas.save()
    return buffer.getvalue()


@in_one_loop
async def test_good_files_are_taken_and_bad_ones_named(client: httpx.AsyncClient) -> None:
    files = {
        "mixed/good.md": (b"---\ntitle: Good\nauthor: Noor\n---\n\nThis one is good.", "created", ""),
        "mixed/empty.md": (b"", "failed", "is empty"),
        "mixed/binary.md": (bytes(range(256)) * 4, "failed", "is binary"),
        "mixed/latin-1.txt": ("caf\u00e9 society".encode("latin-1"), "failed", "0xE9 in line 1 is not UTF-8"),
        "mixed/tool.exe": (b"MZ", "failed", "unknown kind of file"),
        "mixed/locked.pdf": (encrypted_pdf(), "failed", "is encrypted"),
        "mixed/large.md": (b"Word. " * 4000, "failed", "the limit is"),
        "mixed/many.jsonl": (b'{"id": "mixed/one", "text": "One."}\nnonsense', "created", ""),
        "mixed/plain.txt": (b"Plain text.", "created", ""),
    }
    upload = [("files", (name, content)) for name, (content, _, _) in files.items()]
    response = await client.post("/v1/documents", files=upload, data={"metadata": '{"batch": 7}'})
    assert response.status_code == 200, response.text
    results = response.json()["data"]
    broken_line = results.pop(8)
    assert (broken_line["file"], broken_line["status"]) == ("mixed/many.jsonl", "failed")
    assert "line 2" in broken_line["error"]
    assert [one["file"] for one in results] == list(files)
    for one, (_, status, error) in zip(results, files.values(), strict=True):
        assert one["status"] == status
        assert error in (one["error"] or "")
        assert one["num_truncated_chunks"] == 0
    good = (await client.get("/v1/documents/mixed/good.md")).json()
    assert (good["title"], good["metadata"]) == ("Good", {"author": "Noor", "batch": 7})
    for gone in ("mixed/good.md", "mixed/one", "mixed/plain.txt"):
        assert (await client.delete(f"/v1/documents/{gone}")).status_code == 200


@in_one_loop
@pytest.mark.parametrize(
    ("sent", "param"),
    [
        ({"files": {"other": b"x"}}, "files"),
        ({"data": {"files": "text"}, "files": {"other": b"x"}}, "files"),
        ({"files": {"files": ("a.md", b"Text")}, "data": {"metadata": "[1]"}}, "metadata"),
        ({"files": {"files": ("a.md", b"Text")}, "data": {"metadata": "{"}}, "metadata"),
        ({"files": {"files": ("a.md", b"Text")}, "data": {"metadata": '{"a": {}}'}}, "metadata"),
    ],
)
async def test_a_wrong_form_is_refused(client: httpx.AsyncClient, sent: dict[str, Any], param: str) -> None:
    assert error_of(await client.post("/v1/documents", **sent), 400)["param"] == param


@in_one_loop
@pytest.mark.parametrize("content_type", ["multipart/form-data", "multipart/form-data; boundary=y"])
async def test_a_broken_form_is_refused(client: httpx.AsyncClient, content_type: str) -> None:
    response = await client.post("/v1/documents", content=b"--x\r\nbroken", headers={"content-type": content_type})
    error_of(response, 400)


@in_one_loop
async def test_documents_of_another_type_are_refused(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/documents", content=b"Text", headers={"content-type": "text/plain"})
    assert error_of(response, 415)["code"] == "unsupported_media_type"


@in_one_loop
async def test_documents_come_as_json(client: httpx.AsyncClient) -> None:
    unnamed = {"text": "It has no name.", "title": "Unnamed", "metadata": {"year": 2024, "draft": False, "share": 0.5}}
    sent = {
        "documents": [
            {"id": "json/a", "text": "One \ufb01ne text.", "url": "https://x.example"},
            unnamed,
            {"text": " "},
        ]
    }
    first, second, empty = (await client.post("/v1/documents", json=sent)).json()["data"]
    assert (first["document_id"], first["status"], first["num_chunks"]) == ("json/a", "created", 1)
    assert second["document_id"].startswith("doc-")
    assert (empty["status"], "no text" in empty["error"]) == ("failed", True)
    again = (await client.post("/v1/documents", json=sent)).json()["data"]
    assert [one["status"] for one in again] == ["unchanged", "unchanged", "failed"]
    assert again[1]["document_id"] == second["document_id"]
    stored = (await client.get("/v1/documents/json/a")).json()
    assert (stored["object"], stored["text"], stored["url"]) == ("document", "One fine text.", "https://x.example")
    found = (await client.get(f"/v1/documents/{second['document_id']}")).json()
    assert found["metadata"] == unnamed["metadata"]
    changed = {"documents": [{"id": "json/a", "text": "Another text."}]}
    assert (await client.post("/v1/documents", json=changed)).json()["data"][0]["status"] == "updated"
    for gone in ("json/a", second["document_id"]):
        assert (await client.delete(f"/v1/documents/{gone}")).status_code == 200


@in_one_loop
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ("{", None),
        ("[]", None),
        ("{}", "documents"),
        ('{"documents": []}', "documents"),
        ('{"documents": [{"id": "a"}]}', "documents.0.text"),
        ('{"documents": [{"text": "t", "id": ""}]}', "documents.0.id"),
        ('{"documents": [{"text": "t", "author": "n"}]}', "documents.0.author"),
        ('{"documents": [{"text": "t", "metadata": {"a": [1]}}]}', "documents.0.metadata.a"),
        ('{"documents": [{"text": "t", "metadata": {"a": NaN}}]}', "documents.0.metadata.a"),
        ('{"documents": [{"text": "\\ud800"}]}', None),
        ('{"documents": [{"text": "t"}], "more": 1}', "more"),
    ],
)
async def test_wrong_documents_are_refused_as_a_whole(client: httpx.AsyncClient, body: str, param: str | None) -> None:
    error = error_of(await client.post("/v1/documents", content=body, headers=JSON), 400)
    assert (error["code"], error["param"]) == ("invalid_value", param)


@in_one_loop
@pytest.mark.parametrize(
    "document_id",
    [
        "a/b/c.md",
        "\u00fcber \u6f22\u5b57.md",
        "what?.md",
        "part #2.md",
        "100%.md",
        "a b+c&d=e.md",
        "/rooted",
        "a//b",
        "{x}",
    ],
)
async def test_a_document_is_found_under_any_id(client: httpx.AsyncClient, document_id: str) -> None:
    document = {"id": document_id, "text": f"The document {document_id} speaks of lighthouses."}
    [receipt] = (await client.post("/v1/documents", json={"documents": [document]})).json()["data"]
    assert (receipt["document_id"], receipt["status"]) == (document_id, "created")
    address = f"/v1/documents/{quote(document_id)}"
    assert (await client.get(address)).json()["id"] == document_id
    found = (await client.post("/v1/search", json={"query": "lighthouses"})).json()["data"]
    assert document_id in {one["document_id"] for one in found}
    before = time.time()
    deleted = (await client.delete(address)).json()
    verified_at = deleted["receipt"].pop("verified_at")
    assert before <= verified_at <= time.time()
    assert deleted == {
        "id": document_id,
        "object": "document.deleted",
        "deleted": True,
        "receipt": {
            "document_id": document_id,
            "version": 1,
            "num_chunks": 1,
            "checks": {"filter": 1, "dense": 1, "sparse": 1},
        },
    }
    for response in (await client.delete(address), await client.get(address)):
        error = error_of(response, 404)
        assert (error["code"], error["param"]) == ("document_not_found", "id")
        assert repr(document_id) in error["message"]


@in_one_loop
async def test_files_are_taken_in_a_few_at_a_time_and_not_without_end(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.uploads.MAX_CHARACTERS_AT_ONCE", 20)
    monkeypatch.setattr("app.api.uploads.MAX_DOCUMENTS_PER_REQUEST", 4)
    lines = [json.dumps({"id": f"few-{n}", "text": f"Line {n} of some."}) for n in (2, 3, 4, 5)]
    contents = {"few-0.md": "The first.", "broken.pdf": "?", "few-1.md": "", "c.jsonl": "\n".join(lines), "e.md": "E."}
    upload = [("files", (name, content.encode())) for name, content in contents.items()]
    receipts = (await client.post("/v1/documents", files=upload)).json()["data"]
    told = [(one["file"], one["document_id"], one["status"]) for one in receipts]
    assert told == [
        ("few-0.md", "few-0.md", "created"),
        ("broken.pdf", "broken.pdf", "failed"),
        ("few-1.md", "few-1.md", "failed"),
        ("c.jsonl", "few-2", "created"),
        ("c.jsonl", "few-3", "created"),
        ("c.jsonl", "few-4", "created"),
        ("c.jsonl", "c.jsonl", "failed"),
        ("e.md", "e.md", "failed"),
    ]
    assert "from here on the request is over the limit of 4 documents" in receipts[-1]["error"]
    for one in receipts:
        await client.delete(f"/v1/documents/{one['document_id']}")


@in_one_loop
@pytest.mark.parametrize(
    "metadata", ['{"a": ' + "[" * 10_000, '{"a": "\\ud800"}', '{"a": ' + '{"b": ' * 5_000 + "1" + "}" * 5_001]
)
async def test_hostile_json_is_refused_on_one_line(client: httpx.AsyncClient, metadata: str) -> None:
    body = f'{{"documents": [{{"id": "hostile", "text": "Text.", "metadata": {metadata}}}]}}'
    response = await client.post("/v1/documents", content=body, headers={"content-type": "application/json"})
    assert "\n" not in error_of(response, 400)["message"]
    response = await client.post("/v1/documents", files=[("files", ("a.md", b"Text."))], data={"metadata": metadata})
    assert "\n" not in error_of(response, 400)["message"]


@in_one_loop
async def test_what_nobody_sees_in_a_text_is_left_out(client: httpx.AsyncClient) -> None:
    body = b'{"documents": [{"id": "odd", "title": "A\\u0000B", "text": "One\\u0000 two\\u200b three."}]}'
    response = await client.post("/v1/documents", content=body, headers={"content-type": "application/json"})
    assert response.json()["data"][0]["status"] == "created"
    document = (await client.get("/v1/documents/odd")).json()
    assert (document["title"], document["text"], document["version"]) == ("AB", "One two three.", 1)
    await client.delete("/v1/documents/odd")


@in_one_loop
async def test_documents_are_listed_page_by_page(client: httpx.AsyncClient) -> None:
    sent = [{"id": f"page/{n}", "text": f"Page {n}."} for n in range(5)]
    await client.post("/v1/documents", json={"documents": sent})
    seen: list[str] = []
    more = True
    while more:
        after = {"after": seen[-1]} if seen else {}
        page = (await client.get("/v1/documents", params={"limit": 3, **after})).json()
        assert page["object"] == "list"
        assert len(page["data"]) == 3 or not page["has_more"]
        assert "text" not in page["data"][0]
        seen += [one["id"] for one in page["data"]]
        more = page["has_more"]
    assert len(seen) == len(set(seen)) == page["total"]
    assert {one["id"] for one in sent} < set(seen)
    rest = (await client.get("/v1/documents", params={"after": seen[1]})).json()["data"]
    assert [one["id"] for one in rest] == seen[2:]
    for one in sent:
        await client.delete(f"/v1/documents/{one['id']}")


@in_one_loop
@pytest.mark.parametrize(("query", "param"), [("limit=0", "limit"), ("limit=1001", "limit"), ("limit=x", "limit")])
async def test_a_wrong_page_is_refused(client: httpx.AsyncClient, query: str, param: str) -> None:
    assert error_of(await client.get(f"/v1/documents?{query}"), 400)["param"] == param


# --- Search ----------------------------------------------------------------------------------------------------------


@in_one_loop
async def test_a_search_gives_passages_without_an_answer(client: httpx.AsyncClient) -> None:
    body = (await client.post("/v1/search", json={"query": QUESTION, "top_k": 1})).json()
    [found] = body["data"]
    assert (found["n"], found["document_id"], found["text"]) == (1, "notes/outage.md", DOCUMENTS[0].text)
    assert body["timings_ms"]["search"] > 0
    filtered = (await client.post("/v1/search", json={"query": QUESTION, "filters": {"author": "Teodor"}})).json()
    assert [one["document_id"] for one in filtered["data"]] == ["cache #1?.md"]


@in_one_loop
async def test_an_author_whom_the_query_names_filters_unless_switched_off(client: httpx.AsyncClient) -> None:
    body = {"query": "What did Teodor say about the outage?"}
    found = (await client.post("/v1/search", json=body)).json()
    assert [one["document_id"] for one in found["data"]] == ["cache #1?.md"]
    assert (found["recognised_filters"], found["notice"]) == ({"author": "Teodor"}, None)
    found = (await client.post("/v1/search", json={**body, "recognise_filters": False})).json()
    assert (len(found["data"]), found["recognised_filters"]) == (2, {})
    rag = (await ask(client, question=body["query"])).json()["rag"]
    assert (rag["recognised_filters"], {one["n"] for one in rag["sources"]}) == ({"author": "Teodor"}, {1})
    rag = (await ask(client, question=body["query"], rag={"recognise_filters": False})).json()["rag"]
    assert (rag["recognised_filters"], {one["n"] for one in rag["sources"]}) == ({}, {1, 2})


@in_one_loop
async def test_a_filter_value_that_no_document_has_is_no_silent_nothing(client: httpx.AsyncClient) -> None:
    notice = 'No document matches the filters: none has author "Theodor". Did you mean "Teodor"?'
    found = (await client.post("/v1/search", json={"query": "x", "filters": {"author": "Theodor"}})).json()
    assert (found["data"], found["notice"]) == ([], notice)
    body = (await ask(client, rag={"filters": {"author": "Theodor"}})).json()
    assert body["choices"][0]["message"]["content"] == body["rag"]["notice"] == notice
    assert body["rag"]["grounded"] == "refused"


async def test_a_search_for_the_last_message_of_a_conversation(client: httpx.AsyncClient) -> None:
    earlier = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]
    conversation = [*earlier, {"role": "user", "content": QUESTION}]
    found = (await client.post("/v1/search", json={"messages": conversation, "top_k": 1})).json()["data"]
    assert [one["document_id"] for one in found] == ["notes/outage.md"]


@in_one_loop
@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({}, "invalid_value", "query"),
        ({"query": " "}, "invalid_value", "query"),
        ({"query": "a", "messages": [{"role": "user", "content": "a"}]}, "invalid_value", "query"),
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "invalid_value", "messages"),
        ({"query": 3}, "invalid_value", "query"),
        ({"query": "a", "top_k": 51}, "invalid_value", "top_k"),
        ({"query": "a", "rag": {}}, "invalid_value", "rag"),
        ({"query": "a", "filters": {"autor": "Noor"}}, "unknown_filter", "filters.autor"),
    ],
)
async def test_a_wrong_search_says_which_part_is_wrong(
    client: httpx.AsyncClient, body: dict[str, Any], code: str, param: str
) -> None:
    error = error_of(await client.post("/v1/search", json=body), 400)
    assert (error["code"], error["param"]) == (code, param)


# --- What wraps every request ----------------------------------------------------------------------------------------


@in_one_loop
@pytest.mark.parametrize(
    ("given_id", "is_kept"),
    [
        ("abc-1.2:3_4", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("", False),
        ("two words", False),
        ("new\tline", False),
        ('"quoted"', False),
        ("caf\u00e9", False),
    ],
)
async def test_a_sane_request_id_comes_back_and_another_is_replaced(
    client: httpx.AsyncClient, given_id: str, is_kept: bool
) -> None:
    response = await client.get("/v1/models", headers={"x-request-id": given_id.encode("latin-1")})
    returned = response.headers["x-request-id"]
    assert (returned == given_id) == is_kept
    assert re.fullmatch(r"[\w.:-]{1,128}", returned, re.ASCII)
    assert int(response.headers["openai-processing-ms"]) >= 0


@in_one_loop
@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://[", "http://localhost.evil.example"])
async def test_a_page_of_another_site_can_change_nothing(client: httpx.AsyncClient, origin: str) -> None:
    response = await client.post("/v1/documents", json={"documents": [{"text": "t"}]}, headers={"origin": origin})
    assert error_of(response, 403)["code"] == "cross_origin"
    assert (await client.get("/v1/models", headers={"origin": origin})).status_code == 200


@in_one_loop
async def test_the_own_page_may_change_what_it_likes(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/search", json={"query": "a"}, headers={"origin": "http://localhost"})
    assert response.status_code == 200


@in_one_loop
@pytest.mark.parametrize("path", ["/", "/livez", "/v1/models", "/v1/nothing", "/web/main.js"])
async def test_every_answer_has_the_security_headers(client: httpx.AsyncClient, path: str) -> None:
    headers = (await client.get(path)).headers
    policy = dict(one.split(" ", 1) for one in headers["content-security-policy"].split("; "))
    assert (policy["default-src"], policy["frame-ancestors"]) == ("'none'", "'none'")
    assert {policy[kind] for kind in ("script-src", "style-src", "img-src", "connect-src")} == {"'self'"}
    assert (policy["require-trusted-types-for"], policy["trusted-types"]) == ("'script'", "'none'")
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


@in_one_loop
async def test_facets_are_listed_with_the_number_of_documents(client: httpx.AsyncClient) -> None:
    [author] = (await client.get("/v1/facets")).json()["data"]
    assert author == {
        "object": "facet",
        "field": "author",
        "values": [{"value": "Noor", "count": 1}, {"value": "Teodor", "count": 1}],
        "num_values": 2,
    }
    [shortened] = (await client.get("/v1/facets", params={"limit": 1})).json()["data"]
    assert (len(shortened["values"]), shortened["num_values"]) == (1, 2)
    error_of(await client.get("/v1/facets", params={"limit": 0}), 400)
    error_of(await client.get("/v1/facets", params={"collection": "absent"}), 404)


@in_one_loop
async def test_the_page_and_all_that_it_names_load(client: httpx.AsyncClient) -> None:
    page = await client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    named = re.findall(r'(?:src|href)="(/[^"]+)"', page.text)
    assert {"/web/main.js", "/web/base.css"} <= set(named)
    for path in named:
        assert (await client.get(path)).status_code == 200, path
    assert not re.search(r"<script>|<style>|\son\w+=|style=", page.text), "the policy forbids inline code"


@in_one_loop
async def test_the_api_describes_itself(client: httpx.AsyncClient) -> None:
    docs = await client.get("/docs")
    assert (docs.status_code, "swagger" in docs.text) == (200, True)
    assert "content-security-policy" not in docs.headers
    described = (await client.get("/openapi.json")).json()
    OpenAPI.model_validate(described)
    routes = {(path, method) for path, methods in described["paths"].items() for method in methods}
    assert routes == {
        ("/v1/chat/completions", "post"),
        ("/v1/responses", "post"),
        ("/v1/models", "get"),
        ("/v1/models/{model}", "get"),
        ("/v1/vector_stores", "get"),
        ("/v1/vector_stores/{vector_store_id}", "get"),
        ("/v1/vector_stores/{vector_store_id}/search", "post"),
        ("/v1/documents", "post"),
        ("/v1/documents", "get"),
        ("/v1/documents", "delete"),
        ("/v1/ingestions", "get"),
        ("/v1/ingestions/{ingestion_id}", "get"),
        ("/v1/ingestions/{ingestion_id}/events", "get"),
        ("/v1/ingestions/{ingestion_id}/cancel", "post"),
        ("/v1/documents/{document_id}", "get"),
        ("/v1/documents/{document_id}", "delete"),
        ("/v1/files", "get"),
        ("/v1/files", "post"),
        ("/v1/files/{file_id}", "get"),
        ("/v1/files/{file_id}", "delete"),
        ("/v1/files/{file_id}/content", "get"),
        ("/v1/batches", "get"),
        ("/v1/batches", "post"),
        ("/v1/batches/{batch_id}", "get"),
        ("/v1/batches/{batch_id}/cancel", "post"),
        ("/v1/search", "post"),
        ("/v1/facets", "get"),
        ("/v1/collections", "get"),
        ("/v1/collections/{name}", "delete"),
        ("/v1/reindex", "get"),
        ("/v1/reindex", "post"),
        ("/v1/reindex", "delete"),
        ("/v1/reindex/swap", "post"),
        ("/v1/reindex/rollback", "post"),
        ("/livez", "get"),
        ("/health", "get"),
        ("/readyz", "get"),
    }
    for reference in re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(described)):
        node = described
        for part in reference.split("/"):
            node = node[part]
