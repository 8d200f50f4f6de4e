"""What no Ingress has answered gets an error object; what one has answered passes untouched."""

import httpx
import pytest
from starlette.responses import PlainTextResponse, StreamingResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from app.api.middleware import OWN_HEADER
from deployments.proxy import ProxyErrors

OWN = {OWN_HEADER.decode(): "3"}


async def get(app: ASGIApp, path: str = "/v1/models") -> httpx.Response:
    transport = httpx.ASGITransport(ProxyErrors(app))
    async with httpx.AsyncClient(transport=transport, base_url="http://proxy") as client:
        return await client.get(path)


async def silent(scope: Scope, receive: Receive, send: Send) -> None:
    """What Serve's proxy does when the replica dies before it has answered."""


@pytest.mark.parametrize(
    ("given", "status", "code"),
    [
        (404, 503, "unavailable"),
        (408, 504, "deadline_exceeded"),
        (429, 429, "overloaded"),
        (500, 503, "unavailable"),
        (503, 503, "unavailable"),
    ],
)
async def test_a_plain_answer_of_the_proxy_becomes_an_error_object(given: int, status: int, code: str) -> None:
    found = await get(PlainTextResponse("Deployment is unavailable", given))
    assert (found.status_code, found.json()["error"]["code"]) == (status, code)


async def test_a_lost_replica_is_an_error_to_try_again() -> None:
    found = await get(silent)
    assert found.status_code == 503
    assert found.json()["error"]["message"].endswith("Try again.")
    assert found.headers["Retry-After"] == "1"


@pytest.mark.parametrize("status", [200, 404, 429, 500, 503])
async def test_what_an_ingress_answers_passes(status: int) -> None:
    found = await get(StreamingResponse(iter(["a", "b"]), status, OWN))
    assert (found.status_code, found.text) == (status, "ab")


async def test_the_paths_of_the_proxy_itself_pass() -> None:
    found = await get(PlainTextResponse("no", 503), "/-/healthz")
    assert found.text == "no"
