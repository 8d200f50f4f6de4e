"""A stand-in for a Qdrant server, because none can be installed where these tests run.

The engine is the one inside the Python client (`QdrantClient(":memory:")`), not the server's, which is written in
Rust: the answers come from brute force, and the data is gone when the process ends. Real are the HTTP, the bodies and
the errors' shapes, as the client sends and reads them, and only for the routes that `app/store/server.py` uses.
Operations run one at a time, so a batch is atomic here; on a real server a search may fall between its parts.
"""

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import httpx
import uvicorn
from pydantic import BaseModel
from pydantic_core import to_jsonable_python
from qdrant_client import QdrantClient, models
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from tests.running_service import ROOT, free_port

API_KEY_VARIABLE = "QDRANT__SERVICE__API_KEY"
"""Named as the real server names it."""
START_TIMEOUT_S = 180
VERSION = "1.17.0"
"""The oldest that Cleave accepts."""

Operation: TypeAlias = Callable[[QdrantClient, str, Any], Any]
"""What a route does with the engine, a collection and the body."""


class QdrantPeer:
    """One engine in memory, for whoever sends `api_key` if there is one."""

    def __init__(self, api_key: str = "") -> None:
        self._api_key = api_key
        self._engine = QdrantClient(":memory:")
        self._one_at_a_time = asyncio.Lock()

    def app(self) -> Starlette:
        # The real server, too, tells its version without a key.
        return Starlette(routes=[Route("/", _version), *(self._route(*entry) for entry in OPERATIONS)])

    def _route(self, method: str, path: str, model: type[BaseModel] | None, operation: Operation) -> Route:
        async def endpoint(request: Request) -> Response:
            if self._api_key and request.headers.get("api-key") != self._api_key:
                return PlainTextResponse("Invalid API key or JWT", 401)
            started = time.monotonic()
            try:
                body = model.model_validate_json(await request.body()) if model else None
                async with self._one_at_a_time:
                    # In a thread, so that who asks for the version need not wait.
                    result = await asyncio.to_thread(operation, self._engine, request.path_params.get("name", ""), body)
            except ValueError as error:
                return JSONResponse({"status": {"error": str(error)}, "time": 0.0}, _status(error))
            content = {"result": to_jsonable_python(result), "status": "ok", "time": time.monotonic() - started}
            return JSONResponse(content)

        return Route(path, endpoint, methods=[method])


async def _version(_: Request) -> Response:
    return JSONResponse({"title": "qdrant - vector search engine", "version": VERSION})


def _exists(engine: QdrantClient, name: str, _: None) -> Any:
    return {"exists": engine.collection_exists(name)}


def _create(engine: QdrantClient, name: str, body: models.CreateCollection) -> Any:
    arguments = _given(body, vectors="vectors_config", sparse_vectors="sparse_vectors_config")
    return engine.create_collection(name, **arguments)


def _index(engine: QdrantClient, name: str, _: models.CreateFieldIndex) -> Any:
    # The engine has no indexes and finds the same without.
    engine.get_collection(name)
    return models.UpdateResult(status=models.UpdateStatus.COMPLETED, operation_id=0)


def _upsert(engine: QdrantClient, name: str, body: models.PointsList) -> Any:
    return engine.upsert(name, **_given(body))


def _batch(engine: QdrantClient, name: str, body: models.UpdateOperations) -> Any:
    return engine.batch_update_points(name, body.operations)


def _overwrite(engine: QdrantClient, name: str, body: models.SetPayload) -> Any:
    return engine.overwrite_payload(name, body.payload, body.filter)


def _delete(engine: QdrantClient, name: str, body: models.FilterSelector) -> Any:
    return engine.delete(name, body)


def _retrieve(engine: QdrantClient, name: str, body: models.PointRequest) -> Any:
    return engine.retrieve(name, **_given(body, with_vector="with_vectors"))


def _query(engine: QdrantClient, name: str, body: models.QueryRequest) -> Any:
    return engine.query_points(name, **_given(body, filter="query_filter", with_vector="with_vectors"))


def _query_batch(engine: QdrantClient, name: str, body: models.QueryRequestBatch) -> Any:
    return [_query(engine, name, one) for one in body.searches]


def _scroll(engine: QdrantClient, name: str, body: models.ScrollRequest) -> Any:
    points, following = engine.scroll(name, **_given(body, filter="scroll_filter", with_vector="with_vectors"))
    return {"points": points, "next_page_offset": following}


def _count(engine: QdrantClient, name: str, body: models.CountRequest) -> Any:
    return engine.count(name, **_given(body, filter="count_filter"))


def _facet(engine: QdrantClient, name: str, body: models.FacetRequest) -> Any:
    return engine.facet(name, **_given(body, filter="facet_filter"))


def _drop(engine: QdrantClient, name: str, _: None) -> Any:
    return engine.delete_collection(name)


def _collections(engine: QdrantClient, _: str, __: None) -> Any:
    return engine.get_collections()


def _aliases(engine: QdrantClient, _: str, __: None) -> Any:
    return engine.get_aliases()


def _change_aliases(engine: QdrantClient, _: str, body: models.ChangeAliasesOperation) -> Any:
    return engine.update_collection_aliases(body.actions)


OPERATIONS: tuple[tuple[str, str, type[BaseModel] | None, Operation], ...] = (
    ("GET", "/collections/{name}/exists", None, _exists),
    ("GET", "/collections", None, _collections),
    ("GET", "/aliases", None, _aliases),
    ("POST", "/collections/aliases", models.ChangeAliasesOperation, _change_aliases),
    ("PUT", "/collections/{name}", models.CreateCollection, _create),
    ("DELETE", "/collections/{name}", None, _drop),
    ("PUT", "/collections/{name}/index", models.CreateFieldIndex, _index),
    ("PUT", "/collections/{name}/points", models.PointsList, _upsert),
    ("POST", "/collections/{name}/points/batch", models.UpdateOperations, _batch),
    ("PUT", "/collections/{name}/points/payload", models.SetPayload, _overwrite),
    ("POST", "/collections/{name}/points/delete", models.FilterSelector, _delete),
    ("POST", "/collections/{name}/points", models.PointRequest, _retrieve),
    ("POST", "/collections/{name}/points/query", models.QueryRequest, _query),
    ("POST", "/collections/{name}/points/query/batch", models.QueryRequestBatch, _query_batch),
    ("POST", "/collections/{name}/points/scroll", models.ScrollRequest, _scroll),
    ("POST", "/collections/{name}/points/count", models.CountRequest, _count),
    ("POST", "/collections/{name}/facet", models.FacetRequest, _facet),
)


def _given(body: BaseModel, **names: str) -> dict[str, Any]:
    """Turn what a body sets into the arguments of the client, which calls some of them otherwise."""
    return {names.get(field, field): getattr(body, field) for field in body.model_fields_set}


def _status(error: ValueError) -> int:
    """Tell by the message, as the engine has one exception for everything."""
    message = str(error)
    if message.endswith("not found"):
        return 404
    return 409 if message.endswith("already exists") else 400


@contextlib.contextmanager
def qdrant_peer(*, port: int | None = None, api_key: str = "") -> Iterator[str]:
    """Run the stand-in as a process of its own, give its URL when it answers, and kill it in the end."""
    port = port or free_port()
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.qdrant_peer", str(port)], cwd=ROOT, env={**os.environ, API_KEY_VARIABLE: api_key}
    )
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not _answers(url):
            assert process.poll() is None, f"The Qdrant stand-in ended with {process.returncode}."
            assert time.monotonic() < deadline, f"The Qdrant stand-in does not answer at {url}."
            time.sleep(0.05)
        yield url
    finally:
        process.kill()
        process.wait(60)


def _answers(url: str) -> bool:
    with httpx.Client(trust_env=False, timeout=30) as client, contextlib.suppress(httpx.TransportError):
        return client.get(url).is_success
    return False


def main() -> None:
    peer = QdrantPeer(os.environ.get(API_KEY_VARIABLE, ""))
    uvicorn.run(peer.app(), host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")


if __name__ == "__main__":
    main()
