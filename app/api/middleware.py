"""What wraps every request: its id, its log line, and the limit of its body. Pure ASGI, so streams pass untouched."""

import re
import time
import uuid

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.api.authentication import CALLER
from app.api.errors import error_response, internal_error
from app.errors import CrossOrigin, TooLarge
from app.telemetry import logger, request_id

ACCEPTED_ID = re.compile(r"[\w.:-]{1,128}")
OWN_HEADER = b"openai-processing-ms"
"""Every answer of this API has it; what Serve's proxy answers by itself has not."""
QUIET_PATHS = frozenset({"/livez", "/readyz", "/health"})
SECURITY_HEADERS = [
    (b"content-security-policy", b"default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
]
PAGES_WITH_OWN_POLICY = frozenset({"/docs", "/redoc"})


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
        headers = dict(scope.get("headers", []))
        origin = headers.get(b"origin", b"").decode("latin-1")
        own = headers.get(b"host", b"").decode("latin-1")
        if origin and scope["method"] not in ("GET", "HEAD", "OPTIONS") and origin.partition("://")[2] != own:
            error = CrossOrigin(f"This service takes no requests from pages of {origin}.")
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)


class BodyLimit:
    """Refuses a body over the limit: at once by its declared length, else when it grows over it."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        declared = dict(scope.get("headers", [])).get(b"content-length", b"0")
        if scope["type"] == "http" and declared.isdigit() and int(declared) > self._max_bytes:
            error = self._error()
            await error_response(error)(scope, receive, send)
            return
        num_received = 0

        async def limited_receive() -> Message:
            nonlocal num_received
            message = await receive()
            num_received += len(message.get("body", b""))
            if num_received > self._max_bytes:
                raise self._error()
            return message

        await self._app(scope, limited_receive, send)

    def _error(self) -> TooLarge:
        return TooLarge(f"The body is over the limit of {self._max_bytes} bytes. Send less at once.")
