"""HTTP as it is read from a connection, within limits: uvicorn's own reader waits for the end of a head for ever."""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from app.api.errors import error_response
from app.errors import CleaveError, HeadTooLarge, InvalidRequest, TooSlow

MAX_HEAD_BYTES = 65_536
MAX_HEADERS = 100
HEAD_PATIENCE_S = 30.0


class LimitedProtocol(HttpToolsProtocol):
    """Refuses a request line and headers that are too long, too many or too slow, before the application is asked.

    The same goes for whatever else is no body: trailers, and what may stand beside the length of a chunk.
    """

    _num_unread = 0
    """Bytes that have come since something was whole: a head, or a piece of a body."""
    _num_head_bytes = 0
    _is_in_head = False
    _refusal: CleaveError | None = None
    _patience: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for the first request."""
        super().connection_made(transport)
        self._patience = self.loop.call_later(HEAD_PATIENCE_S, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        """Wait no longer."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take what comes."""
        if self.transport.is_closing():
            return
        self._num_unread += len(data)
        super().data_received(data)
        if self.transport.is_closing():
            return
        if self._num_unread > MAX_HEAD_BYTES:
            self._refuse(_too_large())
        elif self._patience is None and (self.cycle is None or self.cycle.response_complete):
            self._patience = self.loop.call_later(HEAD_PATIENCE_S, self._give_up)

    def on_message_begin(self) -> None:
        """See `HttpToolsProtocol`."""
        self._is_in_head = True
        self._num_head_bytes = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        """See `HttpToolsProtocol`."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """See `HttpToolsProtocol`; trailers come here too."""
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """See `HttpToolsProtocol`. From here on the application has its own patience."""
        self._is_in_head = False
        self._num_unread = 0
        self._stop_waiting()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """See `HttpToolsProtocol`."""
        self._num_unread = 0
        super().on_body(body)

    def send_400_response(self, msg: str) -> None:
        """Answer, in the shape of the API, what the parser has refused or was told to."""
        invalid = InvalidRequest("This is no valid HTTP request: send it with an HTTP client.")
        invalid.code = "bad_request"
        self._refuse(self._refusal or invalid)

    def _count(self, num_bytes: int) -> None:
        self._num_head_bytes += num_bytes
        if self._num_head_bytes > MAX_HEAD_BYTES or len(self.headers) >= MAX_HEADERS:
            self._refusal = _too_large()
            raise self._refusal  # The parser stops, and has `send_400_response` called.

    def _give_up(self) -> None:
        if self._is_in_head:
            message = f"The request line and headers did not come within {HEAD_PATIENCE_S:g} s. Send them at once."
            self._refuse(TooSlow(message))
        else:
            self.transport.close()

    def _stop_waiting(self) -> None:
        if self._patience is not None:
            self._patience.cancel()
            self._patience = None

    def _refuse(self, error: CleaveError) -> None:
        # Where an answer is on its way, another in its middle would be taken for a part of it.
        if self.cycle is None or self.cycle.response_complete or not self.cycle.response_started:
            response = error_response(error)
            headers = b"".join(b"%s: %s\r\n" % pair for pair in response.raw_headers)
            status = f"HTTP/1.1 {error.status} \r\n".encode()
            self.transport.write(status + headers + b"connection: close\r\n\r\n" + bytes(response.body))
        self.transport.close()


def _too_large() -> HeadTooLarge:
    return HeadTooLarge(
        f"The request line and headers are over {MAX_HEAD_BYTES} bytes, or over {MAX_HEADERS} headers. "
        "Send what is long in the body."
    )
