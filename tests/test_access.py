"""Who may do what, over the real API: every route refuses by default, and a key opens its own collections only."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
from fastapi import APIRouter
from typer.testing import CliRunner, Result

from app.access import caller
from app.api.authentication import is_open
from app.cli import main
from app.client import Client
from app.domain import Dialect, Document
from app.errors import Forbidden, InvalidKey
from app.keys import create_key
from app.telemetry import JSONFormatter, TextFormatter, logger
from tests.conftest import running
from tests.keyed_service import ADDRESS, QUESTION, KeyedService, add, error_of, keyed_service, settings_for
from tests.scripted_llm import ScriptedLLM
from tests.tiny_models import make_encoder

in_one_loop = pytest.mark.asyncio(loop_scope="module")

CHAT = "/v1/chat/completions"
ACME_FACT = "The outage of the harbour crane lasted 52 minutes."
OTHER_FACT = "The outage of the harbour crane lasted 17 hours, says the memo of the umbrella factory."
JSON_DOCUMENT = {"documents": [{"id": "x", "title": "x", "text": "A text."}]}

# What each route needs, and a request to it that is right: method, path, read/write/admin/any, body.
ROUTES: list[tuple[str, str, str, Any]] = [
    ("POST", "/v1/chat/completions", "read", {**QUESTION, "rag": {"collection": "other"}}),
    (
        "POST",
        "/v1/responses",
        "read",
        {"input": "How long did it last?", "tools": [{"type": "file_search", "vector_store_ids": ["other"]}]},
    ),
    ("GET", "/v1/models", "any", None),
    ("GET", "/v1/models/cleave", "any", None),
    ("GET", "/v1/vector_stores", "any", None),
    ("GET", "/v1/vector_stores/other", "read", None),
    ("POST", "/v1/vector_stores/other/search", "read", {"query": "crane"}),
    ("POST", "/v1/documents?collection=other", "write", JSON_DOCUMENT),
    ("GET", "/v1/documents?collection=other", "read", None),
    ("GET", "/v1/documents/memo?collection=other", "read", None),
    ("DELETE", "/v1/documents/x?collection=other", "write", None),
    ("DELETE", "/v1/documents?collection=other&filters=%7B%22lens%22:%22x%22%7D", "write", None),
    ("GET", "/v1/ingestions", "any", None),
    ("POST", "/v1/search", "read", {"query": "crane", "collection": "other"}),
    ("GET", "/v1/facets?collection=other", "read", None),
    ("GET", "/v1/collections", "any", None),
    ("DELETE", "/v1/collections/other", "write", None),
    ("GET", "/v1/reindex?collection=other", "admin", None),
    ("POST", "/v1/reindex?collection=other", "admin", {"chunking": {"max_tokens": 16}}),
    ("POST", "/v1/reindex/swap?collection=other", "admin", None),
    ("POST", "/v1/reindex/rollback?collection=other", "admin", None),
    ("DELETE", "/v1/reindex?collection=other", "admin", None),
]
each_route = pytest.mark.parametrize(("method", "path", "needs", "body"), ROUTES)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_encoder(tmp_path_factory.mktemp("models") / "encoder"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def service(encoder: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[KeyedService]:
    async with keyed_service(settings_for(tmp_path_factory.mktemp("service"), encoder)) as found:
        yield found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def keys(service: KeyedService) -> dict[str, str]:
    made = {
        "acme": service.create("acme", read=["acme", "acme-*"], write=["acme"]),
        "other": service.create("other", read=["other"], write=["other"]),
        "reader": service.create("reader", read=["acme"]),
        "writer": service.create("writer", write=["acme"]),
        "markdown": service.create("markdown", read=["acme"], dialect="markdown"),
        "admin": service.create("root", is_admin=True),
        "expired": service.create("expired", is_admin=True, expires_at=datetime.now(UTC) - timedelta(days=1)),
    }
    async with service.client(made["acme"]) as acme, service.client(made["other"]) as other:
        assert (await add(acme, "report", ACME_FACT)).json()["data"][0]["status"] == "created"
        assert (await add(other, "memo", OTHER_FACT)).json()["data"][0]["status"] == "created"
    return made


# --- Every route -----------------------------------------------------------------------------------------------------


@in_one_loop
async def test_the_table_of_these_tests_names_every_route(service: KeyedService) -> None:
    named = {(method, path.partition("?")[0]) for method, path, _, _ in ROUTES}
    described = {
        (method.upper(), path)
        for path, methods in service.api.openapi()["paths"].items()
        for method in methods
        if not is_open(path)
    }
    examples = {
        "/v1/documents/{document_id}": "/v1/documents/memo",
        "/v1/collections/{name}": "/v1/collections/other",
        "/v1/models/{model}": "/v1/models/cleave",
        "/v1/vector_stores/{vector_store_id}": "/v1/vector_stores/other",
        "/v1/vector_stores/{vector_store_id}/search": "/v1/vector_stores/other/search",
    }
    # Ingestions, files and batches belong to somebody, and have tests of their own.
    owned = ("{ingestion_id}", "/v1/files", "/v1/batches")
    expected = {
        (method, examples.get(path, path)) for method, path in described if not any(one in path for one in owned)
    }
    assert {(method, path.replace("/v1/documents/x", "/v1/documents/memo")) for method, path in named} == expected


@in_one_loop
@each_route
@pytest.mark.parametrize("sent", ["", "unused", "cleave-0123456789ab-xyz", "expired", "basic"])
async def test_without_a_valid_key_no_route_answers(
    service: KeyedService, keys: dict[str, str], method: str, path: str, needs: str, body: Any, sent: str
) -> None:
    headers = {"Authorization": f"Basic {keys['admin']}"} if sent == "basic" else {}
    async with service.client("" if sent == "basic" else keys.get(sent, sent), **headers) as client:
        response = await client.request(method, path, json=body)
    assert error_of(response) == (401, "invalid_api_key")
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["x-request-id"]


@in_one_loop
@each_route
async def test_a_key_opens_no_route_to_the_collections_of_others(
    service: KeyedService, keys: dict[str, str], method: str, path: str, needs: str, body: Any
) -> None:
    async with service.client(keys["acme"]) as client:
        there = await client.request(method, path, json=body)
        nowhere = json.loads(json.dumps(body).replace("other", "nowhere"))
        absent = await client.request(method, path.replace("other", "nowhere"), json=nowhere)
    if needs == "any":
        assert there.status_code == 200
        assert "other" not in there.text
        return
    assert error_of(there) == (403, "forbidden")
    # Whether there is such a collection does not show.
    assert there.text.replace("'other'", "'nowhere'") == absent.text
    assert "The key 'acme' may not" in there.text
    assert "It may read: acme, acme-*; write: acme." in there.text
    assert OTHER_FACT not in there.text


@in_one_loop
@each_route
async def test_an_admin_may_use_every_route(
    service: KeyedService, keys: dict[str, str], method: str, path: str, needs: str, body: Any
) -> None:
    path, body = path.replace("other", "scratch"), json.loads(json.dumps(body).replace("other", "scratch"))
    async with service.client(keys["admin"]) as client:
        await add(client, "x", "A text about a crane.", collection="scratch")
        response = await client.request(method, path, json=body)
    # Some have nothing to do: there is no index to swap, no document of that name.
    assert response.status_code in (200, 202) or error_of(response) in (
        (400, "invalid_value"),
        (404, "document_not_found"),
        (400, "unknown_filter"),
    )


@in_one_loop
async def test_a_route_that_asks_nothing_of_a_key_is_refused(
    encoder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    forgetful = APIRouter()

    @forgetful.get("/v1/forgetful")
    async def forget() -> str:
        return OTHER_FACT

    @forgetful.get("/v1/careful")
    async def care() -> str:
        return caller.get().readable("acme")

    @forgetful.get("/v1/failing")
    async def fail() -> str:
        raise Forbidden("No.")

    async with keyed_service(settings_for(tmp_path, encoder)) as found:
        found.api.include_router(forgetful)
        async with found.client() as client:
            assert (await client.get("/v1/forgetful")).json() == OTHER_FACT, "without keys there is one user"
        key = found.create("acme", read=["acme"])
        other = found.create("other", read=["other"])
        async with found.client(key) as client, found.client(other) as stranger:
            while (await client.get("/v1/collections", headers={"Authorization": ""})).status_code != 401:
                pass  # The file of keys is looked at once a second.
            refused = await client.get("/v1/forgetful")
            assert error_of(refused) == (403, "forbidden")
            assert OTHER_FACT not in refused.text
            assert (await client.get("/v1/careful")).json() == "acme"
            assert error_of(await stranger.get("/v1/careful")) == (403, "forbidden")
            assert (await client.get("/v1/failing")).json()["error"]["message"] == "No."


# --- Ingestions in the background ------------------------------------------------------------------------------------


@in_one_loop
async def test_an_ingestion_is_there_for_those_who_may_know_of_its_collection(
    service: KeyedService, keys: dict[str, str]
) -> None:
    path = "/v1/documents?background=true"
    async with (
        service.client(keys["other"]) as owner,
        service.client(keys["acme"]) as stranger,
        service.client(keys["reader"]) as reader,
        service.client(keys["admin"]) as admin,
    ):
        for client in (stranger, reader):
            refused = await client.post(f"{path}&collection=other", json=JSON_DOCUMENT)
            assert error_of(refused) == (403, "forbidden")
        accepted = await owner.post(path, json={"documents": [{"id": "memo", "title": "memo", "text": OTHER_FACT}]})
        assert (accepted.status_code, accepted.json()["collection"]) == (202, "other")
        own = f"/v1/ingestions/{accepted.json()['id']}"
        async with asyncio.timeout(60):
            while (body := (await owner.get(own)).json())["status"] != "completed":
                pass
        assert [one["document_id"] for one in body["results"]] == ["memo"]
        listed = {name: await client.get("/v1/ingestions") for name, client in (("o", owner), ("a", admin))}
        assert all(accepted.json()["id"] in one.text for one in listed.values())
        nowhere = "/v1/ingestions/ing_" + "0" * 24
        for method, suffix in (("GET", ""), ("GET", "/events"), ("POST", "/cancel")):
            there, absent = [await stranger.request(method, one + suffix) for one in (own, nowhere)]
            assert error_of(there) == (404, "ingestion_not_found")
            assert there.text.replace(own[len("/v1/ingestions/") :], nowhere[len("/v1/ingestions/") :]) == absent.text
        assert (await stranger.get("/v1/ingestions")).json()["data"] == []
        assert "event: end" in (await owner.get(f"{own}/events")).text
        for client, status in ((owner, 204), (stranger, 404)):
            again = await client.get(f"{own}/events", headers={"Last-Event-ID": "end"})
            assert again.status_code == status


# --- Dialects --------------------------------------------------------------------------------------------------------


@in_one_loop
async def test_a_key_chooses_how_sources_are_told_and_a_request_may_choose_otherwise(
    service: KeyedService, keys: dict[str, str]
) -> None:
    async with service.client(keys["markdown"]) as client:
        told = [
            (await client.post(CHAT, json={**QUESTION, "rag": rag})).json()["choices"][0]["message"]["content"]
            for rag in ({}, {"dialect": "annotations"})
        ]
    assert told[0].startswith(told[1])
    assert "report" in told[0][len(told[1]) :]


# --- Rights ----------------------------------------------------------------------------------------------------------


@in_one_loop
async def test_a_tenant_need_not_name_its_collection(service: KeyedService, keys: dict[str, str]) -> None:
    for name, own, foreign in (("acme", "52 minutes", "17 hours"), ("other", "17 hours", "52 minutes")):
        async with service.client(keys[name]) as client:
            answered = await client.post(CHAT, json=QUESTION)
            found = await client.post("/v1/search", json={"query": "outage of the harbour crane"})
            listed = await client.get("/v1/documents")
            held = (await client.get("/v1/collections")).json()["data"]
        for response in (answered, found):
            assert own in response.text
            assert foreign not in response.text
        assert listed.json()["total"] == 1
        assert [(one["name"], one["num_documents"], one["is_default"]) for one in held] == [(name, 1, True)]


@in_one_loop
@pytest.mark.parametrize(
    ("name", "allowed", "refused"),
    [
        ("reader", [("GET", "/v1/documents")], [("DELETE", "/v1/documents/report")]),
        ("writer", [], [("GET", "/v1/documents"), ("GET", "/v1/documents/report")]),
    ],
)
async def test_reading_and_writing_are_rights_of_their_own(
    service: KeyedService, keys: dict[str, str], name: str, allowed: list[Any], refused: list[Any]
) -> None:
    async with service.client(keys[name]) as client:
        for method, path in allowed:
            assert (await client.request(method, path)).status_code == 200
        for method, path in refused:
            assert error_of(await client.request(method, path)) == (403, "forbidden")
        if name == "writer":
            assert (await add(client, "note", "A crane in a note.")).status_code == 200
            assert (await client.delete("/v1/documents/note")).status_code == 200
            for body in (QUESTION, {**QUESTION, "rag": {"enabled": False}}):
                assert error_of(await client.post(CHAT, json=body)) == (403, "forbidden")


@in_one_loop
async def test_an_upload_of_nothing_readable_is_reported_to_who_may_upload(
    service: KeyedService, keys: dict[str, str]
) -> None:
    files = [("files", ("photo.md", b"\x89PNG\x00\x00"))]
    async with service.client(keys["acme"]) as client:
        reported = await client.post("/v1/documents", files=files)
        refused = await client.post("/v1/documents", files=files, params={"collection": "other"})
    assert reported.json()["data"][0]["status"] == "failed"
    assert error_of(refused) == (403, "forbidden")


@in_one_loop
async def test_a_missing_collection_is_said_without_naming_others(service: KeyedService, keys: dict[str, str]) -> None:
    async with service.client(keys["acme"]) as client:
        response = await client.post("/v1/search", json={"query": "crane", "collection": "acme-2030"})
    assert error_of(response) == (404, "collection_not_found")
    assert response.json()["error"]["message"].startswith("There is no collection 'acme-2030'. ")
    assert "other" not in response.text


@in_one_loop
@pytest.mark.parametrize(
    "path", ["/", "/livez", "/health", "/readyz", "/readyz?verbose", "/docs", "/openapi.json", "/web/main.js"]
)
async def test_what_is_the_same_for_everyone_needs_no_key(
    service: KeyedService, keys: dict[str, str], path: str
) -> None:
    async with service.client(address="203.0.113.9") as client:
        response = await client.get(path)
    assert response.status_code == 200
    # The description names the fields of every answer; of what they hold nothing is told anywhere.
    fields = () if path == "/openapi.json" else ("num_documents", "filter_fields")
    assert not [word for word in ("acme", "keys_file", "rates_url", *fields) if word in response.text]


@in_one_loop
@pytest.mark.parametrize(
    "path",
    ["/web/../v1/documents", "/web/%2e%2e/v1/documents", "//v1/documents", "/v1/documents/", "/docs/../v1/models"],
)
async def test_no_other_way_to_write_a_path_needs_less(service: KeyedService, keys: dict[str, str], path: str) -> None:
    async with service.client() as client:
        response = await client.get(httpx.URL(ADDRESS).copy_with(raw_path=path.encode()))
    assert response.status_code in (401, 404)


@in_one_loop
async def test_a_slash_too_many_leads_to_the_route(service: KeyedService, keys: dict[str, str]) -> None:
    async with service.client(keys["acme"]) as client:
        assert (await client.get("/v1/collections/", follow_redirects=True)).status_code == 200


@in_one_loop
async def test_the_description_says_which_routes_need_a_key(service: KeyedService) -> None:
    paths = service.api.openapi()["paths"]
    secured = {path for path, methods in paths.items() if all("security" in one for one in methods.values())}
    assert secured == {path for path in paths if not is_open(path)}


# --- Without keys ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "headers", "is_served"),
    [
        ("127.0.0.1", {}, True),
        ("::1", {}, True),
        ("::ffff:127.0.0.1", {}, True),
        ("192.0.2.7", {}, False),
        ("testclient", {}, False),
        ("127.0.0.1", {"X-Forwarded-For": "192.0.2.7"}, False),
        ("127.0.0.1", {"Forwarded": "for=192.0.2.7"}, False),
        ("127.0.0.1", {"X-Real-IP": "192.0.2.7"}, False),
    ],
)
@pytest.mark.parametrize("is_allowed", [False, True])
async def test_without_keys_only_this_machine_is_served(
    encoder: str, tmp_path: Path, address: str, headers: dict[str, str], is_served: bool, is_allowed: bool
) -> None:
    async with (
        keyed_service(settings_for(tmp_path, encoder, allow_without_keys=is_allowed)) as found,
        found.client("unused", address=address, **headers) as client,
    ):
        response = await client.get("/v1/documents")
    if is_served or is_allowed:
        assert response.status_code == 200
    else:
        assert error_of(response) == (403, "forbidden")
        assert "`cleave keys create`" in response.text


async def test_a_key_is_needed_also_where_other_machines_were_allowed(encoder: str, tmp_path: Path) -> None:
    async with keyed_service(settings_for(tmp_path, encoder, allow_without_keys=True)) as found:
        found.create("acme", read=["*"])
        async with found.client() as client:
            assert error_of(await client.get("/v1/documents")) == (401, "invalid_api_key")


# --- The log ---------------------------------------------------------------------------------------------------------


class Lines(logging.Handler):
    """What the log prints."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.setFormatter(JSONFormatter())
        self.lines: list[dict[str, Any]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(json.loads(self.format(record)))

    def of(self, request_id: str) -> dict[str, Any]:
        [line] = [one for one in self.lines if one["message"] == "request" and one.get("request_id") == request_id]
        return line


async def test_each_request_is_one_line_that_says_who_did_what(
    encoder: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    lines = Lines()
    logger.addHandler(lines)
    level = logger.level
    logger.setLevel(logging.DEBUG)
    llm = ScriptedLLM("The outage lasted 52 minutes.")
    secrets = []
    try:
        async with keyed_service(settings_for(tmp_path, encoder), llm) as found:
            key = found.create("acme", read=["acme"], write=["acme"], tokens_per_minute=10_000)
            secrets = [key, key.rpartition("-")[2], key[20:]]
            async with found.client(key) as client, found.client(f"{key}x") as wrong:
                await add(client, "report", ACME_FACT)
                said = [
                    await client.post(CHAT, json=QUESTION, headers={"x-request-id": "asked"}),
                    await client.post(CHAT, json={**QUESTION, "stream": True}, headers={"x-request-id": "streamed"}),
                    await client.get("/v1/documents/report", headers={"x-request-id": "read"}),
                    await client.get(
                        "/v1/documents", params={"collection": "other"}, headers={"x-request-id": "refused"}
                    ),
                    await wrong.get("/v1/documents", headers={"x-request-id": "wrong"}),
                    await client.get(f"/v1/documents?key={key}", headers={"x-request-id": "misplaced"}),
                ]
    finally:
        logger.removeHandler(lines)
        logger.setLevel(level)
    usage = said[0].json()["usage"]
    line = lines.of("asked")
    expected = {
        "key": "acme",
        "method": "POST",
        "route": CHAT,
        "collection": "acme",
        "status": 200,
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
    }
    assert usage["prompt_tokens"] == 100
    assert {name: line[name] for name in expected} == expected
    assert line["duration_ms"] >= 0
    assert line["key_id"] == key.split("-")[1]
    assert lines.of("streamed")["completion_tokens"] == usage["completion_tokens"]
    assert lines.of("read")["route"] == "/v1/documents/{document_id:path}"
    assert (lines.of("refused")["status"], lines.of("refused")["collection"]) == (403, "other")
    assert (lines.of("wrong")["status"], lines.of("wrong")["key"]) == (401, None)
    printed = capfd.readouterr()
    everything = json.dumps(lines.lines) + printed.out + printed.err + "".join(one.text for one in said)
    assert not [secret for secret in secrets if secret in everything]


def test_the_text_format_says_the_same_in_one_line() -> None:
    extra = {"key": "acme", "status": 200, "collection": None}
    record = logging.makeLogRecord({"levelname": "INFO", "msg": "request", **extra})
    assert TextFormatter().format(record).endswith(" INFO request key=acme status=200")


@pytest.mark.parametrize("path", ["/v1/x\n2026 INFO request key=root", "/v1/x key=root", "/v1/\u2028\x1b[2J\x85", ""])
def test_no_path_forges_a_line_or_a_field_of_the_log(path: str) -> None:
    record = logging.makeLogRecord({"levelname": "INFO", "msg": "request", "path": path, "status": 404})
    line = TextFormatter().format(record)
    assert line.isprintable()
    assert line.endswith(f" INFO request path={path!r} status=404")


# --- The terminal ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def live(encoder: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    folder = tmp_path_factory.mktemp("live")
    with running(settings_for(folder, encoder)) as running_service:
        yield running_service.url, folder


def cleave(url: str, key: str, *arguments: str) -> Result:
    environment = {"CLEAVE_URL": url, "CLEAVE_API_KEY": key, "COLUMNS": "200"}
    return CliRunner().invoke(main, list(arguments), env=environment)


def test_the_terminal_sends_a_key_and_explains_a_refusal_in_one_line(live: tuple[str, Path]) -> None:
    url, folder = live
    sent = create_key(folder / "keys.json", "acme", read=["acme"], write=["acme"])[1]
    reader = create_key(folder / "keys.json", "reader", read=["acme"])[1]
    note = folder / "note.md"
    note.write_text(f"# Crane\n\n{ACME_FACT}", encoding="utf-8")
    while cleave(url, sent, "ingest", str(note)).exit_code != 0:
        pass  # The file of keys is looked at once a second.
    verbs = [
        ["ask", "How long did the outage last?"],
        ["search", "crane"],
        ["documents"],
        ["documents", "show", "note.md"],
    ]
    for key in (sent, reader):
        for verb in verbs:
            done = cleave(url, key, *verb)
            assert done.exit_code == 0, done.output
            assert "Crane" in done.stdout
    for verb in [*verbs, ["ingest", str(note)], ["reindex", "--rollback"]]:
        refused = cleave(url, "", *verb)
        assert (refused.exit_code, refused.stdout.strip()) == (2, "")
        assert "environment variable CLEAVE_API_KEY" in refused.stderr
        assert refused.stderr.count("\n") == 1
    forbidden = cleave(url, reader, "ingest", str(note))
    assert forbidden.exit_code == 2
    assert (
        "The key 'reader' may not write to the collection 'acme'. It may read: acme; write: nothing."
        in forbidden.stderr
    )
    assert forbidden.stderr.count("\n") == 1
    assert sent not in forbidden.output


def test_serving_other_machines_without_a_key_is_refused_before_anything_starts(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text(
        "http_options: {host: 0.0.0.0, port: 8000}\n"
        "applications: [{name: cleave, import_path: 'deployments.application:monolith', "
        f"args: {{data_dir: '{tmp_path}/data'}}}}]",
        encoding="utf-8",
    )
    refused = CliRunner().invoke(main, ["serve", str(file)])
    assert refused.exit_code == 2
    assert "`cleave keys create NAME --admin`, or set http_options.host: 127.0.0.1." in refused.output
    assert refused.output.count("\n") == 1
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("dialect", ["openwebui", "markdown"])
async def test_the_terminals_client_is_told_sources_in_its_own_way(
    encoder: str, tmp_path: Path, dialect: Dialect
) -> None:
    async with keyed_service(settings_for(tmp_path, encoder)) as found:
        key = found.create("webui", read=["acme"], write=["acme"], dialect=dialect)
        async with Client(ADDRESS, api_key=key, transport=httpx.ASGITransport(found.api)) as client:
            await client.add([Document("report", "Report", ACME_FACT)])
            question = "How long did the outage of the harbour crane last?"
            message = (await client.chat(question))["choices"][0]["message"]
            chunks = [chunk async for chunk in client.stream_chat(question)]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    assert message["content"] == "".join(delta.get("content") or "" for delta in deltas) == f"“{ACME_FACT}” [1]"


async def test_the_terminals_client_sends_the_key_and_explains_a_refusal(encoder: str, tmp_path: Path) -> None:
    async with keyed_service(settings_for(tmp_path, encoder)) as found:
        key = found.create("acme", read=["acme"], write=["acme"])
        transport = httpx.ASGITransport(found.api)
        async with Client(ADDRESS, api_key=key, transport=transport) as client:
            assert await client.collections() == []
            with pytest.raises(Forbidden, match="may not read the collection 'other'"):
                async with aclosing(
                    Client(ADDRESS, collection="other", api_key=key, transport=transport).documents()
                ) as all_:
                    await anext(all_)
        async with Client(ADDRESS, transport=transport) as client:
            with pytest.raises(InvalidKey, match="environment variable CLEAVE_API_KEY"):
                await client.collections()
