"""What comes before a body: heads that are too long, too many, too slow or none, on real sockets.

Each is tried on uvicorn as these tests start it, and as Ray Serve starts it for its proxy.
"""

import asyncio
import json
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain, repeat
from urllib.parse import urlsplit

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ray.serve._private import http_util
from ray.serve.config import HTTPOptions
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from app.api import http_protocol
from app.api.http_protocol import MAX_HEAD_BYTES, MAX_HEADERS
from app.api.middleware import OWN_HEADER
from deployments.proxy import middlewares
from tests.running_service import free_port

PATIENCE_S = 60.0
GET = b"GET /livez HTTP/1.1\r\nHost: localhost\r\n"
CHUNKED = b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
ENDLESS_BYTES = 64 * 2**20
"""What is sent before a test gives up waiting for a refusal."""
IN_FLIGHT_BYTES = 16 * 2**20
"""What the two sockets and the network between them may hold."""


@pytest.fixture(scope="module")
def proxy() -> Iterator[str]:
    """Serve `/livez` as Serve's proxy does, without the cluster behind it."""

    async def answer(request: Request) -> JSONResponse:
        await request.body()
        return JSONResponse({"status": "ok"}, headers={OWN_HEADER.decode(): "0"})

    async def serve() -> None:
        app = Starlette(routes=[Route("/livez", answer), Route("/v1/search", answer, methods=["POST"])])
        loop = asyncio.get_running_loop()
        options = http_util.configure_http_options_with_defaults(HTTPOptions(host="127.0.0.1", port=port))
        with pytest.MonkeyPatch.context() as patch:
            path = f"{middlewares.__module__}:{middlewares.__name__}"
            patch.setattr(http_util, "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", path)
            options = http_util.configure_http_middlewares(options)
        task, server = await http_util.start_asgi_http_server(app, options, event_loop=loop)
        stopped.add_done_callback(lambda _: setattr(server, "should_exit", True))
        await task

    port = free_port()
    loop = asyncio.new_event_loop()
    stopped: asyncio.Future[None] = loop.create_future()
    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{port}"
    transport = httpx.HTTPTransport(retries=6)
    with httpx.Client(base_url=url, transport=transport, timeout=PATIENCE_S) as client:
        assert client.get("/livez").status_code == 200
    yield url
    loop.call_soon_threadsafe(stopped.set_result, None)
    thread.join()
    loop.close()


@pytest.fixture(params=["uvicorn", "proxy"])
def url(request: pytest.FixtureRequest) -> str:
    found: str = request.getfixturevalue("live_service" if request.param == "uvicorn" else "proxy")
    return found


def connect(url: str) -> socket.socket:
    return socket.create_connection((urlsplit(url).hostname, urlsplit(url).port), timeout=PATIENCE_S)


def read_to_the_end(connection: socket.socket) -> bytes:
    """Read until the service closes."""
    data = b""
    with suppress(ConnectionResetError):  # It has closed on what it had not read.
        while piece := connection.recv(65536):
            data += piece
    return data


def refusal(data: bytes) -> tuple[int, str]:
    """Read the one answer that there is: status and code."""
    top, _, body = data.partition(b"\r\n\r\n")
    assert b"\r\nconnection: close" in top
    assert b"\r\ncontent-type: application/json" in top
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    return int(top.split()[1]), error["code"]


def assert_unharmed(url: str) -> None:
    with httpx.Client(base_url=url, trust_env=False, timeout=PATIENCE_S) as client:
        assert client.get("/livez").json() == {"status": "ok"}


def send_until_refused(connection: socket.socket, pieces: Iterator[bytes]) -> int:
    """Send until nobody listens; give how much was sent."""
    num_sent = 0
    with suppress(OSError):
        for piece in pieces:
            connection.sendall(piece)
            num_sent += len(piece)
            assert num_sent < ENDLESS_BYTES, "all of it was taken"
    return num_sent


# --- Too much --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        GET + b"".join(b"X-%d: y\r\n" % n for n in range(10_000)),
        GET + b"X: y\r\n" * MAX_HEADERS,
        GET + b"X-Long: " + b"y" * 2**20 + b"\r\n",
        GET + b"X" * 2**20 + b": y\r\n",
        GET + b"X-Long: " + b"y" * MAX_HEAD_BYTES + b"\r\n",
        b"GET /livez?" + b"q" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n",
    ],
    ids=["10,000 headers", "one header too many", "1 MiB value", "1 MiB name", "just too long", "100 kB address"],
)
def test_a_head_over_the_limits_is_refused(url: str, head: bytes) -> None:
    with connect(url) as connection:
        with suppress(OSError):
            connection.sendall(head + b"\r\n")
        assert refusal(read_to_the_end(connection)) == (431, "headers_too_large")
    assert_unharmed(url)


@pytest.mark.parametrize(
    ("opening", "piece"),
    [
        (b"GET /livez", b"x" * 5000),
        (GET, b"X-Some: value\r\n" * 300),
        (GET + b"X-Long: ", b"y" * 5000),
        (GET + b"X-Folded: y\r\n", b" y\r\n" * 1000),
        (CHUNKED + b"1\r\n \r\n0\r\n", b"X-Trailer: value\r\n" * 300),
        (CHUNKED + b"1\r\n \r\n0\r\nX-Trailer: ", b"y" * 5000),
        (CHUNKED + b"1;extension=", b"y" * 5000),
    ],
    ids=["line", "headers", "header", "folded header", "trailers", "trailer", "extension of a chunk"],
)
def test_what_never_ends_is_refused_before_it_fills_the_memory(url: str, opening: bytes, piece: bytes) -> None:
    with connect(url) as connection:
        assert send_until_refused(connection, chain([opening], repeat(piece))) < IN_FLIGHT_BYTES
        status, _ = refusal(read_to_the_end(connection))
        assert status in (400, 431)
    assert_unharmed(url)


def test_blank_lines_without_end_are_refused(url: str) -> None:
    with connect(url) as connection:
        assert send_until_refused(connection, repeat(b"\r\n" * 2000)) < IN_FLIGHT_BYTES
    assert_unharmed(url)


def test_a_head_within_the_limits_passes(url: str) -> None:
    with connect(url) as connection:
        many = b"".join(b"X-%d: %s\r\n" % (n, b"y" * 600) for n in range(MAX_HEADERS - 2))
        connection.sendall(GET + many + b"Connection: close\r\n\r\n")
        assert read_to_the_end(connection).startswith(b"HTTP/1.1 200")


# --- Too slow --------------------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "HEAD_PATIENCE_S", 0.4)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("opening", "drips"), [(b"GET /livez", b""), (b"GET /livez", b"y"), (GET, b""), (GET, b"X-Some: value\r\n")]
)
def test_a_head_that_hardly_comes_is_given_up(url: str, opening: bytes, drips: bytes) -> None:
    with connect(url) as connection:
        connection.sendall(opening)
        with dripping(connection, drips):
            assert refusal(read_to_the_end(connection)) == (408, "too_slow")
    assert_unharmed(url)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("drips", [b"", b"\r\n"])
def test_a_connection_on_which_nothing_comes_is_closed_without_a_word(url: str, drips: bytes) -> None:
    with connect(url) as connection, dripping(connection, drips):
        assert read_to_the_end(connection) == b""
    assert_unharmed(url)


@pytest.mark.usefixtures("impatient")
def test_a_second_request_that_hardly_comes_is_given_up_too(url: str) -> None:
    with connect(url) as connection:
        connection.sendall(GET + b"\r\n" + GET)
        connection.sendall(b"X-Some: ")
        answers = b""
        while (ok := b'{"status":"ok"}') not in answers:
            answers += connection.recv(65536)
        with suppress(OSError):  # A busy machine may be too late for it.
            connection.sendall(b"value\r\n")
        assert refusal(answers.partition(ok)[2] + read_to_the_end(connection)) == (408, "too_slow")


def test_slow_heads_hold_nobody_else_up(url: str) -> None:
    with ExitStack() as held:
        for _ in range(200):
            held.enter_context(connect(url)).sendall(GET + b"X-Some: ")
        assert_unharmed(url)


@contextmanager
def dripping(connection: socket.socket, piece: bytes) -> Iterator[None]:
    """Send the same piece all the time, until the service has closed or the block ends."""
    stop = threading.Event()

    def drip() -> None:
        with suppress(OSError):
            while not stop.wait(0.02):
                connection.sendall(piece)

    thread = threading.Thread(target=drip)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


# --- Wrong -----------------------------------------------------------------------------------------------------------


def client_hello() -> bytes:
    """What a client sends that takes the port for one with TLS."""
    outgoing = ssl.MemoryBIO()
    connection = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="localhost")
    with suppress(ssl.SSLWantReadError):
        connection.do_handshake()
    return outgoing.read()


@pytest.mark.parametrize(
    "sent",
    [
        client_hello(),
        b"\x00" * 100 + b"\r\n\r\n",
        b"GET /liv\xffez HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: local\x00host\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost localhost\r\n\r\n",
        b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
        b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /v1/search HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        CHUNKED + b"zz\r\n",
        CHUNKED + b"-1\r\n",
        CHUNKED + b"2\r\n{}more than was said\r\n0\r\n\r\n",
        CHUNKED + b"ffffffffffffffffff\r\n{}",
    ],
    ids=lambda sent: sent[-20:].hex(),
)
def test_what_is_no_http_is_refused_in_the_shape_of_the_api(url: str, sent: bytes) -> None:
    with connect(url) as connection:
        connection.sendall(sent)
        assert refusal(read_to_the_end(connection)) == (400, "bad_request")
    assert_unharmed(url)


@pytest.mark.parametrize("headers", [b"", b"Origin: https://evil.example\r\n"])
def test_there_are_no_websockets(live_service: str, headers: bytes) -> None:
    upgrade = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    with connect(live_service) as connection:
        connection.sendall(GET + headers + upgrade + b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n")
        assert b" 403 " in connection.recv(65536).partition(b"\r\n")[0]
    assert_unharmed(live_service)


# --- Right, by whichever pieces it comes -----------------------------------------------------------------------------


def test_requests_that_come_together_are_answered_one_after_the_other(url: str) -> None:
    with connect(url) as connection:
        connection.sendall((GET + b"\r\n") * 3 + GET + b"Connection: close\r\n\r\n")
        assert read_to_the_end(connection).count(b'{"status":"ok"}') == 4


@settings(max_examples=30)
@given(pieces=st.lists(st.integers(1, 40), min_size=1), num_headers=st.integers(0, MAX_HEADERS - 2))
def test_a_request_may_come_in_any_pieces(live_service: str, pieces: list[int], num_headers: int) -> None:
    rest = GET + b"X-Some: value\r\n" * num_headers + b"Connection: close\r\n\r\n"
    with connect(live_service) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for size in pieces:
            connection.sendall(rest[:size])
            rest = rest[size:]
        connection.sendall(rest)
        assert read_to_the_end(connection).startswith(b"HTTP/1.1 200")
