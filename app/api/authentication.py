"""Who sends a request: the key that it brings, how much of its rate is left, and whether a route has asked for it."""

import re
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.access import Caller, caller
from app.addresses import is_loopback
from app.api.errors import error_response
from app.errors import CleaveError, Forbidden, InvalidKey
from app.keys import Key, KeyFile
from app.rates import Rates
from app.settings import Settings
from app.telemetry import logger

OPEN_PATHS = frozenset(
    {"/", "/livez", "/readyz", "/health", "/docs", "/docs/oauth2-redirect", "/redoc", "/openapi.json"}
)
"""The same for everyone: health, the chat page, the description of the API."""
OPEN_FOLDER = "/web/"
PROXY_HEADERS = frozenset({b"forwarded", b"x-forwarded-for", b"x-real-ip"})
"""Who is behind a proxy, nobody here can tell."""
HOST = re.compile(r"(?:\[(?P<address>[\w.:]*)\]|(?P<name>[\w.-]*))(?::\d*)?", re.ASCII)
CREATE_A_KEY = "Create a key there with `cleave keys create`, and send it as `Authorization: Bearer KEY`."
CALLER = "cleave.caller"
"""Where the log finds who it was, in the scope of the request."""


class Authentication:
    """Lets a request in by its key; without keys, only those of this machine.

    A route that answers a key without asking what it may do, in `Caller`, is refused: whoever writes one cannot forget.
    """

    def __init__(self, app: ASGIApp, settings: Settings, keys: KeyFile, rates: Rates) -> None:
        self._app = app
        self._own_collection = settings.store.collection
        self._allows_without_keys = settings.access.allow_without_keys
        self._keys = keys
        self._rates = rates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http" or is_open(scope["path"]):
            await self._app(scope, receive, send)
            return
        key: Key | None = None
        refusal: CleaveError | None = None
        try:
            key = await self._authenticate(scope)
            if key is not None:
                await self._rates.admit(key)
        except CleaveError as error:
            refusal = error
        who = scope[CALLER] = Caller(key, self._own_collection)
        if refusal:
            response = error_response(refusal)
            response.raw_headers += await self._rate_headers(key)
            await response(scope, receive, send)
            return
        token = caller.set(who)
        try:
            await self._guarded(who, scope, receive, send)
        finally:
            caller.reset(token)

    async def _guarded(self, who: Caller, scope: Scope, receive: Receive, send: Send) -> None:
        is_refused = False

        async def send_if_checked(message: Message) -> None:
            nonlocal is_refused
            if message["type"] == "http.response.start":
                # An error or a redirection gives nothing away.
                is_refused = message["status"] < 300 and not who.was_checked
                message["headers"] = [*message["headers"], *await self._rate_headers(who.key)]
            if not is_refused:
                await send(message)

        await self._app(scope, receive, send_if_checked)
        if is_refused:
            logger.error("this route does not ask what a key may do, and is refused", extra={"path": scope["path"]})
            await error_response(Forbidden("No key may use this route."))(scope, receive, send)

    async def _authenticate(self, scope: Scope) -> Key | None:
        """Find the key; None where the service has none and the request comes from this machine."""
        if await self._keys.are_needed():
            return await self._keys.find(_bearer(scope["headers"]))
        if self._allows_without_keys:
            return None
        if not _is_from_here(scope):
            raise Forbidden(f"This service has no keys yet, so it answers its own machine only. {CREATE_A_KEY}")
        if not _is_named_as_here(scope):
            raise Forbidden(
                "This service has no keys yet, so it answers to the names of its own machine only: use "
                f"http://localhost or http://127.0.0.1 with its port. For other names: {CREATE_A_KEY}"
            )
        return None

    async def _rate_headers(self, key: Key | None) -> list[tuple[bytes, bytes]]:
        return [] if key is None else await self._rates.headers(key)


def is_open(path: str) -> bool:
    """Tell whether this path needs no key."""
    return path in OPEN_PATHS or path.startswith(OPEN_FOLDER)


def _bearer(headers: Iterable[tuple[bytes, bytes]]) -> str:
    scheme, _, key = dict(headers).get(b"authorization", b"").decode("latin-1").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise InvalidKey("This service needs a key: send it as `Authorization: Bearer KEY`.")
    return key.strip()


def _is_from_here(scope: Scope) -> bool:
    client = scope.get("client")
    is_proxied = any(name in PROXY_HEADERS for name, _ in scope["headers"])
    return client is not None and is_loopback(client[0]) and not is_proxied


def _is_named_as_here(scope: Scope) -> bool:
    """Tell whether the sender meant this machine. A browser sends what a page of any site asks for from here too.

    Such a page may let its own name lead to this machine, and then it is of the same origin; its name stays foreign.
    """
    named = [HOST.fullmatch(value.decode("latin-1")) for name, value in scope["headers"] if name == b"host"]
    return bool(named) and all(one and is_loopback((one["address"] or one["name"] or "").lower()) for one in named)
