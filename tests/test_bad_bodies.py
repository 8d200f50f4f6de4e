"""What clients send that nobody should: each is refused in the one shape, at once, and harms nobody else."""

import gzip
import json
import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.types import Message

from app.api import uploads
from app.errors import TooLarge
from app.json_limits import MAX_VALUES, PIECE, check_num_values
from tests.keyed_service import error_of, keyed_service, settings_for
from tests.test_access import ROUTES
from tests.test_bad_connections import assert_unharmed, connect
from tests.test_uploads import FORM, answer, head
from tests.tiny_models import make_encoder

ASK = b'{"messages": [{"role": "user", "content": "a"}], '
BODIES = {
    "/v1/chat/completions": b'{"messages": [{"role": "user", "content": "@"}]}',
    "/v1/responses": b'{"input": "@"}',
    "/v1/search": b'{"query": "@"}',
    "/v1/vector_stores/default/search": b'{"query": "@"}',
    "/v1/documents": b'{"documents": [{"id": "@", "text": "@"}]}',
    "/v1/documents?background=true": b'{"documents": [{"id": "@", "text": "@"}]}',
    "/v1/reindex": b'{"embedding": {"model": "@"}}',
    "/v1/batches": b'{"input_file_id": "@"}',
}
each_route = pytest.mark.parametrize("route", BODIES)


@pytest.fixture
def client(live_service: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live_service, trust_env=False, timeout=60) as found:
        yield found
        assert found.get("/livez").json() == {"status": "ok"}


def send(client: httpx.Client, route: str, body: bytes, **headers: str) -> httpx.Response:
    return client.post(route, content=body, headers={"Content-Type": "application/json", **headers})


def in_shape(response: httpx.Response) -> bool:
    """An answer, or an error of the caller in the one shape."""
    if response.status_code < 400:
        return True
    error = response.json()["error"]
    return response.status_code < 500 and set(error) == {"message", "type", "param", "code"} and bool(error["message"])


# --- JSON ------------------------------------------------------------------------------------------------------------


@each_route
@pytest.mark.parametrize(
    "put",
    [b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\x00", b"\\ud800", b"\\x", b'", "b": ' + b"9" * 10_000 + b', "c": "'],
    ids=["no UTF-8", "overlong", "encoded surrogate", "NUL", "lone surrogate", "escape", "long number"],
)
def test_a_body_that_is_no_json_is_refused(client: httpx.Client, route: str, put: bytes) -> None:
    response = send(client, route, BODIES[route].replace(b"@", put))
    assert error_of(response) == (400, "invalid_value")
    assert "\n" not in response.json()["error"]["message"]


@each_route
@pytest.mark.parametrize("depth", [300, 900, 1000, 9_000])
@pytest.mark.parametrize(("opening", "closing"), [(b"[", b"]"), (b'{"a":', b"}")])
def test_json_of_any_depth_is_refused(
    client: httpx.Client, route: str, depth: int, opening: bytes, closing: bytes
) -> None:
    nested = opening * depth + b"1" + closing * depth
    assert error_of(send(client, route, BODIES[route].replace(b'"@"', nested))) == (400, "invalid_value")
    assert error_of(send(client, route, opening * depth)) == (400, "invalid_value")


@pytest.mark.parametrize("depth", [10, 100, 200, 250, 300, 600])
@pytest.mark.parametrize(
    ("route", "before", "after"),
    [
        ("/v1/vector_stores/default/search", b'{"query": "a", "filters": ', b"}"),
        ("/v1/responses", b'{"input": "a", "tools": [{"type": "file_search", "filters": ', b"}]}"),
    ],
)
def test_filters_in_filters_of_any_depth_are_answered(
    client: httpx.Client, route: str, before: bytes, after: bytes, depth: int
) -> None:
    filters = b'{"type": "and", "filters": [' * depth + b'{"type": "eq", "key": "a", "value": 1}' + b"]}" * depth
    assert error_of(send(client, route, before + filters + after))[0] == 400


WIDE = {
    "messages": ("/v1/chat/completions", b'{"messages": [', b"[],", b"[]]}"),
    "parts": ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": [', b"{},", b"{}]}]}"),
    "filter": ("/v1/chat/completions", ASK + b'"rag": {"filters": {"a": [', b"{},", b"{}]}}}"),
    "unknown": ("/v1/chat/completions", ASK + b'"more": [', b"0,", b"0]}"),
    "keys": ("/v1/search", b'{"query": "a"', b', "k": 0', b"}"),
    "fields": ("/v1/batches", b'{"input_file_id": "a"', b', "k": 0', b"}"),
    "input": ("/v1/responses", b'{"input": [', b"{},", b"{}]}"),
    "queries": ("/v1/vector_stores/default/search", b'{"query": [', b"0,", b"0]}"),
    "reindex": ("/v1/reindex", b'{"embedding": {"a": [', b'"",', b'""]}}'),
    "documents": ("/v1/documents", b'{"documents": [', b"[],", b"[]]}"),
    "metadata": ("/v1/documents", b'{"documents": [{"text": "a", "metadata": {"a": 0', b',"a":[]', b"}}]}"),
    "background": ("/v1/documents?background=true", b'{"documents": [', b"{},", b"{}]}"),
    "texts": ("/v1/documents", b'{"documents": [', b'"\\"",', b'""]}'),
}


@pytest.mark.parametrize("name", WIDE)
def test_a_body_of_too_many_values_is_refused_before_it_is_parsed(client: httpx.Client, name: str) -> None:
    route, before, piece, after = WIDE[name]
    body = before + piece * (2**21 // len(piece)) + after
    assert error_of(send(client, route, body)) == (413, "too_large")
    # It is not looked at more closely.
    assert error_of(send(client, route, body[: -len(after)])) == (413, "too_large")


def test_every_route_that_takes_json_counts_its_values(live_service: str) -> None:
    with httpx.Client(base_url=live_service, trust_env=False, timeout=60) as client:
        described = client.get("/openapi.json").json()["paths"]
    bodies = {path: methods.get("post", {}).get("requestBody", {}) for path, methods in described.items()}
    taking = {path for path, body in bodies.items() if "application/json" in body.get("content", {})}
    tried = {re.sub("/default/", "/{name}/", urlsplit(route).path) for route, *_ in WIDE.values()}
    assert tried == {re.sub(r"{\w+}", "{name}", path) for path in taking}


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


def num_pieces(value: Any) -> int:
    """Texts, containers, and commas between what they hold."""
    match value:
        case str():
            return 1
        case list():
            return 1 + max(len(value) - 1, 0) + sum(map(num_pieces, value))
        case dict():
            return 1 + max(len(value) - 1, 0) + len(value) + sum(map(num_pieces, value.values()))
    return 0


@given(JSON, st.booleans())
def test_values_are_counted_whatever_the_texts_hold(value: Any, is_ascii: bool) -> None:
    body = json.dumps(value, ensure_ascii=is_ascii).encode(errors="surrogatepass")
    assert len(PIECE.findall(body)) == num_pieces(value)


@given(st.text('"\\[,{\n', max_size=200))
def test_what_is_no_json_is_counted_too(text: str) -> None:
    assert len(PIECE.findall(text.encode())) <= len(text)


def test_as_many_documents_and_messages_as_are_allowed_are_not_too_many() -> None:
    metadata = {f"field {n}": "a, [b], {c}" for n in range(64)}
    document = {"id": "a", "title": "b", "url": "c", "text": 'd, "e", [f]', "metadata": metadata}
    check_num_values(json.dumps({"documents": [document] * 1000}).encode(), most=uploads.MAX_VALUES)
    message = {"role": "user", "content": [{"type": "text", "text": "a, [b]"}]}
    body = json.dumps({"messages": [message] * 1000}).encode()
    check_num_values(body, most=MAX_VALUES)
    with pytest.raises(TooLarge):
        check_num_values(body, most=1000)


# --- Compressed ------------------------------------------------------------------------------------------------------


@each_route
@pytest.mark.parametrize("encoding", ["gzip", "br", "identity, gzip", "none such"])
def test_a_compressed_body_is_refused_and_not_guessed_at(client: httpx.Client, route: str, encoding: str) -> None:
    plain = BODIES[route]
    for body in (gzip.compress(plain), plain, gzip.compress(bytes(10 * 2**20))):
        response = send(client, route, body, **{"Content-Encoding": encoding})
        assert error_of(response) == (415, "compressed_body")
        assert "without Content-Encoding" in response.json()["error"]["message"]


def test_a_compressed_form_is_refused_before_it_comes(live_service: str) -> None:
    with connect(live_service) as connection:
        connection.sendall(head(content_type=FORM, Content_Encoding="gzip", Content_Length=str(2**30)))
        status, body, top = answer(connection)
    assert (status, body["error"]["code"]) == (415, "compressed_body")
    assert "connection: close" in top.lower()
    assert_unharmed(live_service)


def test_a_body_that_says_it_is_not_compressed_is_taken(client: httpx.Client) -> None:
    assert send(client, "/v1/search", b'{"query": "a"}', **{"Content-Encoding": "identity"}).status_code == 200


# --- Paths, queries and headers --------------------------------------------------------------------------------------

ODD = ["%ff", "%00", "%ed%a0%80", "%0d%0aX-Forged:%20y", "..%2f..%2f"]
QUICK = [(method, path.partition("?")[0], body) for method, path, _, body in ROUTES if "reindex" not in path]


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize(("method", "path", "body"), QUICK)
def test_no_path_and_no_parameter_is_answered_with_an_internal_error(
    client: httpx.Client, method: str, path: str, body: Any, odd: str
) -> None:
    # Nothing may change what other tests use, so the collection is always one that there is not.
    queries = ("collection=", "collection=none&limit=", "collection=none&after=", "collection=none&filters=")
    targets = [f"{path}?{query}{odd}" for query in queries]
    targets += [f'{path}?collection=none&filters={{"a{odd}":"{odd}"}}'.replace('"', "%22")]
    if method == "GET":
        targets += [f"{path}/{odd}"]
    for target in targets:
        response = client.request(method, httpx.URL(client.base_url).copy_with(raw_path=target.encode()), json=body)
        assert in_shape(response), response.text
        assert "x-forged" not in response.headers


@pytest.mark.parametrize(
    "name",
    "Authorization X-Request-ID Accept Origin Last-Event-ID Range If-None-Match If-Modified-Since If-Range Cookie "
    "Content-Type Content-Length traceparent X-Forwarded-Proto Expect User-Agent".split(),
)
@pytest.mark.parametrize("value", [b"\xff\xfe", b"bytes=0-1" + b",2-3;=\"'" * 3_000])
@pytest.mark.parametrize("path", ["/web/main.js", "/v1/documents", "/v1/ingestions/x/events"])
def test_no_header_is_answered_with_an_internal_error(live_service: str, name: str, value: bytes, path: str) -> None:
    with connect(live_service) as connection:
        start = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n{name}: ".encode()
        connection.sendall(start + value + b"\r\n\r\n")
        status = int(connection.recv(65536).split()[1])
    assert status < 500


@pytest.mark.parametrize(
    "path",
    [
        "/web/..%2f..%2fsettings.py",
        "/web/%2e%2e/settings.py",
        "/web/..\\settings.py",
        "/web/%00",
        "/web/main.js%00.txt",
        "/web//etc/passwd",
        "/web/vendor",
        "/web/" + "a" * 5_000,
        "/v1/documents/../../settings.py",
        "//evil.example/",
    ],
)
def test_files_outside_of_the_page_are_not_served(client: httpx.Client, path: str) -> None:
    response = client.get(httpx.URL(client.base_url).copy_with(raw_path=path.encode()))
    assert response.status_code == 404
    assert in_shape(response)


# --- Gone ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/search", "/v1/chat/completions", "/v1/documents"])
async def test_a_client_that_leaves_in_the_middle_of_a_body_is_no_failure_of_the_service(
    tmp_path_factory: pytest.TempPathFactory, path: str
) -> None:
    folder = tmp_path_factory.mktemp("service")
    pieces = iter([{"type": "http.request", "body": b'{"que', "more_body": True}, {"type": "http.disconnect"}])
    sent: list[Message] = []

    async def receive() -> Message:
        return next(pieces)

    async def keep(message: Message) -> None:
        sent.append(message)

    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": headers}
    async with keyed_service(settings_for(folder, str(make_encoder(folder / "encoder")))) as found:
        await found.api({**scope, "client": ("127.0.0.1", 50_000)}, receive, keep)
    assert [message["status"] for message in sent if message["type"] == "http.response.start"] == [400]
