"""The lines of a batch: one request each, as OpenAI writes them or as a plain question, and one result each."""

import json
import sqlite3
import uuid
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.errors import StorageFull, TooLarge
from app.json_limits import MAX_VALUES, check_num_values

ENDPOINT = "/v1/chat/completions"
MAX_ID_CHARACTERS = 512
MAX_LINE_BYTES = 32 * 2**20


class LineRefused(Exception):
    """A line that is no request: a code that programs read, one sentence for people, and the field at fault."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a file of requests: its number, from 1, and where it begins."""

    number: int
    offset: int
    content: bytes


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """One request of a batch; `body` is that of a chat completion."""

    custom_id: str
    body: Mapping[str, Any]


class SeenIds:
    """The custom_ids so far, exact and on disk: a file may have more of them than memory has room for.

    A context manager; all of it blocks.
    """

    def __enter__(self) -> "SeenIds":
        """Begin with none."""
        # A database without a name is private, temporary, and goes to disk when its cache is full.
        self._database = sqlite3.connect("", isolation_level=None)
        self._database.execute("PRAGMA journal_mode = OFF")
        self._database.execute("CREATE TABLE seen (custom_id TEXT PRIMARY KEY) WITHOUT ROWID")
        self._database.execute("BEGIN")
        return self

    def __exit__(self, *_: object) -> None:
        """Remove them."""
        self._database.close()

    def add(self, custom_id: str) -> bool:
        """Tell whether one was there before. Raises `StorageFull`."""
        try:
            with closing(self._database.execute("INSERT OR IGNORE INTO seen VALUES (?)", (custom_id,))) as inserted:
                return inserted.rowcount == 0
        except sqlite3.OperationalError as error:
            raise StorageFull(
                f"custom_ids cannot be compared ({error}): free some space in the folder of temporary files, or set "
                "SQLITE_TMPDIR to another."
            ) from None


def read_lines(path: Path, offset: int = 0, number: int = 1) -> Iterator[Line]:
    """Read lines that are not blank; of one that is too long, only as much as shows that."""
    with path.open("rb") as file:
        file.seek(offset)
        while content := file.readline(MAX_LINE_BYTES + 2):
            begin = offset
            offset += len(content)
            if content.strip() or len(content) > MAX_LINE_BYTES:
                yield Line(number, begin, content)
            while not content.endswith(b"\n") and (content := file.readline(MAX_LINE_BYTES)):
                offset += len(content)
            number += 1


def parse_request(line: bytes) -> BatchRequest:
    """Read a line of OpenAI's batch format. Raises `LineRefused`."""
    content = _object(line)
    custom_id = _checked_id(content.get("custom_id"))
    if content.get("method", "POST") != "POST":
        raise LineRefused("invalid_method", "method must be POST.", "method")
    if content.get("url", ENDPOINT) != ENDPOINT:
        raise LineRefused("invalid_url", f"url must be {ENDPOINT}, the only one that batches take.", "url")
    if not isinstance(body := content.get("body"), dict):
        raise LineRefused("missing_required_parameter", "body must be an object, that of a chat completion.", "body")
    return BatchRequest(custom_id, body)


def parse_question(line: bytes, number: int) -> BatchRequest:
    """Read a line of either kind: `{"question": ...}` with the options of a chat completion beside it, if any.

    It is named by its `custom_id` or its `id`, else by its number, from 1. Raises `LineRefused`.
    """
    content = _object(line)
    if "question" not in content:
        return parse_request(line)
    question, other_id = content.pop("question"), content.pop("id", None)
    custom_id = content.pop("custom_id", None)
    custom_id = other_id if custom_id is None else custom_id
    if not isinstance(question, str) or not question.strip():
        raise LineRefused("invalid_value", "question must be a text that is not empty.", "question")
    name = f"line-{number}" if custom_id is None else str(custom_id)
    return BatchRequest(_checked_id(name), {**content, "messages": [{"role": "user", "content": question}]})


def result(custom_id: str, *, status: int, body: Mapping[str, Any], request_id: str) -> dict[str, Any]:
    """Show what a request was answered with, an error's body included, as OpenAI writes it."""
    response = {"status_code": status, "request_id": request_id, "body": body}
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": None}


def unanswered(custom_id: str | None, code: str, message: str) -> dict[str, Any]:
    """Show why a request was not even asked."""
    error = {"code": code, "message": message}
    return {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": custom_id, "response": None, "error": error}


def is_success(result: Mapping[str, Any]) -> bool:
    """Tell whether a result is an answer, and no error."""
    return result["response"] is not None and result["response"]["status_code"] == 200


def _checked_id(custom_id: Any) -> str:
    if not isinstance(custom_id, str) or not custom_id:
        raise LineRefused("missing_required_parameter", "custom_id must be a text that is not empty.", "custom_id")
    # Half of a pair of surrogates can be written in JSON, and in no file.
    if len(custom_id) > MAX_ID_CHARACTERS or any("\ud800" <= character <= "\udfff" for character in custom_id):
        message = f"custom_id must be valid Unicode of at most {MAX_ID_CHARACTERS} characters."
        raise LineRefused("invalid_value", message, "custom_id")
    return custom_id


def _object(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE_BYTES:
        raise LineRefused("too_large", f"This line has more than {MAX_LINE_BYTES // 2**20} MiB.")
    try:
        check_num_values(line, most=MAX_VALUES)
        content = json.loads(line)
    except TooLarge as error:
        raise LineRefused("too_large", f"This line: {error.message}") from None
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "it is not UTF-8 text, or nested too deeply"
        raise LineRefused("invalid_json_line", f"This line is not valid JSON: {reason}.") from None
    if not isinstance(content, dict):
        raise LineRefused("invalid_json_line", "This line is not a JSON object.")
    return content
