"""What the service says of itself: structured logs that carry the request id, and stage timings."""

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime

from app.settings import LoggingSettings

request_id: ContextVar[str] = ContextVar("request_id", default="")
logger = logging.getLogger("cleave")

_STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JSONFormatter(logging.Formatter):
    """One JSON object a line: time, level, message, request id, and whatever `extra` was given."""

    def format(self, record: logging.LogRecord) -> str:
        """Render one record."""
        entry: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "message": record.getMessage(),
        }
        if current := request_id.get():
            entry["request_id"] = current
        entry |= _extra(record)
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


class TextFormatter(logging.Formatter):
    """One readable line: time, level, message, and whatever `extra` was given."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # As the standard library calls it.
        """Render one record without its exception."""
        fields = {"request_id": request_id.get() or None, **_extra(record)}
        told = (f" {name}={_told(value)}" for name, value in fields.items() if value is not None)
        return super().formatMessage(record) + "".join(told)


def _told(value: object) -> str:
    """Write a value so that it ends where it seems to: a client may put spaces and line breaks into a path."""
    text = str(value)
    return text if text and text.isprintable() and " " not in text else repr(text)


def _extra(record: logging.LogRecord) -> dict[str, object]:
    # Ray adds fields of its own to every record; their names begin with an underscore.
    return {name: value for name, value in vars(record).items() if name not in _STANDARD_FIELDS and name[0] != "_"}


def configure_logging(settings: LoggingSettings) -> None:
    """Send Cleave's own log to standard error, once per process, whatever the host program logs."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONFormatter() if settings.format == "json" else TextFormatter())
    logger.handlers = [handler]
    logger.setLevel(settings.level)
    logger.propagate = False


class Stopwatch:
    """Milliseconds per stage of one request."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self.timings_ms: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what runs inside."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.timings_ms[name] = round((time.perf_counter() - started) * 1000, 1)

    def mark(self, name: str) -> None:
        """Note the time since the request began."""
        self.timings_ms[name] = round((time.perf_counter() - self._started) * 1000, 1)
