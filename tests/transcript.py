"""What a service answers to a list of requests, written down so that two services can be compared."""

import http.client
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import httpx

from tests.running_service import RunningService

Exchange: TypeAlias = dict[str, Any]
"""One normalised response: `status`, `headers` and `body`, or what there was in its place."""
Send: TypeAlias = Callable[[RunningService], Exchange]

TIMEOUT_S = 180.0
NUM_ATTEMPTS = 3
LATE = ("llm_timeout", "llm_unavailable", "No answer within")
EVENTS = ("created_at", "started_at", "finished_at", "ingested_at", "updated_at", "verified_at")
TIMES = {"created", "kv_cache_usage", *EVENTS}
"""Keys of a body whose values depend on time."""
TRANSPORT = {"content-length", "date", "openai-processing-ms"}
"""Headers that do; the length is that of a body with times."""
GIVEN_ID = re.compile(r"chatcmpl-[0-9a-f]{32}|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|[0-9a-f]{32}|ing_\w{24}")


@dataclass(frozen=True, slots=True)
class Request:
    """A request, and what its response must be in every topology. `holds` stands somewhere in the body, as JSON."""

    method: str
    path: str
    options: Mapping[str, Any] = field(default_factory=dict)
    status: int = 200
    code: str = ""
    holds: Sequence[str] = ()
    send: Send | None = None
    """In place of sending it as it is."""


def record(service: RunningService, requests: Mapping[str, Request]) -> dict[str, Exchange]:
    """Send the requests one after the other, each under its name as its id."""
    transcript = {}
    with httpx.Client(base_url=service.url, trust_env=False, timeout=TIMEOUT_S) as client:
        for name, request in requests.items():
            for _ in range(NUM_ATTEMPTS):
                transcript[name] = normalised(_exchange(service, client, name, request), service.url)
                # A busy machine may be too late for an answer, which tells nothing about the topology.
                if not _is_late(transcript[name]):
                    break
    return transcript


def _is_late(exchange: Exchange) -> bool:
    body = exchange.get("body")
    return not isinstance(body, str) and any(word in json.dumps(body) for word in LATE)


def normalised(value: Any, url: str) -> Any:
    """Put placeholders for ids that the service gives out, times, and its own address."""
    match value:
        case dict():
            return {key: _without_times(key, one, url) for key, one in value.items()}
        case list():
            return [normalised(one, url) for one in value]
        case str():
            return "<id>" if GIVEN_ID.fullmatch(value) else value.replace(url, "http://service")
    return value


def _without_times(key: str, value: Any, url: str) -> Any:
    if key in TIMES:
        return f"<{key}>"
    if key == "timings_ms":
        return dict.fromkeys(sorted(value), "<ms>")
    return normalised(value, url)


def _exchange(service: RunningService, client: httpx.Client, name: str, request: Request) -> Exchange:
    try:
        if request.send:
            return request.send(service)
        headers = {"X-Request-ID": name, **request.options.get("headers", {})}
        options = {**request.options, "headers": headers}
        response = client.request(request.method, request.path, **options)
    except (httpx.HTTPError, http.client.HTTPException, OSError) as error:
        return {"failed": repr(error)}
    return exchange_of(response.status_code, response.headers.multi_items(), response.text)


def exchange_of(status: int, headers: Sequence[tuple[str, str]], text: str) -> Exchange:
    """Read a response: JSON as what it means, a stream as its chunks."""
    listed: dict[str, list[str]] = {}
    for name, value in sorted({(name.lower(), value) for name, value in headers}):  # Serve repeats X-Request-ID.
        listed.setdefault(name, []).append(f"<{name}>" if name in TRANSPORT else value)
    body: Any = text
    content_type = "".join(listed.get("content-type", []))
    if content_type == "application/json":
        body = json.loads(text)
    elif content_type.startswith("text/event-stream"):
        body = chunks_of(text)
    return {"status": status, "headers": listed, "body": body}


def chunks_of(text: str) -> list[Any]:
    """Read a stream. Where its text is cut depends on time: neighbouring pieces are joined, comments left out."""
    events = (event.removeprefix("data: ") for event in text.split("\n\n") if event.startswith("data: "))
    chunks: list[Any] = []
    for chunk in (event if event == "[DONE]" else json.loads(event) for event in events):
        if chunks and _content_of(chunk) and _content_of(chunks[-1]):
            chunks[-1]["choices"][0]["delta"]["content"] += _content_of(chunk)
        else:
            chunks.append(chunk)
    if "error" in chunks[-1]:
        # How far it came is a matter of time too.
        chunks = [chunk for chunk in chunks if not _content_of(chunk)]
    return chunks


def text_of(exchange: Exchange) -> str:
    """The answer of a completion, streamed or whole."""
    body = exchange["body"]
    if isinstance(body, list):
        return "".join(_content_of(chunk) for chunk in body)
    return str(body["choices"][0]["message"]["content"])


def _content_of(chunk: Any) -> str:
    if isinstance(chunk, dict) and chunk.get("choices"):
        return chunk["choices"][0]["delta"].get("content") or ""
    return ""


def declared_only(path: str, num_bytes: int) -> Send:
    """Declare a body of that size, and wait for the answer before sending it."""

    def send(service: RunningService) -> Exchange:
        connection = http.client.HTTPConnection(service.url.removeprefix("http://"), timeout=TIMEOUT_S)
        try:
            connection.putrequest("POST", path)
            connection.putheader("Content-Type", "application/json")
            connection.putheader("Content-Length", str(num_bytes))
            connection.putheader("X-Request-ID", "declared-only")
            connection.endheaders()
            response = connection.getresponse()
            return exchange_of(response.status, response.getheaders(), response.read().decode())
        finally:
            connection.close()

    return send


def in_background(documents: Mapping[str, Any], collection: str) -> Send:
    """Have documents ingested in the background, follow that to its end, and read it."""

    def send(service: RunningService) -> Exchange:
        with httpx.Client(base_url=service.url, trust_env=False, timeout=TIMEOUT_S) as client:
            where = {"background": True, "collection": collection}
            accepted = client.post("/v1/documents", params=where, json=documents)
            address = accepted.headers["location"]
            events = client.get(f"{address}/events").text.split("\n\n")
            body = {
                "accepted": accepted.json(),
                "told": [one for one in events if one.startswith("event: result")],
                "is_ended": events[-2].startswith("event: end"),
                "done": client.get(address).json(),
            }
        return {"status": accepted.status_code, "body": body}

    return send


def leaving(path: str, body: Mapping[str, Any]) -> Send:
    """Ask, leave while the engine is generating, and see that it stops."""

    def send(service: RunningService) -> Exchange:
        connection = http.client.HTTPConnection(service.url.removeprefix("http://"), timeout=TIMEOUT_S)
        response = None
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            if body.get("stream"):
                response = connection.getresponse()
                response.readline()
            _wait_until(service, num_running=1, at_most_s=60)
        finally:
            if response:
                response.close()
            connection.close()
        # To its end the engine would need minutes.
        _wait_until(service, num_running=0, at_most_s=30)
        return {"body": {"freed": True}}

    return send


def _wait_until(service: RunningService, *, num_running: int, at_most_s: float) -> None:
    started = time.monotonic()
    while service.readiness()["parts"]["llm"].get("num_running") != num_running:
        if time.monotonic() - started > at_most_s:
            raise TimeoutError(f"the engine did not come to {num_running} requests within {at_most_s:g} s")
        time.sleep(0.05)
