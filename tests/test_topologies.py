"""Three topologies, same answers: the shipped configs get the same requests, and whole responses are compared."""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml

from tests.running_service import ROOT, free_port, running, share_prepared_models
from tests.test_docs import code_of, rows, section
from tests.transcript import (
    Exchange,
    Request,
    chunks_of,
    declared_only,
    exchange_of,
    in_background,
    leaving,
    normalised,
    record,
    text_of,
)

CONFIGS = {
    "three_tier": "serve_config.yaml",
    "two_tier": "deploy/two_tier.yaml",
    "monolith": "deploy/monolith.yaml",
}
REFERENCE, *OTHERS = CONFIGS
CHAT = "/v1/chat/completions"
RAW = "SmolLM2-135M-Instruct"
REFUSAL = "The documents do not hold an answer to this question."
NOT_ASKED_FOR = {
    "overloaded",
    "llm_unavailable",
    "llm_cold",
    "retriever_unavailable",
    "collection_mismatch",
    "write_conflict",
    "deletion_failed",
    "unavailable",
    "internal_error",
    "configuration_error",
    "too_slow",
    "storage_full",
    "invalid_api_key",
    "forbidden",
    "rate_limit_exceeded",
    "keys_unreadable",
}
"""Errors of the README's table that no single quick request causes in a service that is well and has no keys."""

OUTAGE = "How long did the Reading Room outage on 14 October 2025 last?"
QUESTIONS = [
    json.loads(line) for line in (ROOT / "examples" / "questions.jsonl").read_text(encoding="utf-8").splitlines()
]
WINDOW = "What chunk size and overlap does Teodor Vaskelin use?"
SECTION = "How long may a section be before it is split, according to Marit Oldershaw?"
CANARY = "What share of conversations does the Reading Room canary receive, and for how long?"
STORY = "Write a very long story about a lighthouse."
HERONS = "When do the herons of Dunmere move to the north pond?"
HERON_ID = "herons/plan #1?.md"
HERON_PATH = f"/v1/documents/{quote(HERON_ID)}"


def get(path: str, status: int = 200, code: str = "", holds: tuple[str, ...] = (), **options: Any) -> Request:
    return Request("GET", path, options, status, code, holds)


def post(path: str, body: Any, status: int = 200, code: str = "", holds: tuple[str, ...] = ()) -> Request:
    return Request("POST", path, {"json": body}, status, code, holds)


def ask(
    question: str, *holds: str, status: int = 200, code: str = "", rag: Mapping[str, Any] | None = None, **body: Any
) -> Request:
    # Patient: whether an answer is made in time is not the question here.
    options = {"timeout_s": 300, **(rag or {})}
    return post(
        CHAT, {"messages": [{"role": "user", "content": question}], "rag": options, **body}, status, code, holds
    )


def stream(question: str, *holds: str, **body: Any) -> Request:
    return ask(question, *holds, stream=True, stream_options={"include_usage": True}, **body)


def wrong(body: Any, holds: str, code: str = "invalid_value", path: str = CHAT, status: int = 400) -> Request:
    return post(path, body, status, code, (holds,))


def grounded(how: str) -> str:
    return f'"grounded": "{how}"'


def upload(files: Mapping[str, bytes], *holds: str, metadata: str = "{}", status: int = 200, code: str = "") -> Request:
    options = {"files": [("files", file) for file in files.items()], "data": {"metadata": metadata}}
    return Request("POST", "/v1/documents", options, status, code, holds)


def herons(day: int) -> dict[str, Any]:
    text = f"The herons of Dunmere move to the north pond on {day} May 2026."
    heron = {"id": HERON_ID, "title": "Heron plan", "text": text, "metadata": {"team": "ponds", "round": 2}}
    return {"documents": [heron, {"id": "empty", "text": "  "}]}


def said(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]


def sample(number: int, how: str) -> Request:
    """Ask one of the sample questions."""
    question = QUESTIONS[number]
    return ask(question["question"], question["answer"] or REFUSAL, grounded(how))


UNSUPPORTED: dict[str, Any] = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "n": 2,
    "logprobs": True,
    "stop": list("abcde"),
}
USER: dict[str, Any] = {"messages": [{"role": "user", "content": OUTAGE}]}

REQUESTS: dict[str, Request] = {
    # The service as it starts.
    "live": get("/livez", holds=('"status": "ok"',)),
    "health": get("/health", holds=('"status": "ok"',)),
    "ready": get("/readyz", holds=('"status": "ready"',)),
    "ready-verbose": get("/readyz?verbose", holds=('"num_documents": 14', '"engine": "vllm"', '"num_running": 0')),
    "models": get("/v1/models", holds=('"cleave"', f'"{RAW}"')),
    "page": get("/", holds=("Cleave",)),
    "page-script": get("/web/main.js", holds=("function",)),
    "page-missing": get("/web/missing.js", 404, "not_found"),
    "api-description": get("/openapi.json", holds=("/v1/chat/completions",)),
    "api-page": get("/docs", holds=("swagger",)),
    # Answers.
    "question-outage": sample(11, "model"),
    "question-canary": sample(13, "model"),
    "question-mixed": ask(WINDOW, "256", grounded("mixed")),
    "question-batching": sample(0, "quotes"),
    "question-football": sample(20, "refused"),
    "question-egg": sample(21, "refused"),
    "stream-model": stream(OUTAGE, "52 minutes", "[DONE]"),
    "stream-quotes": stream(QUESTIONS[0]["question"], "from 2.4 s to 600 ms", "[DONE]"),
    "stream-refused": stream(QUESTIONS[20]["question"], REFUSAL, "[DONE]"),
    "stream-without-usage": ask(QUESTIONS[20]["question"], REFUSAL, "[DONE]", stream=True),
    "conversation": ask(
        "",
        "52 minutes",
        messages=[
            {"role": "system", "content": "Be brief."},
            *said("What is Reading Room?", "A chat service of the Lanternfish wiki.", OUTAGE),
        ],
    ),
    "conversation-too-long": ask(
        "", "52 minutes", "history_trimmed", messages=said("word " * 9000, "I see.", OUTAGE), max_tokens=40
    ),
    "author": ask(SECTION, "900 tokens", rag={"filters": {"author": "Marit Oldershaw"}}),
    "author-unknown": ask(OUTAGE, "No document matches", grounded("refused"), rag={"filters": {"author": "Nobody"}}),
    "top-k": ask(OUTAGE, "52 minutes", '"presented": [1]', rag={"top_k": 1}),
    "top-k-many": ask(QUESTIONS[20]["question"], '"n": 20', rag={"top_k": 20}),
    "without-documents": ask("Say hello.", grounded("unchecked"), max_tokens=12, rag={"enabled": False}),
    "raw": ask("Say hello.", '"finish_reason": "length"', grounded("unchecked"), model=RAW, max_tokens=12),
    "raw-stream": stream("Say hello.", "[DONE]", model=RAW, max_tokens=24),
    "raw-stop": ask("Say hello.", '"finish_reason": "stop"', model=RAW, stop=["e"], seed=7, top_p=0.9),
    "raw-conversation-too-long": ask(
        "", "history_trimmed", model=RAW, messages=said("word " * 9000, "I see.", "Say hello."), max_tokens=8
    ),
    # Passages.
    "search": post("/v1/search", {"query": OUTAGE}, holds=("52 minutes", '"n": 5')),
    "search-top-k": post("/v1/search", {"query": "KV cache", "top_k": 12}, holds=('"n": 12',)),
    "search-author": post(
        "/v1/search", {"query": "chunk size", "filters": {"author": "Teodor Vaskelin"}}, holds=("256 tokens",)
    ),
    "search-authors": post(
        "/v1/search",
        {"query": CANARY, "filters": {"author": ["Noor Hallivant", "Marit Oldershaw"]}},
        holds=("48 hours",),
    ),
    "search-author-unknown": post("/v1/search", {"query": OUTAGE, "filters": {"author": "Nobody"}}, holds=("[]",)),
    # Wrong requests.
    "no-messages": wrong({"messages": []}, '"param": "messages"'),
    "no-body": wrong({}, '"param": "messages"'),
    "wrong-temperature": wrong({**USER, "temperature": 9}, '"param": "temperature"'),
    "wrong-top-k": wrong({**USER, "rag": {"top_k": 0}}, '"param": "rag.top_k"'),
    "misspelt-option": wrong({**USER, "rag": {"filter": {}}}, '"param": "rag.filter"'),
    "empty-query": wrong({"query": "  "}, '"param": "query"', path="/v1/search"),
    "wrong-page": get("/v1/documents?limit=0", 400, "invalid_value", ('"param": "limit"',)),
    "not-json": Request(
        "POST", CHAT, {"content": b"{", "headers": {"Content-Type": "application/json"}}, 400, "invalid_value"
    ),
    "no-object": wrong([], "not a JSON object"),
    "documents-not-json": Request(
        "POST",
        "/v1/documents",
        {"content": b"{", "headers": {"Content-Type": "application/json"}},
        400,
        "invalid_value",
    ),
    "documents-none": wrong({"documents": []}, '"param": "documents"', path="/v1/documents"),
    **{
        f"unsupported-{name}": wrong({**USER, name: value}, f'"param": "{name}"', "unsupported_parameter")
        for name, value in UNSUPPORTED.items()
    },
    "too-long": ask("word " * 9000, status=400, code="context_length_exceeded", model=RAW),
    "too-long-stream": ask("word " * 9000, status=400, code="context_length_exceeded", model=RAW, stream=True),
    "too-long-without-documents": ask(
        "word " * 9000, status=400, code="context_length_exceeded", rag={"enabled": False}
    ),
    "unknown-filter": ask(OUTAGE, "author", status=400, code="unknown_filter", rag={"filters": {"autor": "x"}}),
    "unknown-filter-stream": ask(
        OUTAGE, status=400, code="unknown_filter", rag={"filters": {"autor": "x"}}, stream=True
    ),
    "unknown-filter-search": wrong({"query": "x", "filters": {"autor": "x"}}, "author", "unknown_filter", "/v1/search"),
    "broken-form": Request(
        "POST",
        "/v1/documents",
        {"content": b"--x", "headers": {"Content-Type": "multipart/form-data"}},
        400,
        "bad_request",
    ),
    "other-site": Request(
        "POST", CHAT, {"json": USER, "headers": {"Origin": "https://evil.example"}}, 403, "cross_origin"
    ),
    "other-site-deletes": Request(
        "DELETE", "/v1/documents/x", {"headers": {"Origin": "https://evil.example"}}, 403, "cross_origin"
    ),
    "no-route": get("/nowhere", 404, "not_found"),
    "no-model": ask(OUTAGE, "cleave", status=404, code="model_not_found", model="gpt-5"),
    "no-document": get("/v1/documents/nothing", 404, "document_not_found"),
    "no-method": Request("PUT", "/v1/documents", {}, 405, "method_not_allowed"),
    "no-method-chat": get(CHAT, 405, "method_not_allowed"),
    "too-large": Request(
        "POST", CHAT, status=413, code="too_large", send=declared_only(CHAT, num_bytes=104_857_600 + 1)
    ),
    "other-type": Request(
        "POST",
        "/v1/documents",
        {"content": b"x", "headers": {"Content-Type": "text/plain"}},
        415,
        "unsupported_media_type",
    ),
    "compressed": Request(
        "POST",
        CHAT,
        {"content": b"x", "headers": {"Content-Type": "application/json", "Content-Encoding": "gzip"}},
        415,
        "compressed_body",
    ),
    "many-headers": get("/livez", 431, "headers_too_large", headers={f"X-{n}": "y" for n in range(120)}),
    "own-request-id": get("/livez", holds=('"ok"',), headers={"X-Request-ID": "mine-1"}),
    "own-request-id-refused": get("/livez", headers={"X-Request-ID": "not sane!"}),
    # Documents. From here on the collection changes.
    "list": get("/v1/documents", holds=('"total": 14', '"has_more": false')),
    "list-page": get("/v1/documents?limit=3", holds=('"has_more": true',)),
    "list-next-page": get("/v1/documents?limit=3&after=articles/chunk-by-heading.md"),
    "read": get("/v1/documents/articles/chunk-by-heading.md", holds=("900 tokens",)),
    "create": post("/v1/documents", herons(3), holds=('"created"', '"failed"', "has no text")),
    "create-again": post("/v1/documents", herons(3), holds=('"unchanged"',)),
    "update": post("/v1/documents", herons(9), holds=('"updated"',)),
    "read-created": get(HERON_PATH, holds=("9 May", '"team": "ponds"')),
    "ask-created": ask(HERONS, "9 May", f"http://service/v1/documents/{quote(HERON_ID)}#"),
    "search-created-by-number": post("/v1/search", {"query": HERONS, "filters": {"round": 2}}, holds=("9 May",)),
    "upload": upload(
        {
            "storks.md": b"---\nauthor: Ada\n---\n# Storks\n\nNine storks nest on the mill of Dunmere.",
            "page.html": b"<h1>Mill</h1><p>The mill of Dunmere was built in 1782.</p>",
            "broken.pdf": b"This is no PDF.",
            "program.exe": b"MZ",
            "large.txt": b"x" * (26_214_400 + 1),
        },
        '"created"',
        '"failed"',
        metadata='{"team": "mill"}',
    ),
    "upload-again": upload(
        {"storks.md": b"---\nauthor: Ada\n---\n# Storks\n\nNine storks nest on the mill of Dunmere."},
        '"unchanged"',
        metadata='{"team": "mill"}',
    ),
    "upload-changed": upload(
        {"storks.md": b"# Storks\n\nTen storks nest on the mill of Dunmere."}, '"updated"', metadata='{"team": "mill"}'
    ),
    "upload-without-file": Request(
        "POST", "/v1/documents", {"data": {"metadata": "{}"}, "files": [("other", ("x", b"x"))]}, 400, "invalid_value"
    ),
    "upload-wrong-metadata": upload(
        {"x.md": b"x"}, '"param": "metadata"', metadata="[]", status=400, code="invalid_value"
    ),
    "search-uploaded": post(
        "/v1/search", {"query": "storks mill", "filters": {"team": "mill"}}, holds=("Ten storks", "1782")
    ),
    "list-changed": get("/v1/documents", holds=('"total": 17',)),
    "ready-changed": get("/readyz?verbose", holds=('"num_documents": 17', '"team"')),
    "delete": Request("DELETE", HERON_PATH, holds=('"deleted": true',)),
    "delete-again": Request("DELETE", HERON_PATH, status=404, code="document_not_found"),
    "read-deleted": get(HERON_PATH, 404, "document_not_found"),
    "ask-deleted": ask(HERONS, REFUSAL),
    "filter-deleted": ask(HERONS, rag={"filters": {"team": "ponds"}}),
    "delete-uploaded": Request("DELETE", "/v1/documents/storks.md", holds=('"deleted": true',)),
    "list-deleted": get("/v1/documents", holds=('"total": 15',)),
    "ready-deleted": get("/readyz?verbose", holds=('"num_documents": 15',)),
    # Other collections.
    "no-collection": get("/v1/documents?collection=nowhere", 404, "collection_not_found"),
    "create-elsewhere": post("/v1/documents?collection=elsewhere", herons(3), holds=('"created"',)),
    "list-collections": get("/v1/collections", holds=('"name": "default"', '"name": "elsewhere"')),
    "search-elsewhere": post("/v1/search", {"query": HERONS, "collection": "elsewhere"}, holds=("3 May",)),
    "search-here": post("/v1/search", {"query": HERONS, "top_k": 1}),
    "read-elsewhere": get(f"{HERON_PATH}?collection=elsewhere", holds=("3 May",)),
    "ingest-elsewhere": Request(
        "POST",
        "/v1/documents",
        status=202,
        holds=('"completed"', '"updated"', "has no text", '"is_ended": true'),
        send=in_background(herons(5), "elsewhere"),
    ),
    "no-file": get("/v1/files/nothing", 404, "file_not_found"),
    "no-batch": get("/v1/batches/nothing", 404, "batch_not_found"),
    "no-ingestion": get("/v1/ingestions/nothing", 404, "ingestion_not_found"),
    "list-filtered": get('/v1/documents?collection=elsewhere&filters={"team": "ponds"}', holds=('"total": 1',)),
    "read-chunk": get(f"{HERON_PATH}?collection=elsewhere&chunk=0", holds=("5 May",)),
    "read-page": get(f"{HERON_PATH}?collection=elsewhere", holds=("<article",), headers={"Accept": "text/html"}),
    "delete-elsewhere": Request("DELETE", f"{HERON_PATH}?collection=elsewhere", holds=('"deleted": true',)),
    "drop-collection": Request("DELETE", "/v1/collections/elsewhere", holds=('"collection.deleted"',)),
    "drop-default": Request("DELETE", "/v1/collections/default", status=400, code="invalid_value"),
    "reindex-status": get("/v1/reindex", holds=('"state": "none"', '"prompt.format"')),
    "swap-nothing": post("/v1/reindex/swap", {}, 400, "invalid_value"),
    # Time runs out, and clients leave.
    "deadline-of-retrieval": ask(OUTAGE, "retrieval", status=504, code="deadline_exceeded", rag={"timeout_s": 0.001}),
    "deadline-of-generation": ask(
        STORY, "the answer", status=504, code="deadline_exceeded", rag={"timeout_s": 1}, model=RAW, max_tokens=4000
    ),
    "deadline-in-stream": stream(STORY, "deadline_exceeded", rag={"timeout_s": 6}, model=RAW, max_tokens=4000),
    **{
        f"leaving-{kind}": Request(
            "POST",
            CHAT,
            holds=('"freed": true',),
            send=leaving(
                CHAT,
                {**USER, "messages": said(STORY), "model": RAW, "max_tokens": 4000, "stream": kind == "stream"},
            ),
        )
        for kind in ("stream", "whole")
    },
    "ready-in-the-end": get("/readyz?verbose", holds=('"num_running": 0',)),
    "answer-in-the-end": ask(OUTAGE, "52 minutes", grounded("model")),
}

SAME_TEXT = {
    "stream-model": "question-outage",
    "stream-quotes": "question-batching",
    "stream-refused": "question-football",
    "stream-without-usage": "question-football",
}
"""Streams, and the requests for the same answer as a whole."""

each_topology = pytest.mark.parametrize("topology", CONFIGS)
each_request = pytest.mark.parametrize("name", REQUESTS)


@pytest.fixture(scope="module")
def transcripts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Exchange]]:
    """Run the topologies one after the other, and write down what each answers."""
    folder = tmp_path_factory.mktemp("topologies")
    found = {}
    for topology in CONFIGS:
        try:
            with running(write_shipped_config(topology, folder)) as service:
                found[topology] = record(service, REQUESTS)
        except BaseException as error:
            error.add_note(f"This was {topology}, {CONFIGS[topology]}.")
            raise
    return found


def write_shipped_config(topology: str, folder: Path) -> Path:
    """Copy a config of the repository; what this machine demands is changed, and nothing else."""
    config = yaml.safe_load((ROOT / CONFIGS[topology]).read_text(encoding="utf-8"))
    own = folder / topology
    config["http_options"]["port"] = free_port()
    config["applications"][0]["args"]["data_dir"] = str(own / "data")
    config["applications"][0]["args"]["llm"]["device"] = "cpu"
    share_prepared_models(own / "data")
    path = own / "serve_config.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(3600)
@each_topology
@each_request
def test_a_response_is_what_the_api_promises(
    transcripts: dict[str, dict[str, Exchange]], name: str, topology: str
) -> None:
    request, exchange = REQUESTS[name], transcripts[topology][name]
    shown = json.dumps(exchange, ensure_ascii=False, indent=2)
    body = json.dumps(exchange.get("body"), ensure_ascii=False)
    assert exchange.get("status", request.status) == request.status, shown
    assert not request.code or exchange["body"]["error"]["code"] == request.code, shown
    assert not [text for text in request.holds if text not in body], shown


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("topology", OTHERS)
@each_request
def test_every_topology_answers_the_same(transcripts: dict[str, dict[str, Exchange]], name: str, topology: str) -> None:
    expected, found = transcripts[REFERENCE][name], transcripts[topology][name]
    assert found == expected, difference(expected, found, topology)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(3600)
@each_topology
@pytest.mark.parametrize(("streamed", "whole"), SAME_TEXT.items())
def test_a_stream_says_the_same_as_a_whole_answer(
    transcripts: dict[str, dict[str, Exchange]], topology: str, streamed: str, whole: str
) -> None:
    assert text_of(transcripts[topology][streamed]) == text_of(transcripts[topology][whole])


def difference(expected: Exchange, found: Exchange, topology: str) -> str:
    """Show where two exchanges differ, line by line."""
    before, after = (json.dumps(one, ensure_ascii=False, indent=2).splitlines() for one in (expected, found))
    return "\n".join(["", *difflib.unified_diff(before, after, REFERENCE, topology, lineterm="", n=8)])


def test_every_error_that_a_client_can_cause_is_asked_for() -> None:
    named = {code_of(row[1]) for row in rows(section("Errors")) if len(row) > 1} - {"", "code"}
    assert named > NOT_ASKED_FOR
    asked_for = {request.code for request in REQUESTS.values()} - {""}
    assert asked_for == named - NOT_ASKED_FOR


def test_only_ids_times_and_addresses_are_normalised() -> None:
    made, url = "0123456789abcdef" * 2, "http://127.0.0.1:4321"
    body = {
        "id": f"chatcmpl-{made}",
        "created": 1_795_265_187,
        "rag": {"request_id": made, "timings_ms": {"total": 3.5, "retrieve": 1.2}, "cited": [1]},
        "choices": [{"url": f"{url}/v1/documents/x#0", "text": f"at {made}", "date": "2026-01-20"}],
        "content_hash": made * 2,
    }
    assert normalised(body, url) == {
        "id": "<id>",
        "created": "<created>",
        "rag": {"request_id": "<id>", "timings_ms": {"retrieve": "<ms>", "total": "<ms>"}, "cited": [1]},
        "choices": [{"url": "http://service/v1/documents/x#0", "text": f"at {made}", "date": "2026-01-20"}],
        "content_hash": made * 2,
    }


def test_headers_are_read_once_and_without_times() -> None:
    headers = [("Date", "now"), ("X-Request-ID", "a"), ("x-request-id", "a"), ("Allow", "GET")]
    assert exchange_of(405, headers, "no")["headers"] == {"allow": ["GET"], "date": ["<date>"], "x-request-id": ["a"]}


def test_a_stream_is_read_without_regard_to_where_its_text_is_cut() -> None:
    def piece(text: str, **more: Any) -> dict[str, Any]:
        return {"choices": [{"delta": {"content": text}}], **more}

    def sent(*chunks: Any) -> str:
        return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks)

    start = piece("", rag={})
    end: dict[str, Any] = {"choices": [{"delta": {}}]}
    expected = [start, piece("one two"), end, "[DONE]"]
    done = "data: [DONE]\n\n"
    assert chunks_of(sent(start, piece("one "), piece("two"), end) + done) == expected
    assert chunks_of(sent(start) + ": ping\n\n" + sent(piece("o"), piece("ne two"), end) + done) == expected
    broken = sent(start, piece("one"), {"error": {"code": "x"}})
    assert chunks_of(broken) == [start, {"error": {"code": "x"}}]
