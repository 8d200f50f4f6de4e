"""A browser of this machine sends what a page of any site asks for: without keys, nothing of that may be answered."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from tests.keyed_service import KeyedService, error_of, keyed_service, settings_for
from tests.test_access import ROUTES
from tests.tiny_models import make_encoder

in_one_loop = pytest.mark.asyncio(loop_scope="module")
CHANGES = [(method, path, body) for method, path, _, body in ROUTES if method != "GET"]
FORM = "multipart/form-data; boundary=cut"
FILE = b'--cut\r\nContent-Disposition: form-data; name="files"; filename="a.md"\r\n\r\nForged.\r\n--cut--\r\n'


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_encoder(tmp_path_factory.mktemp("models") / "encoder"))


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=[False, True], ids=["local", "allowed"])
async def service(
    request: pytest.FixtureRequest, encoder: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[KeyedService]:
    """Start it without keys, and let others in or not."""
    own = settings_for(tmp_path_factory.mktemp("service"), encoder, allow_without_keys=request.param)
    async with keyed_service(own) as found:
        yield found


local_alone = pytest.mark.parametrize("service", [False], ids=["local"], indirect=True)
allowed_alone = pytest.mark.parametrize("service", [True], ids=["allowed"], indirect=True)


# --- Under which name ------------------------------------------------------------------------------------------------

OWN_NAMES = [
    "localhost",
    "LOCALHOST:8000",
    "127.0.0.1:8000",
    "127.0.0.53",
    "[::1]",
    "[::1]:8000",
    "[::ffff:127.0.0.1]:80",
]
FOREIGN_NAMES = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "localhost@evil.example",
    "localhost:80@evil.example",
    "evil.example#localhost",
    "localhost/evil.example",
    "192.0.2.7:8000",
    "[2001:db8::1]:8000",
    "[localhost",
    "localhost\u00a0",
    "",
]


def browsing(name: str) -> dict[str, bytes]:
    """What a browser sends for a page under this name: page and service are one site to it."""
    return {"Host": name.encode("latin-1"), "Origin": f"http://{name}".encode("latin-1")}


@in_one_loop
@pytest.mark.parametrize("name", OWN_NAMES)
async def test_the_names_of_this_machine_are_its_own(service: KeyedService, name: str) -> None:
    async with service.client() as client:
        assert (await client.get("/v1/documents", headers=browsing(name))).status_code == 200
        deleted = await client.delete("/v1/documents/none", headers=browsing(name))
    assert error_of(deleted) == (404, "document_not_found")


@in_one_loop
@local_alone
@pytest.mark.parametrize("name", FOREIGN_NAMES)
async def test_a_page_whose_name_was_led_here_is_told_nothing(service: KeyedService, name: str) -> None:
    async with service.client() as client:
        for method, path, _, body in ROUTES:
            refused = await client.request(method, path, json=body, headers=browsing(name))
            assert error_of(refused) == (403, "forbidden")
            assert "http://localhost" in refused.text
            assert "`cleave keys create`" in refused.text


@in_one_loop
@local_alone
async def test_a_second_name_does_not_hide_the_first(service: KeyedService) -> None:
    names = [("Host", "evil.example"), ("Host", "localhost")]
    async with service.client() as client:
        for headers in (names, names[::-1]):
            assert error_of(await client.get("/v1/documents", headers=headers)) == (403, "forbidden")


@in_one_loop
@allowed_alone
@pytest.mark.parametrize("name", ["cleave.internal:8000", "192.0.2.7"])
async def test_any_name_is_taken_where_a_gateway_authenticates(service: KeyedService, name: str) -> None:
    async with service.client(Host=name) as client:
        assert (await client.get("/v1/documents")).status_code == 200


@in_one_loop
async def test_with_keys_the_service_may_have_any_name(encoder: str, tmp_path: Path) -> None:
    async with keyed_service(settings_for(tmp_path, encoder)) as found:
        async with found.client(found.create("acme", is_admin=True), Host="cleave.example") as client:
            assert (await client.get("/v1/documents")).status_code == 200
        async with found.client(Host="localhost") as client:
            assert error_of(await client.get("/v1/documents")) == (401, "invalid_api_key")


@in_one_loop
async def test_whether_the_process_lives_is_told_under_any_name(service: KeyedService) -> None:
    """A probe calls a pod by its address."""
    async with service.client(Host="10.0.0.7:8000") as client:
        for path in ("/livez", "/readyz", "/health"):
            assert (await client.get(path)).status_code == 200


# --- From which site -------------------------------------------------------------------------------------------------


@in_one_loop
@pytest.mark.parametrize("origin", ["https://evil.example", "http://localhost:3000", "http://127.0.0.1", "null"])
@pytest.mark.parametrize(
    "content_type",
    # What a form or a script may send without asking first, and what it may not.
    [FORM, "text/plain", "application/x-www-form-urlencoded", None, "application/json"],
)
async def test_a_page_of_another_site_can_change_and_ask_nothing(
    service: KeyedService, origin: str, content_type: str | None
) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    async with service.client() as client:
        for method, path, body in CHANGES:
            content = FILE if content_type == FORM else json.dumps(body).encode()
            refused = await client.request(method, path, content=content, headers={**headers, "Origin": origin})
            assert error_of(refused) == (403, "cross_origin")
        assert (await client.get("/v1/documents")).json()["data"] == []


@in_one_loop
async def test_no_page_of_another_site_is_allowed_to_read(service: KeyedService) -> None:
    asking = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    async with service.client() as client:
        for method, path in (("OPTIONS", "/v1/documents"), ("GET", "/v1/documents"), ("GET", "/readyz?verbose")):
            response: httpx.Response = await client.request(method, path, headers=asking)
            assert not [name for name in response.headers if name.startswith("access-control-")]
