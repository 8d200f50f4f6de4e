"""The engine over HTTP against a server that misbehaves: each fault becomes one error of ours, in one line."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from typing import Any

import pytest
import pytest_asyncio

from app.catalog import LocalRetriever
from app.chat import AnswerEnd, AnswerStart, AnswerText, ChatRequest, ChatService
from app.domain import Delta, Document, GenerationRequest, Message, Passage, SamplingParams
from app.errors import CleaveError, ConfigurationError, ContextTooLong, InvalidRequest, LLMUnavailable, Overloaded
from app.llm.openai_http import ASSUMED_CONTEXT_WINDOW, MAX_EVENT_BYTES, OpenAIEngine
from app.services import build_llm, build_retriever, check_models
from app.settings import AnswerSettings, LLMSettings, Settings, StoreSettings
from tests.misbehaving_server import (
    DONE,
    END,
    MODEL,
    WINDOW,
    MisbehavingServer,
    Script,
    event,
    head,
    page,
    piece,
    text,
    usage,
)
from tests.running_service import free_port

in_one_loop = pytest.mark.asyncio(loop_scope="module")

KEY = "sk-a-secret"
HANG = 600.0
PATIENCE_S = 60.0
"""Longer than any test waits."""


@pytest.fixture
def server() -> Iterator[MisbehavingServer]:
    found = MisbehavingServer()
    yield found
    found.stop()


@pytest_asyncio.fixture
async def llm(server: MisbehavingServer) -> AsyncIterator[OpenAIEngine]:
    found = engine(server)
    yield found
    await found.close()


def engine(server: MisbehavingServer, *, api_key: str | None = KEY, **settings: Any) -> OpenAIEngine:
    tree = {"engine": "openai", "url": server.url, "model": MODEL} | settings
    return OpenAIEngine(LLMSettings(**tree), api_key=api_key)


def asking(*messages: str, passages: tuple[Passage, ...] = (), **sampling: Any) -> GenerationRequest:
    turns = tuple(Message("user", message) for message in messages or ("How long?",))
    return GenerationRequest("r", turns, SamplingParams(**({"max_tokens": 8} | sampling)), passages, "Answer.")


async def answered(llm: OpenAIEngine, request: GenerationRequest | None = None) -> list[Delta]:
    async with asyncio.timeout(PATIENCE_S):
        return [delta async for delta in llm.generate(request or asking())]


def text_of(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


async def failure(llm: OpenAIEngine, request: GenerationRequest | None = None) -> CleaveError:
    """The error that a completion ends with; it is one line and never holds the key."""
    with pytest.raises(CleaveError) as caught:
        await answered(llm, request)
    assert "\n" not in caught.value.message
    assert KEY not in caught.value.message
    return caught.value


# --- What is sent ----------------------------------------------------------------------------------------------------


async def test_all_of_sampling_and_the_key_are_sent(server: MisbehavingServer, llm: OpenAIEngine) -> None:
    sampling: dict[str, Any] = {
        "temperature": 0.5,
        "top_p": 0.9,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.2,
        "seed": 7,
    }
    await answered(llm, asking("Hi", max_tokens=3, stop=("END",), **sampling))
    assert server.bodies() == [
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": "Hi"}],
            "stream": True,
            "stream_options": {"include_usage": True},
            "max_tokens": 3,
            "stop": ["END"],
            **sampling,
        }
    ]
    assert {headers.get("authorization") for _, headers, _ in server.requests} == {f"Bearer {KEY}"}


async def test_without_a_key_none_is_sent(server: MisbehavingServer) -> None:
    llm = engine(server, api_key=None)
    await answered(llm)
    assert not [headers for _, headers, _ in server.requests if "authorization" in headers]
    await llm.close()


async def test_passages_and_instructions_stand_in_the_prompt(server: MisbehavingServer, llm: OpenAIEngine) -> None:
    await answered(llm, asking("How long?", passages=(Passage("d#0", "d", "Title", "", {}, "52 minutes.", 1.0),)))
    assert server.bodies()[0]["messages"] == [
        {"role": "system", "content": "Answer."},
        {"role": "user", "content": "[1] Title\n52 minutes.\n\nQuestion: How long?"},
    ]


async def test_text_of_any_kind_can_be_sent(server: MisbehavingServer, llm: OpenAIEngine) -> None:
    server.script = [head(), text("", "stop"), DONE, END]
    await answered(llm, asking("\ud800 \u2028 \U0001f600"))
    assert server.bodies()[0]["messages"][0]["content"] == "\ud800 \u2028 \U0001f600"


async def test_a_proxy_of_the_environment_is_not_asked(
    server: MisbehavingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    llm = engine(server)
    assert text_of(await answered(llm))
    await llm.close()


# --- Window and tokens -----------------------------------------------------------------------------------------------


async def test_the_window_and_the_tokens_are_the_servers(server: MisbehavingServer, llm: OpenAIEngine) -> None:
    assert (await llm.info()).context_window == WINDOW
    assert (await answered(llm, asking("w " * 500)))[0].prompt_tokens == 500


async def test_a_smaller_window_can_be_set(server: MisbehavingServer) -> None:
    llm = engine(server, max_model_len=256)
    assert (await llm.info()).context_window == 256
    assert isinstance(await failure(llm, asking("w " * 300)), ContextTooLong)
    await llm.close()


async def test_tokens_are_estimated_where_there_is_no_tokenizer(server: MisbehavingServer, llm: OpenAIEngine) -> None:
    server.has_tokenizer = False
    first, *_, last = await answered(llm, asking("word " * 100))
    assert first.prompt_tokens >= 250
    assert last.prompt_tokens == 100, "the server's own count comes with the end"
    await answered(llm)
    assert len(server.bodies("/tokenize")) == 1, "it is not asked for again and again"


async def test_a_server_that_tells_no_window_gets_a_prompt_for_a_small_one() -> None:
    server = MisbehavingServer(tells_window=False)
    llm = engine(server)
    assert (await llm.info()).context_window == ASSUMED_CONTEXT_WINDOW
    request = asking("word " * 100, "word " * 2000, "How long?")
    assert (await answered(llm, request))[0].num_dropped_messages == 2
    assert not server.bodies("/tokenize"), "only vLLM has the route"
    await llm.close()
    server.stop()


async def test_the_window_is_not_asked_for_with_every_request(server: MisbehavingServer, llm: OpenAIEngine) -> None:
    for _ in range(3):
        await answered(llm)
    assert [route for route, *_ in server.requests].count("/v1/models") == 1


@pytest.mark.parametrize(
    "said",
    [
        "This model's maximum context length is 1024 tokens. However, you requested 2000 tokens.",
        "the request exceeds the available context size, try increasing it",
    ],
)
async def test_a_prompt_that_the_server_finds_too_long_is_too_long(
    server: MisbehavingServer, llm: OpenAIEngine, said: str
) -> None:
    server.script = page("400 Bad Request", {"error": {"message": said, "code": 400}})
    found = await failure(llm)
    assert isinstance(found, ContextTooLong)
    assert said.rstrip(".") in found.message
    assert found.param == "messages"


# --- Streams that are unusual, and right -----------------------------------------------------------------------------


async def test_a_stream_without_usage_is_counted_by_its_chunks(server: MisbehavingServer, llm: OpenAIEngine) -> None:
    server.script = [head(), text("52"), text(" minutes"), text("", "stop"), DONE, END]
    assert [delta.completion_tokens for delta in await answered(llm)] == [1, 2, 2]


async def test_usage_counts_more_than_chunks(server: MisbehavingServer, llm: OpenAIEngine) -> None:
    server.script = [head(), text("52 minutes", "length"), usage(100, 5), DONE, END]
    first, last = await answered(llm)
    assert (first.text, first.completion_tokens, first.finish_reason) == ("52 minutes", 1, None)
    assert (last.text, last.completion_tokens, last.prompt_tokens, last.finish_reason) == ("", 5, 100, "length")


@pytest.mark.parametrize("ending", [[END], [None], [event({"error": "late"}), END], [HANG]])
async def test_an_answer_that_has_ended_is_whole_whatever_follows(
    server: MisbehavingServer, llm: OpenAIEngine, ending: Script
) -> None:
    server.script = [head(), text("52 minutes", "stop"), *ending]
    deltas = await answered(llm)
    assert (text_of(deltas), deltas[-1].finish_reason) == ("52 minutes", "stop")


async def test_events_may_take_every_form_that_the_standard_allows(
    server: MisbehavingServer, llm: OpenAIEngine
) -> None:
    lines = [
        b": a comment\r\n\r\n",
        b"event: message\r\nid: 1\r\nretry: 10\r\ndata:",
        b'{"choices": [{"delta":\r\n',
        b'data:  {"content": "52\xe2\x80\xa8min',
        b'utes"}}]}\r\n\r\n',
        b'data: {"choices": []}\n\ndata: {"choices": [{"delta": null}]}\n\n',
        b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}',
    ]
    server.script = [head(content_type="text/event-stream; charset=utf-8"), *map(piece, lines), END]
    assert text_of(await answered(llm)) == "52\u2028minutes"


async def test_a_character_may_be_cut_in_two(server: MisbehavingServer, llm: OpenAIEngine) -> None:
    data = b'data: {"choices": [{"delta": {"content": "\xf0\x9f\x98\x80"}, "finish_reason": "stop"}]}\n\n'
    server.script = [head(), *(step for byte in data for step in (piece(bytes([byte])), 0.0005)), END]
    assert text_of(await answered(llm)) == "\U0001f600"


async def test_a_huge_chunk_is_read(server: MisbehavingServer, llm: OpenAIEngine) -> None:
    huge = "w" * 10**6
    server.script = [head(), text(huge, "stop"), DONE, END]
    assert text_of(await answered(llm)) == huge


async def test_a_chunk_without_end_is_not(server: MisbehavingServer, llm: OpenAIEngine) -> None:
    server.script = [head(), piece(b"data: "), *[piece(b"w" * 2**20)] * (MAX_EVENT_BYTES // 2**20 + 1), HANG]
    found = await failure(llm)
    assert found.message == "The language model's stream holds a chunk of more than 4 MiB. Try again shortly."


async def test_deltas_come_as_they_are_sent(server: MisbehavingServer, llm: OpenAIEngine) -> None:
    server.script = [head(), text(None), text("52"), HANG]
    async with asyncio.timeout(PATIENCE_S), aclosing(llm.generate(asking())) as deltas:
        assert (await anext(deltas)).text == "52"
        assert (await llm.info()).num_running == 1
    assert (await llm.info()).num_running == 0


@pytest.mark.parametrize("script", [[HANG], [head(), HANG], [head(), text("52"), HANG]])
async def test_a_reader_that_leaves_ends_the_request(
    server: MisbehavingServer, llm: OpenAIEngine, script: Script
) -> None:
    server.script = script
    reading = asyncio.create_task(answered(llm))
    await until(lambda: server.num_running == 1)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(reading, 0.3)
    await until(lambda: server.num_left == 1 and server.num_running == 0)
    assert (await llm.info()).num_running == 0


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  # The server runs in a thread.
            await asyncio.sleep(0.01)


async def test_connections_are_used_again(server: MisbehavingServer, llm: OpenAIEngine) -> None:
    for _ in range(5):
        await answered(llm)
    assert server.num_connections == 1


async def test_a_server_that_came_back_is_asked_again(server: MisbehavingServer, llm: OpenAIEngine) -> None:
    server.script = [head(), text("52"), None]
    await failure(llm)
    server.script = None
    assert text_of(await answered(llm))


# --- Faults ----------------------------------------------------------------------------------------------------------

BROKEN_STREAMS: dict[str, tuple[Script, str]] = {
    "a chunk that is no JSON": ([text("52"), piece(b"data: {oops\n\n"), END], "holds a chunk that cannot be read"),
    "a chunk of another shape": ([event({"choices": "many"}), END], "holds a chunk that cannot be read"),
    "a list for a chunk": ([event([1]), END], "holds a chunk that cannot be read"),
    "an error object": ([text("52"), event({"error": {"message": "Out of memory.\nTrace"}}), END], "Out of memory"),
    "an error in plain text": ([event({"error": "No room"}), END], "ended with an error: No room"),
    "an error without words": ([event({"error": {}}), END], "ended with an error: it gave no reason"),
    "no finish_reason": ([text("52"), DONE, END], "ended before its answer did"),
    "nothing": ([END], "ended before its answer did"),
    "only [DONE]": ([DONE, END], "ended before its answer did"),
    "an abort": ([text("52", "abort"), END], "ended with abort"),
    "a filter": ([text("52", "content_filter"), END], "ended with content_filter"),
    "a cut": ([text("52"), None], "broke off ("),
    "a cut in a chunk": ([b"400\r\ndata: {", None], "broke off ("),
}


@pytest.mark.parametrize("fault", BROKEN_STREAMS)
async def test_a_broken_stream_is_no_answer(server: MisbehavingServer, llm: OpenAIEngine, fault: str) -> None:
    steps, expected = BROKEN_STREAMS[fault]
    server.script = [head(), *steps]
    found = await failure(llm)
    assert type(found) is LLMUnavailable
    assert found.message.startswith("The language model's stream ")
    assert expected in found.message
    assert found.retry_after_s == 2


async def test_what_came_before_a_cut_is_given(server: MisbehavingServer, llm: OpenAIEngine) -> None:
    server.script = [head(), text("52"), text(" min"), None]
    deltas = llm.generate(asking())
    given = [await anext(deltas), await anext(deltas)]
    assert text_of(given) == "52 min"
    with pytest.raises(LLMUnavailable):
        await anext(deltas)


NO_API = "There is no OpenAI-compatible API at http://127.0.0.1"


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (page("200 OK", "<html>\n<p>Welcome</p></html>", "text/html"), "answers with text/html in place of"),
        (page("200 OK", {"choices": []}), "answers with application/json in place of"),
        (page("200 OK", "", ""), "answers with nothing in place of"),
        (page("404 Not Found", {"detail": "Not Found"}), "it answers 404: Not Found"),
        (page("405 Method Not Allowed", ""), "it answers 405"),
        (page("307 Temporary Redirect", "", Location="https://elsewhere.example/"), "it answers 307"),
    ],
)
async def test_what_is_no_such_server_is_said(
    server: MisbehavingServer, llm: OpenAIEngine, script: Script, expected: str
) -> None:
    server.script = script
    found = await failure(llm)
    assert type(found) is LLMUnavailable
    assert found.message.startswith(NO_API)
    assert expected in found.message
    assert found.message.endswith("Correct llm.url, up to and including /v1.")


@pytest.mark.parametrize(
    "script",
    [page("200 OK", "<html>"), page("200 OK", "[]"), page("404 Not Found", "<html>"), page("400 Bad Request", "{}")],
)
async def test_a_server_without_a_list_of_models_is_said(
    server: MisbehavingServer, llm: OpenAIEngine, script: Script
) -> None:
    server.script_of_models = script
    for asked in (llm.info(), failure(llm)):
        found = await asyncio.gather(asked, return_exceptions=True)
        assert isinstance(found[0], LLMUnavailable)
        assert found[0].message.startswith(NO_API)


@pytest.mark.parametrize(
    ("header", "expected"),
    [({}, 2), ({"Retry_After": "17"}, 17), ({"Retry_After": "0.2"}, 1), ({"Retry_After": "soon"}, 2)],
)
async def test_a_server_with_too_many_requests_is_overloaded(
    server: MisbehavingServer, llm: OpenAIEngine, header: dict[str, str], expected: int
) -> None:
    server.script = page("429 Too Many Requests", {"error": {"message": "Slow down."}}, **header)
    found = await failure(llm)
    assert isinstance(found, Overloaded)
    assert found.retry_after_s == expected
    assert found.message == "The language model's server has too many requests: Slow down. Try again shortly."


@pytest.mark.parametrize(
    ("date", "expected"), [("Wed, 21 Oct 2015 07:28:00 GMT", 1), ("Wed, 21 Oct 2099 07:28:00 GMT", 3600)]
)
async def test_retry_after_may_be_a_date(
    server: MisbehavingServer, llm: OpenAIEngine, date: str, expected: int
) -> None:
    server.script = page("503 Service Unavailable", "", Retry_After=date)
    found = await failure(llm)
    assert isinstance(found, LLMUnavailable)
    assert found.retry_after_s == expected


@pytest.mark.parametrize("status", ["500 Internal Server Error", "502 Bad Gateway", "503 Service Unavailable"])
async def test_a_server_that_fails_is_unavailable(server: MisbehavingServer, llm: OpenAIEngine, status: str) -> None:
    server.script = page(status, f"<html>\n{'w' * 10**6}", "text/html")
    found = await failure(llm)
    assert type(found) is LLMUnavailable
    assert found.message == f"The language model's server at {server.url} has failed ({status[:3]})."
    assert found.retry_after_s == 10


@pytest.mark.parametrize("status", ["401 Unauthorized", "403 Forbidden"])
async def test_a_key_that_is_refused_is_named_and_not_shown(
    server: MisbehavingServer, llm: OpenAIEngine, status: str
) -> None:
    server.script = page(status, {"error": {"message": f"Incorrect API key provided: {KEY}"}})
    found = await failure(llm)
    assert type(found) is LLMUnavailable
    assert f"refuses llm.api_key or LLM_API_KEY ({status[:3]})" in found.message


async def test_a_key_that_is_missing_is_asked_for(server: MisbehavingServer) -> None:
    llm = engine(server, api_key=None)
    server.script_of_models = page("401 Unauthorized", {"error": "Unauthorized"})
    assert "asks for a key: set LLM_API_KEY (401)" in (await failure(llm)).message
    await llm.close()


async def test_a_key_in_the_servers_words_is_left_out(server: MisbehavingServer, llm: OpenAIEngine) -> None:
    server.script = page("500 Internal Server Error", {"error": {"message": f"cannot log {KEY}"}})
    assert "cannot log ..." in (await failure(llm)).message


async def test_a_model_that_the_server_lacks_is_said_with_those_that_it_has(server: MisbehavingServer) -> None:
    llm = engine(server, model="other")
    server.script = page("404 Not Found", {"error": {"message": "The model `other` does not exist.", "code": 404}})
    found = await failure(llm)
    assert type(found) is LLMUnavailable
    assert found.message.endswith(f"has no model 'other'. Set llm.model to one that it has: {MODEL}.")
    await llm.close()


async def test_what_the_server_refuses_is_the_requests_fault(server: MisbehavingServer, llm: OpenAIEngine) -> None:
    server.script = page("400 Bad Request", {"error": {"message": "stop: at most 4\nstrings"}})
    found = await failure(llm)
    assert type(found) is InvalidRequest
    assert found.message == "The language model's server refuses the request (400): stop: at most 4."


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    llm = OpenAIEngine(LLMSettings(engine="openai", url=f"http://127.0.0.1:{free_port()}/v1", model=MODEL), api_key="")
    for asked in (llm.info(), anext(llm.generate(asking()))):
        with pytest.raises(LLMUnavailable, match=r"cannot be reached \(.*\)\. Start it, or correct llm\.url") as caught:
            await asked
        assert caught.value.retry_after_s == 10
    await llm.close()


async def test_a_name_that_nobody_has_is_unavailable() -> None:
    llm = OpenAIEngine(LLMSettings(engine="openai", url="http://nobody.invalid/v1", model=MODEL), api_key=None)
    with pytest.raises(LLMUnavailable, match="cannot be reached"):
        await llm.info()
    await llm.close()


async def test_a_server_that_speaks_no_tls_is_unavailable(server: MisbehavingServer) -> None:
    server.greeting = b"HTTP/1.1 400 Bad Request\r\n\r\n"
    llm = engine(server, url=server.url.replace("http:", "https:"))
    with pytest.raises(LLMUnavailable, match=r"cannot be reached \(\[SSL"):
        await llm.info()
    await llm.close()


async def test_a_server_that_dies_before_its_answer_is_unavailable(
    server: MisbehavingServer, llm: OpenAIEngine
) -> None:
    server.script = [None]
    assert "broke off" in (await failure(llm)).message


# --- What is wrong from the start ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("localhost:8001/v1", "localhost:8001/v1"),
        ("ftp://x/v1", "ftp://x/v1"),
        ("http://", "http://"),
        ("http://[::1/v1", "http://[::1/v1"),
        ("http://user:secret@x/v1", "http://x/v1"),
        ("http://x/v1?key=secret", "http://x/v1"),
    ],
)
def test_what_can_be_no_address_is_refused_before_the_start(url: str, shown: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_models(LLMSettings(engine="openai", url=url, model="m"), "cpu")
    assert caught.value.message.startswith(f"llm.url: {shown!r} is no address of a server.")
    assert "secret" not in caught.value.message


def test_a_route_is_no_base_address() -> None:
    with pytest.raises(ConfigurationError, match="names a route"):
        check_models(LLMSettings(engine="openai", url="http://x/v1/chat/completions", model="m"), "cpu")


async def test_the_key_comes_from_the_settings_or_the_environment(
    server: MisbehavingServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLM_API_KEY", "of-the-environment\n")
    for key, expected in ((None, "Bearer of-the-environment"), ("of-the-settings", "Bearer of-the-settings")):
        settings = LLMSettings(engine="openai", url=f"{server.url}/", model=MODEL, api_key=key)
        llm = await build_llm(Settings(llm=settings), "cpu")
        await llm.info()
        assert server.requests[-1][1]["authorization"] == expected
        await llm.close()


def test_a_key_that_no_header_can_carry_is_refused_and_not_shown(server: MisbehavingServer) -> None:
    with pytest.raises(ConfigurationError, match=r"llm\.api_key") as caught:
        engine(server, api_key="secr\u00e9t")
    assert "secr" not in caught.value.message


# --- What the user sees ----------------------------------------------------------------------------------------------

QUESTION = "How long did the Reading Room outage last?"
FACT = "The Reading Room outage lasted 52 minutes."
QUOTED = f"\u201c{FACT}\u201d [1]"


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def retriever() -> AsyncIterator[LocalRetriever]:
    found = await build_retriever(Settings(store=StoreSettings(kind="memory")))
    await found.ingest([Document("outage", "Post-mortem", f"{FACT} Nobody was on call.")])
    yield found
    await found.close()


async def seen(retriever: LocalRetriever, server: MisbehavingServer, **settings: Any) -> tuple[str, AnswerEnd]:
    llm = engine(server)
    chat = ChatService(retriever, llm, grounding="gate", settings=AnswerSettings(**settings))
    request = ChatRequest("r", (Message("user", QUESTION),), SamplingParams(max_tokens=64), top_k=3, timeout_s=60.0)
    start, *pieces, end = [event async for event in chat.answer(request)]
    await llm.close()
    assert isinstance(start, AnswerStart)
    assert isinstance(end, AnswerEnd)
    return "".join(one.text for one in pieces if isinstance(one, AnswerText)), end


@in_one_loop
async def test_the_user_gets_the_models_sentence_and_the_servers_count(
    retriever: LocalRetriever, server: MisbehavingServer
) -> None:
    server.script = [head(), text("The outage lasted "), text("52 minutes.", "stop"), usage(77, 9), DONE, END]
    shown, end = await seen(retriever, server)
    assert (shown, end.grounded, end.degraded) == ("The outage lasted 52 minutes. [1]", "model", ())
    assert (end.prompt_tokens, end.completion_tokens) == (77, 9)


OUTAGES: dict[str, tuple[Script, str]] = {
    "500": (page("500 Internal Server Error", {"error": {"message": "boom"}}), "llm_unavailable"),
    "401": (page("401 Unauthorized", {"error": {"message": "no"}}), "llm_unavailable"),
    "404": (page("404 Not Found", {"detail": "Not Found"}), "llm_unavailable"),
    "429": (page("429 Too Many Requests", {"error": {"message": "no"}}, Retry_After="5"), "overloaded"),
    "HTML": (page("200 OK", "<html>", "text/html"), "llm_unavailable"),
    "nothing": (page("200 OK", "", ""), "llm_unavailable"),
    "an error in the stream": ([head(), event({"error": {"message": "boom"}}), END], "llm_unavailable"),
    "a cut before the first token": ([head(), None], "llm_unavailable"),
    "no first token": ([head(), text(None), HANG], "llm_timeout"),
    "a cut in the middle": ([head(), text("The outage"), None], "llm_failed"),
    "bad JSON in the middle": ([head(), text("The outage"), piece(b"data: {\n\n"), END], "llm_failed"),
    "no end": ([head(), text("The outage"), DONE, END], "llm_failed"),
}


@in_one_loop
@pytest.mark.parametrize("outage", OUTAGES)
async def test_the_user_gets_quotes_when_the_server_fails(
    retriever: LocalRetriever, server: MisbehavingServer, outage: str
) -> None:
    server.script, reason = OUTAGES[outage]
    patience_s = 0.5 if reason == "llm_timeout" else 30.0
    shown, end = await seen(retriever, server, first_token_timeout_s=patience_s)
    assert (shown, end.grounded, end.degraded, end.finish_reason) == (QUOTED, "quotes", (reason,), "stop")


@in_one_loop
async def test_the_user_gets_quotes_when_there_is_no_server(
    retriever: LocalRetriever, server: MisbehavingServer
) -> None:
    server.stop()
    shown, end = await seen(retriever, server)
    assert (shown, end.degraded) == (QUOTED, ("llm_unavailable",))


@in_one_loop
async def test_a_slow_server_is_waited_for(retriever: LocalRetriever, server: MisbehavingServer) -> None:
    server.script = [0.5, head(), 0.3, text("The outage lasted "), 0.5, text("52 minutes.", "stop"), DONE, END]
    shown, end = await seen(retriever, server)
    assert (shown, end.degraded) == ("The outage lasted 52 minutes. [1]", ())


@in_one_loop
async def test_quotes_complete_what_is_too_slow(retriever: LocalRetriever, server: MisbehavingServer) -> None:
    server.script = [head(), *[step for _ in range(50) for step in (text("slow "), 0.5)]]
    llm = engine(server)
    chat = ChatService(retriever, llm, grounding="gate", settings=AnswerSettings())
    request = ChatRequest("r", (Message("user", QUESTION),), SamplingParams(max_tokens=64), top_k=3, timeout_s=5.0)
    *_, end = [event async for event in chat.answer(request)]
    assert isinstance(end, AnswerEnd)
    assert (end.grounded, end.degraded) == ("quotes", ("llm_timeout",))
    await llm.close()
