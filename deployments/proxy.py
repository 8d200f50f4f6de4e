"""What Serve's proxy answers by itself, as the API's error objects: no replica yet, a full queue, a lost replica.

What it reads is limited, too: uvicorn, which it runs on, has limits only for those who start it themselves.

Serve loads `middlewares` where the environment of its proxies has
`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deployments.proxy:middlewares`; `cleave serve` sets it. It is for clusters
that serve nothing but Cleave, at `/`.
"""

from collections.abc import Sequence

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.config import HTTP_PROTOCOLS

from app.api.errors import error_response
from app.api.http_protocol import LimitedProtocol
from app.api.middleware import OWN_HEADER
from app.errors import CleaveError, DeadlineExceeded, Overloaded, Unavailable

PROXY_PATHS = "/-/"
LOST = "The replica that held this request was lost. Try again."


def middlewares() -> list[Middleware]:
    """Give what the proxy wraps its application with. It calls this before it starts uvicorn, and names no protocol."""
    HTTP_PROTOCOLS["auto"] = f"{LimitedProtocol.__module__}:{LimitedProtocol.__name__}"
    return [Middleware(ProxyErrors)]


class ProxyErrors:
    """Puts an error object in place of what no Ingress has answered."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or scope["path"].startswith(PROXY_PATHS):
            await self._app(scope, receive, send)
            return
        error: CleaveError | None = Unavailable(LOST, retry_after_s=1)  # Until something is answered.

        async def send_own(message: Message) -> None:
            nonlocal error
            if message["type"] == "http.response.start":
                error = _error(message["status"], message["headers"])
            if error is None:
                await send(message)

        await self._app(scope, receive, send_own)
        if error is not None:
            await error_response(error)(scope, receive, send)


def _error(status: int, headers: Sequence[tuple[bytes, bytes]]) -> CleaveError | None:
    if any(name.lower() == OWN_HEADER for name, _ in headers):
        return None
    match status:
        case 408:
            return DeadlineExceeded("The request took longer than http_options.request_timeout_s allows.")
        case 429:
            return Overloaded("Too many requests are waiting. Try again shortly.", retry_after_s=2)
        case 404 | 503:
            # The application takes every path, so none is unknown once it is up.
            return Unavailable("The service is starting, or too many requests are waiting.", retry_after_s=5)
        case 500:
            return Unavailable(LOST, retry_after_s=1)
    return None
