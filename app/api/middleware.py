"""What wraps every request: its id, its log line, and the limit of its body. Pure ASGI, so streams pass untouched."""

import asyncio
import re
import time
import uuid
from collections.abc import Mapping

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.authentication import CALLER
from app.api.errors import error_response, internal_error
from app.errors import CompressedBody, CrossOrigin, InvalidRequest, TooLarge, TooSlow
from app.telemetry import logger, request_id

ACCEPTED_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)
OWN_HEADER = b"openai-processing-ms"
"""Every answer of this API has it; what Serve's proxy answers by itself has not."""
QUIET_PATHS = frozenset({"/livez", "/readyz", "/health"})
SECURITY_HEADERS = [
    (
        b"content-security-policy",
        # Nothing but files and routes of this service; and no script may turn a text into HTML.
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        b"form-action 'self'; frame-ancestors 'none'; base-uri 'none'; "
        b"require-trusted-types-for 'script'; trusted-types 'none'",
    ),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]
PAGES_WITH_OWN_POLICY = frozenset({"/docs", "/redoc"})


UPLOADS = {("POST", "/v1/documents"), ("POST", "/v1/files")}
SLOW_BODY_PATIENCE_S = 30.0
SLOWEST_BODY_BYTES_PER_S = 8192
"""A client that sends less for so long, such as a byte now and then, must not hold what others need."""


class RequestContext:
    """Gives each request an id (the caller's, if it sends a sane one), returns it, and logs the outcome.

    An error that nobody foresaw is answered here, where its answer still gets the id.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        current = given if ACCEPTED_ID.fullmatch(given) else uuid.uuid4().hex
        token = request_id.set(current)
        started = time.perf_counter()
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                elapsed_ms = round((time.perf_counter() - started) * 1000)
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", current.encode()),
                    (OWN_HEADER, str(elapsed_ms).encode()),
                    *(() if scope["path"] in PAGES_WITH_OWN_POLICY else SECURITY_HEADERS),
                ]
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:
            failure = internal_error(error)
            if status:
                raise  # Too late for another answer: the server breaks the connection off.
            await error_response(failure)(scope, receive, send_with_headers)
        finally:
            if scope["path"] not in QUIET_PATHS:
                # No status: the client left before there was one.
                logger.info(
                    "request",
                    extra={
                        "method": scope["method"],
                        "route": getattr(scope.get("route"), "path", None),
                        "path": scope["path"],
                        "status": status or None,
                        "duration_ms": round((time.perf_counter() - started) * 1000),
                        **(scope[CALLER].audit() if CALLER in scope else {}),
                    },
                )
            request_id.reset(token)


class SameOrigin:
    """Refuses changes that a web page of another site asks for: a browser would send them from behind any firewall."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        origin = headers.get(b"origin", b"").decode("latin-1")
        own = headers.get(b"host", b"").decode("latin-1")
        if origin and scope["method"] not in ("GET", "HEAD", "OPTIONS") and origin.partition("://")[2] != own:
            error = CrossOrigin(f"This service takes no requests from pages of {origin}.")
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses a body over the limit, at once by its declared length or when it grows over it, and one that is too slow.

    A form of files goes to disk as it comes, and may be longer than what is held in memory.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, max_upload_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_upload_bytes = max_upload_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        body = _LimitedBody(receive, self._max_upload_bytes if _is_upload(scope, headers) else self._max_bytes)

        async def send_and_close(message: Message) -> None:
            if body.is_refused and message["type"] == "http.response.start":
                # Nobody reads the rest, so the connection cannot serve another request.
                message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        declared = headers.get(b"content-length", b"0")
        try:
            body.check_encoding(headers.get(b"content-encoding", b"identity"))
            if declared.isdigit():
                body.check_length(int(declared))
        except InvalidRequest as error:
            await error_response(error)(scope, receive, send_and_close)
            return
        await self._app(scope, body.receive, send_and_close)


class _LimitedBody:
    """The body of one request on its way in."""

    def __init__(self, receive: Receive, max_bytes: int) -> None:
        self._receive = receive
        self._max_bytes = max_bytes
        self._num_received = 0
        self._patience_s = SLOW_BODY_PATIENCE_S
        self._is_complete = False
        self.is_refused = False

    async def receive(self) -> Message:
        """Pass on the next piece. Raises `TooLarge` and `TooSlow`."""
        if self._is_complete:
            return await self._receive()
        # Waiting uses it up, and what comes renews it; what is done with the pieces does not count.
        started = time.monotonic()
        try:
            async with asyncio.timeout(self._patience_s):
                message = await self._receive()
        except TimeoutError:
            self.is_refused = True
            raise TooSlow(
                f"The body came too slowly: with less than {SLOWEST_BODY_BYTES_PER_S} bytes a second for "
                f"{SLOW_BODY_PATIENCE_S:g} s. Send it again over a better connection."
            ) from None
        num_bytes = len(message.get("body", b""))
        renewed_s = self._patience_s + num_bytes / SLOWEST_BODY_BYTES_PER_S - (time.monotonic() - started)
        self._patience_s = min(renewed_s, SLOW_BODY_PATIENCE_S)
        self._num_received += num_bytes
        self._is_complete = not message.get("more_body", False)
        self.check_length(self._num_received)
        return message

    def check_encoding(self, encoding: bytes) -> None:
        """Refuse a compressed body: how long it becomes, its length does not say."""
        if encoding.strip().lower() != b"identity":
            self.is_refused = True
            raise CompressedBody("The body is compressed, and none such is read. Send it without Content-Encoding.")

    def check_length(self, num_bytes: int) -> None:
        """Refuse a longer body than is allowed."""
        if num_bytes > self._max_bytes:
            self.is_refused = True
            raise TooLarge(f"The body is over the limit of {self._max_bytes} bytes. Send less at once.")


def _is_upload(scope: Scope, headers: Mapping[bytes, bytes]) -> bool:
    is_form = headers.get(b"content-type", b"").lower().startswith(b"multipart/form-data")
    return is_form and (scope["method"], scope["path"]) in UPLOADS
