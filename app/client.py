"""A running service from outside: its routes as methods, and many documents sent a few at a time.

What the service reports comes out as the error that it raised inside; when no service answers, as
`ServiceUnreachable`.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self, TypeAlias, TypeVar
from urllib.parse import quote

import httpx

from app.addresses import is_loopback
from app.domain import Document, Filters, Message, Ranking
from app.errors import (
    AccessDenied,
    CleaveError,
    CollectionMismatch,
    ConfigurationError,
    InvalidKey,
    InvalidRequest,
    NotFound,
    Overloaded,
    RateLimited,
    TooLarge,
    Unavailable,
    UnreadableFile,
)
from app.loaders import JSONL, SUFFIXES, iterate_jsonl, read_lines, walk

Record: TypeAlias = dict[str, Any]
"""An object as the service sends it."""
T = TypeVar("T")

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 600.0
"""Silence after which the service counts as hanging, also for each MiB of text that was sent: encoding one takes a
minute on a laptop."""
PROBE_TIMEOUT_S = 10.0


class ServiceError(CleaveError):
    """The service answered in a way that has no error of its own here."""

    code = "service_error"


class ServiceUnreachable(Unavailable):
    """Nobody answers at the address."""

    code = "service_unreachable"


class Client:
    """A connection to the service at `url`; an asynchronous context manager.

    `collection` is the one that all requests are about; None: the service's own, or the key's. `api_key` is sent with
    each. `transport` leads to a service that has no address, in this process.
    """

    def __init__(
        self,
        url: str,
        *,
        collection: str | None = None,
        api_key: str | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self.url = _normalise_url(url)
        self._collection = {} if collection is None else {"collection": collection}
        self._http = httpx.AsyncClient(
            base_url=self.url,
            transport=transport,
            headers={"Authorization": f"Bearer {api_key}"} if api_key else None,
            timeout=httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            # A proxy from the environment must not come between this machine and itself.
            trust_env=not is_loopback(httpx.URL(self.url).host),
        )

    async def __aenter__(self) -> Self:
        """Nothing is opened before the first request."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close what is open."""
        await self._http.aclose()

    async def chat(self, question: str, *, history: Sequence[Message] = (), **rag: Any) -> Record:
        """Answer a question after the earlier messages `history`; `rag` are the options of that extension."""
        body = {"messages": _conversation(history, question), "rag": self._rag(rag)}
        return await self._request("POST", "/v1/chat/completions", json=body)

    async def stream_chat(
        self, question: str, *, history: Sequence[Message] = (), **rag: Any
    ) -> AsyncGenerator[Record, None]:
        """Answer a question in chunks, the last with the usage. An error in the stream is raised."""
        body = {
            "messages": _conversation(history, question),
            "stream": True,
            "stream_options": {"include_usage": True},
            "rag": self._rag(rag),
        }
        async with self._translated_errors(), self._http.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.is_error:
                await response.aread()
                raise self._error(response)
            async with aclosing(_server_sent_data(response.aiter_bytes())) as events:
                async for data in events:
                    if data == "[DONE]":
                        return
                    chunk: Record = json.loads(data)
                    if "error" in chunk:
                        raise _cleave_error(chunk) or ServiceError("The answer broke off without a reason.")
                    yield chunk
        raise ServiceError("The answer broke off before its end. Ask again; the service's log may say why.")

    async def search(
        self, query: str, *, top_k: int | None, filters: Filters, history: Sequence[Message] = (), **options: Any
    ) -> Record:
        """Find passages for a question after the earlier messages `history`; the best stands first in `data`.

        `options` are further fields of the request, such as `ranking`.
        """
        question = {"messages": _conversation(history, query)} if history else {"query": query}
        body = {**question, "top_k": top_k, "filters": filters, **options, **self._collection}
        return await self._request("POST", "/v1/search", json=body)

    async def upload(self, files: Sequence[tuple[str, bytes]]) -> list[Record]:
        """Send files; each becomes a document under the name it is given here. One receipt per document."""
        parts = [("files", (name, content)) for name, content in files]
        timeout = _patience(sum(len(content) for _, content in files))
        return _data(
            await self._request("POST", "/v1/documents", files=parts, params=self._collection, timeout=timeout)
        )

    async def add(self, documents: Sequence[Document]) -> list[Record]:
        """Send documents; one receipt each, in order."""
        bodies = [
            {"id": one.id, "title": one.title, "text": one.text, "url": one.url, "metadata": dict(one.metadata)}
            for one in documents
        ]
        body = {"documents": bodies}
        timeout = _patience(sum(len(one.text) for one in documents))
        return _data(await self._request("POST", "/v1/documents", json=body, params=self._collection, timeout=timeout))

    async def documents(self, *, page_size: int = 500) -> AsyncGenerator[Record, None]:
        """List all documents, page by page."""
        after: Record = {}
        while True:
            page = await self._request("GET", "/v1/documents", params={"limit": page_size, **after, **self._collection})
            for document in page["data"]:
                yield document
            if not page["has_more"]:
                return
            after = {"after": page["data"][-1]["id"]}

    async def document(self, document_id: str) -> Record:
        """Read one document with its text."""
        return await self._request("GET", _document_path(document_id), params=self._collection)

    async def delete(self, document_id: str) -> Record:
        """Remove one document; give the receipt."""
        answer = await self._request("DELETE", _document_path(document_id), params=self._collection)
        receipt: Record = answer["receipt"]
        return receipt

    async def max_file_bytes(self) -> int:
        """Say how large a file the service takes."""
        limits = (await self.readiness() or {}).get("limits", {})
        return int(limits.get("max_file_bytes", MAX_FILE_BYTES))

    async def collections(self) -> list[Record]:
        """List the collections."""
        return _data(await self._request("GET", "/v1/collections"))

    async def drop_collection(self, name: str) -> None:
        """Remove a collection with all its documents."""
        await self._request("DELETE", f"/v1/collections/{quote(name, safe='')}")

    async def search_index(self, query: str, *, index: str, ranking: Ranking, top_k: int) -> list[str]:
        """Find the documents of passages, best first and each once, in the `live` or the `candidate` index."""
        body = {"query": query, "top_k": top_k, "index": index, "ranking": ranking, **self._collection}
        found = _data(await self._request("POST", "/v1/search", json=body))
        return list(dict.fromkeys(one["document_id"] for one in found))

    async def reindex(self, settings: Record) -> Record:
        """Start building an index by these settings, or go on with it; say how far it is."""
        return await self._request("POST", "/v1/reindex", json=settings, params=self._collection)

    async def reindex_status(self) -> Record:
        """Say how far the new index is."""
        return await self._request("GET", "/v1/reindex", params=self._collection)

    async def swap_index(self) -> Record:
        """Make the new index the live one."""
        return await self._request("POST", "/v1/reindex/swap", params=self._collection)

    async def rollback_index(self) -> Record:
        """Make the index before the live one live again."""
        return await self._request("POST", "/v1/reindex/rollback", params=self._collection)

    async def discard_index(self) -> Record:
        """Remove all indexes but the live one."""
        return await self._request("DELETE", "/v1/reindex", params=self._collection)

    async def readiness(self) -> Record | None:
        """Say whether questions can be answered, with each part; None when no Cleave answers."""
        try:
            if await self._request("GET", "/livez", timeout=PROBE_TIMEOUT_S) != {"status": "ok"}:
                return None
        except CleaveError:
            return None
        try:
            async with self._translated_errors():
                response = await self._http.get("/readyz", params={"verbose": ""}, timeout=PROBE_TIMEOUT_S)
        except CleaveError as error:
            return {"status": "not_ready", "parts": {"API": {"error": error.message}}}
        body: Record = _json(response)
        return body

    def _rag(self, options: Record) -> Record:
        # The key may be for programs that are told sources in another way.
        return {"dialect": "annotations", **options, **self._collection}

    async def _request(self, method: str, path: str, **options: Any) -> Record:
        async with self._translated_errors():
            response = await self._http.request(method, path, **options)
        body = _json(response)
        if response.is_error or not isinstance(body, dict):
            raise self._error(response)
        return body

    def _error(self, response: httpx.Response) -> CleaveError:
        retry_after = response.headers.get("retry-after", "")
        retry_after_s = int(retry_after) if retry_after.isdigit() else None
        error = _cleave_error(_json(response))
        if error is None:
            # Not from Cleave's own routes: from a proxy, from Ray Serve, or from another program.
            error = _BY_STATUS.get(response.status_code, ServiceError)(
                f"{self.url} answered {response.status_code} {response.reason_phrase} without saying why. "
                "Is it a Cleave service, and is it up?"
            )
        if isinstance(error, InvalidKey):
            error = InvalidKey(f"{error.message} `cleave` takes it from the environment variable CLEAVE_API_KEY.")
        error.retry_after_s = retry_after_s
        return error

    @asynccontextmanager
    async def _translated_errors(self) -> AsyncIterator[None]:
        try:
            yield
        except (httpx.ConnectError, httpx.ConnectTimeout):
            raise ServiceUnreachable(
                f"No service answers at {self.url}. Start it with `make serve` or `cleave serve`, "
                "or name another with --url."
            ) from None
        except httpx.TimeoutException:
            raise ServiceError(f"The service at {self.url} did not answer in time. Its log may say why.") from None
        except httpx.TransportError as error:
            reason = str(error) or type(error).__name__
            raise ServiceError(f"The connection to {self.url} broke ({reason}). Try again.") from None


def _patience(num_bytes: int) -> httpx.Timeout:
    return httpx.Timeout(ANSWER_TIMEOUT_S * max(1.0, num_bytes / 2**20), connect=CONNECT_TIMEOUT_S)


def _conversation(history: Sequence[Message], question: str) -> list[Record]:
    return [asdict(message) for message in (*history, Message("user", question))]


def _document_path(document_id: str) -> str:
    # With its slashes hidden: httpx would take `..` between them for a step, to another document.
    return f"/v1/documents/{quote(document_id, safe='')}"


def _normalise_url(url: str) -> str:
    url = url if "://" in url else f"http://{url}"
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigurationError(f"--url: {url!r} is not an address. Write it like http://127.0.0.1:8000.")
    return url.rstrip("/")


async def _server_sent_data(pieces: AsyncIterator[bytes]) -> AsyncGenerator[str, None]:
    """Yield the data of each event. The lines of httpx will not do: they end at U+2028 too, which JSON may hold."""
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield line.removeprefix(b"data:").strip().decode()


def _json(response: httpx.Response) -> Any:
    try:
        return response.json()
    except ValueError:
        return None


def _data(body: Record) -> list[Record]:
    found: list[Record] = body["data"]
    return found


def _kinds(kind: type[CleaveError]) -> Iterator[type[CleaveError]]:
    yield kind
    for narrower in kind.__subclasses__():
        yield from _kinds(narrower)


_BY_CODE = {kind.code: kind for kind in _kinds(CleaveError)}
_BY_STATUS = {404: NotFound, 413: TooLarge, 429: Overloaded, 503: Unavailable}


def _cleave_error(body: object) -> CleaveError | None:
    """Turn an error object back into the error that the service raised."""
    match body:
        case {"error": {"message": str(message), "code": code, "param": param}}:
            return _BY_CODE.get(code, ServiceError)(message, param=param)
    return None


# --- Many documents --------------------------------------------------------------------------------------------------

MAX_FILES_PER_REQUEST = 4
MAX_DOCUMENTS_PER_REQUEST = 16
MAX_BYTES_PER_REQUEST = 2**20
"""Small requests: each is some seconds of encoding, so that progress shows and little is sent twice."""
MAX_FILE_BYTES = 25 * 2**20
"""Where the service does not say what it takes."""
MAX_TRIES = 5
MAX_WAIT_S = 30.0

Item: TypeAlias = tuple[str, bytes | Document | UnreadableFile]
"""The id of a document, or the file that it should come from, and what was read there."""
Send: TypeAlias = Callable[[Sequence[tuple[str, Any]]], Awaitable[list[Record]]]


@dataclass(slots=True)
class FoundFiles:
    """What paths lead to: files by the id of their document, and what is left out."""

    paths: dict[str, Path] = field(default_factory=dict)
    skipped: list[Path] = field(default_factory=list)
    """In folders, of kinds that cannot be read."""
    failures: list[Record] = field(default_factory=list)

    def count_documents(self) -> int:
        """Count documents: files, and lines of files that hold one document a line."""
        return sum(_count_lines(path) if _is_jsonl(path) else 1 for path in self.paths.values())

    def add(self, document_id: str, path: Path) -> None:
        """Take a file, unless its id is another's: the second would replace the first."""
        known = self.paths.get(document_id)
        if not _is_utf8(document_id):
            self.failures.append(_failure(ascii(document_id), "the file's name is not valid UTF-8: rename it"))
        elif known is None:
            self.paths[document_id] = path
        elif not known.samefile(path):
            reason = f"{path} and {known} would be the same document: ingest a folder that holds both"
            self.failures.append(_failure(document_id, reason))


def find_files(paths: Iterable[Path]) -> FoundFiles:
    """Walk through files and folders; hidden ones are left out.

    A document's id is the file's name, with the folders from the one that was named downwards.
    """
    found = FoundFiles()
    for path in paths:
        if not path.is_dir():
            _add_named(found, path)
            continue
        for relative, file in walk(path):
            if file.suffix.lower() in SUFFIXES:
                found.add(relative.as_posix(), file)
            else:
                found.skipped.append(relative)
    return found


async def ingest(client: Client, files: Mapping[str, Path]) -> AsyncGenerator[list[Record], None]:
    """Send files by the id of their document, a few at a time; yield the receipts as they come.

    What cannot be read or is refused gets a receipt with the reason, and the rest goes on. Raises `Unavailable` when
    the service is not there or stays overloaded.
    """
    whole = {document_id: path for document_id, path in files.items() if not _is_jsonl(path)}
    lined = {document_id: path for document_id, path in files.items() if _is_jsonl(path)}
    max_bytes = await client.max_file_bytes() if whole else 0
    for batch in _batches(_read_files(whole, max_bytes), max_items=MAX_FILES_PER_REQUEST):
        yield await _deliver(batch, client.upload)
    for document_id, path in lined.items():
        async for receipts in _send_items(client, _read_lines(document_id, path)):
            yield receipts


async def send_documents(client: Client, documents: Iterable[Document]) -> AsyncGenerator[list[Record], None]:
    """Send documents, a few at a time, as `ingest` sends files."""
    async for receipts in _send_items(client, ((one.id, one) for one in documents)):
        yield receipts


async def _send_items(client: Client, items: Iterable[Item]) -> AsyncGenerator[list[Record], None]:
    for batch in _batches(items, max_items=MAX_DOCUMENTS_PER_REQUEST):
        yield await _deliver(batch, lambda items: client.add([document for _, document in items]))


def _add_named(found: FoundFiles, path: Path) -> None:
    if path.suffix.lower() in SUFFIXES:
        found.add(path.name, path)
    else:
        reason = f"unknown kind of file; known are {', '.join(SUFFIXES)}"
        found.failures.append(_failure(str(path), reason))


def _is_jsonl(path: Path) -> bool:
    return path.suffix.lower() == JSONL


def _is_utf8(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _count_lines(path: Path) -> int:
    try:
        with path.open("rb") as lines:
            return sum(1 for line in read_lines(lines) if line.strip())
    except OSError:
        return 1


def _failure(document_id: str, reason: str) -> Record:
    return {
        "document_id": document_id,
        "status": "failed",
        "num_chunks": 0,
        "num_truncated_chunks": 0,
        "error": reason,
    }


def _read_files(files: Mapping[str, Path], max_bytes: int) -> Iterator[Item]:
    for document_id, path in files.items():
        try:
            size = path.stat().st_size
            if size > max_bytes:
                reason = f"has {size / 2**20:.1f} MiB, the limit is {max_bytes / 2**20:.1f} MiB: split it"
                yield document_id, UnreadableFile(reason)
            else:
                yield document_id, path.read_bytes()
        except OSError as error:
            yield document_id, UnreadableFile(f"cannot be read ({error.strerror})")


def _read_lines(name: str, path: Path) -> Iterator[Item]:
    try:
        with path.open("rb") as lines:
            for one in iterate_jsonl(read_lines(lines), name=name):
                yield (one.id, one) if isinstance(one, Document) else (name, one)
    except OSError as error:
        yield name, UnreadableFile(f"cannot be read ({error.strerror})")


def _batches(items: Iterable[Item], *, max_items: int) -> Iterator[list[Item]]:
    """Group items for one request each."""
    batch: list[Item] = []
    room = MAX_BYTES_PER_REQUEST
    for item in items:
        needed = _size(item)
        if batch and (len(batch) == max_items or needed > room):
            yield batch
            batch, room = [], MAX_BYTES_PER_REQUEST
        batch.append(item)
        room -= needed
    if batch:
        yield batch


def _size(item: Item) -> int:
    match item[1]:
        case Document(text=text):
            return len(text)
        case bytes(content):
            return len(content)
    return 0


async def _deliver(batch: Sequence[Item], send: Send) -> list[Record]:
    failures = [_failure(name, content.message) for name, content in batch if isinstance(content, UnreadableFile)]
    items = [(name, content) for name, content in batch if not isinstance(content, UnreadableFile)]
    return failures + (await _send(items, send) if items else [])


async def _send(items: Sequence[tuple[str, Any]], send: Send) -> list[Record]:
    try:
        return await patiently(lambda: send(items))
    except (Unavailable, AccessDenied, RateLimited):
        raise
    except InvalidRequest as error:
        if len(items) == 1:
            return [_failure(items[0][0], error.message)]
        # The request was refused as a whole: alone, each shows whether it is to blame.
        return [receipt for item in items for receipt in await _send([item], send)]
    except CleaveError as error:
        return [_failure(name, error.message) for name, _ in items]


async def patiently(request: Callable[[], Awaitable[T]]) -> T:
    """Try again while the service is busy or restarting, or the key's minute is used up; not when there is none."""
    for attempt in range(1, MAX_TRIES):
        try:
            return await request()
        except (ServiceUnreachable, CollectionMismatch):
            raise
        except (Unavailable, RateLimited) as error:
            wait_s = 2.0 ** (attempt - 1) if error.retry_after_s is None else error.retry_after_s
            await asyncio.sleep(min(wait_s, MAX_WAIT_S))
    return await request()
