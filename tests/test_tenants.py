"""A tenant's documents never reach another: random writes, then random reads of several tenants at the same time.

Each version of a document carries a token that nothing else holds. Whatever a tenant is answered may hold only tokens
of documents that are there now, in a collection that it reads: in text, title, author, address, filters that were
recognised or proposed, counts and errors.
"""

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import pytest_asyncio
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from tests.keyed_service import keyed_service, settings_for
from tests.tiny_models import make_encoder

TENANTS: dict[str, dict[str, Any]] = {
    "alpha": {"read": ["alpha-*", "shared"], "write": ["alpha-*"], "default_collection": "alpha-1"},
    "beta": {"read": ["beta-1", "beta-2"], "write": ["beta-1", "beta-2"], "default_collection": "beta-1"},
    "gamma": {"read": ["gamma-1", "shared"], "write": ["gamma-1", "shared"], "default_collection": "gamma-1"},
    "guest": {"read": ["shared"], "write": [], "default_collection": "shared"},
    "nobody": {"read": ["nothing-*"], "write": [], "default_collection": None},
}
COLLECTIONS = ["alpha-1", "alpha-2", "beta-1", "beta-2", "gamma-1", "shared", "default"]
READABLE = {
    name: [one for one in COLLECTIONS if any(re.fullmatch(right.replace("*", ".*"), one) for right in rights["read"])]
    for name, rights in TENANTS.items()
}
WRITABLE = {
    name: [one for one in COLLECTIONS if any(re.fullmatch(right.replace("*", ".*"), one) for right in rights["write"])]
    for name, rights in TENANTS.items()
}
# The same for all: so the documents of others are always the nearest ones to a question.
TOPICS = ["The outage of the harbour crane lasted 52 minutes", "The umbrella factory of the old town closed in May"]
QUESTIONS = [
    "How long did the outage of the harbour crane last?",
    "What did Noor write about the umbrella factory?",
    "According to Noor Hallivant, when did the umbrella factory close?",
    "and why?",
]
FILTERS: list[dict[str, Any]] = [{}, {"author": "Noor Hallivant"}, {"author": ["Noor"]}, {"platform": "wiki"}, {"x": 1}]
QUERIES = ["chat", "stream", "respond", "search", "search", "candidate", "search store"]
READS = ["list", "read", "page", "facets", "collections", "stores", "ready"]
DOCUMENT_IDS = ["crane", "factory", "notes/plan.md"]
TOKEN = re.compile(r"qz\d{6}zq")
CASES = 30


@dataclass(slots=True)
class World:
    """What is stored where: by collection and id the token of the document's version."""

    clients: dict[str, httpx.AsyncClient]
    held: dict[str, dict[str, str]] = field(default_factory=dict)
    num_tokens: int = 0
    counts: Counter[str] = field(default_factory=Counter)

    def new_token(self) -> str:
        self.num_tokens += 1
        return f"qz{self.num_tokens:06}zq"

    def tokens(self, *collections: str) -> set[str]:
        return {token for one in collections for token in self.held.get(one, {}).values()}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_encoder(tmp_path_factory.mktemp("models") / "encoder"))


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["memory", "embedded"])
async def world(
    request: pytest.FixtureRequest, encoder: str, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[World]:
    folder = tmp_path_factory.mktemp("service")
    async with keyed_service(settings_for(folder, encoder, kind=request.param)) as service:
        sent = {name: service.create(name, **rights) for name, rights in TENANTS.items()}
        sent["admin"] = service.create("admin", is_admin=True)
        found = World({name: service.client(key) for name, key in sent.items()})
        yield found
        print(f"{request.param}: {dict(found.counts)}")  # noqa: T201  # With -s: how much was tried.
        for client in found.clients.values():
            await client.aclose()


# --- Steps -----------------------------------------------------------------------------------------------------------

tenants = st.sampled_from(["alpha", "beta", "gamma", "alpha", "beta", "gamma", "guest", "nobody"])


def collection_of(tenant: str, rights: dict[str, list[str]]) -> st.SearchStrategy[str | None]:
    """Mostly one that it may use, by its name or not named, and often any."""
    return st.sampled_from([None, None, *rights[tenant], *rights[tenant], *COLLECTIONS])


@dataclass(frozen=True, slots=True)
class Write:
    """A tenant adds or replaces a document, deletes one, or drops a collection: wherever it likes."""

    tenant: str
    collection: str | None
    document_id: str
    action: str
    topic: str


@dataclass(frozen=True, slots=True)
class Read:
    """A tenant asks, wherever it likes."""

    tenant: str
    collection: str | None
    action: str
    question: str
    filters: dict[str, Any]
    document_id: str


writes = tenants.flatmap(
    lambda tenant: st.builds(
        Write,
        st.just(tenant),
        collection_of(tenant, WRITABLE),
        st.sampled_from(DOCUMENT_IDS),
        st.sampled_from(["add", "add", "add", "delete", "drop"]),
        st.sampled_from(TOPICS),
    )
)
reads = tenants.flatmap(
    lambda tenant: st.builds(
        Read,
        st.just(tenant),
        collection_of(tenant, READABLE),
        st.sampled_from(QUERIES + READS),
        st.sampled_from(QUESTIONS),
        st.sampled_from(FILTERS),
        st.sampled_from(DOCUMENT_IDS),
    )
)
steps = st.lists(st.tuples(writes, st.lists(reads, min_size=1, max_size=4)), min_size=1, max_size=8)


async def write(world: World, step: Write) -> None:
    client, params = world.clients[step.tenant], {"collection": step.collection} if step.collection else {}
    name = step.collection or TENANTS[step.tenant]["default_collection"] or "default"
    is_allowed = name in WRITABLE[step.tenant]
    held = world.held.get(name)
    path = f"/v1/documents/{step.document_id}"
    token = world.new_token()
    if step.action == "add":
        document = {
            "id": step.document_id,
            "title": f"Report {token}",
            "text": f"{step.topic}, says memo {token}. Nobody else knows it.",
            "url": f"https://wiki.example/{token}",
            "metadata": {"author": f"Noor Hallivant {token}", "platform": "wiki", "case": token},
        }
        response = await client.post("/v1/documents", params=params, json={"documents": [document]})
        if is_allowed:
            assert response.json()["data"][0]["status"] in ("created", "updated"), response.text
            world.held.setdefault(name, {})[step.document_id] = token
    elif step.action == "delete":
        response = await client.delete(path, params=params)
        if is_allowed and held is not None:
            assert response.status_code == (200 if step.document_id in held else 404), response.text
            held.pop(step.document_id, None)
    else:
        response = await client.delete(f"/v1/collections/{name}")
        if is_allowed:
            assert response.status_code == (404 if held is None else 200), response.text
            world.held.pop(name, None)
    if not is_allowed:
        assert response.status_code == 403, response.text
    world.counts[f"{step.action} {response.status_code}"] += 1
    check(world, step, response, set())


async def read(world: World, step: Read) -> None:
    client, params = world.clients[step.tenant], {"collection": step.collection} if step.collection else {}
    name = step.collection or TENANTS[step.tenant]["default_collection"] or "default"
    search = {"query": step.question, "filters": step.filters, "top_k": 20, **params}
    chat = {
        "messages": [{"role": "user", "content": QUESTIONS[1]}] * (step.question == "and why?")
        + [{"role": "user", "content": step.question}],
        "rag": {"filters": step.filters, **params},
    }
    requests: dict[str, Callable[[], Awaitable[httpx.Response]]] = {
        "chat": lambda: client.post("/v1/chat/completions", json=chat),
        "stream": lambda: client.post("/v1/chat/completions", json={**chat, "stream": True}),
        "search": lambda: client.post("/v1/search", json=search),
        "candidate": lambda: client.post("/v1/search", json={**search, "index": "candidate"}),
        "respond": lambda: client.post(
            "/v1/responses",
            json={"input": step.question, "include": ["file_search_call.results"], "rag": chat["rag"]},
        ),
        "search store": lambda: client.post(f"/v1/vector_stores/{name}/search", json={"query": step.question}),
        "list": lambda: client.get("/v1/documents", params=params),
        "read": lambda: client.get(f"/v1/documents/{step.document_id}", params=params),
        "page": lambda: client.get(f"/v1/documents/{step.document_id}", params=params, headers={"Accept": "text/html"}),
        "facets": lambda: client.get("/v1/facets", params=params),
        "collections": lambda: client.get("/v1/collections"),
        "stores": lambda: client.get("/v1/vector_stores"),
        "ready": lambda: client.get("/readyz?verbose"),
    }
    response = await requests[step.action]()
    world.counts[f"{step.action} {response.status_code}"] += 1
    if step.action in ("collections", "stores", "ready"):
        check(world, step, response, set())
        if step.action == "ready":
            assert not [one for one in COLLECTIONS if f'"{one}"' in response.text]
            return
        # As documents are counted in collections, files are in vector stores.
        found = response.json()["data"]
        seen = {
            one["name"]: one["file_counts"]["total"] if "file_counts" in one else one["num_documents"] for one in found
        }
        mine = {*READABLE[step.tenant], *WRITABLE[step.tenant]}
        assert seen == {one: len(held) for one, held in world.held.items() if one in mine}
        return
    if name not in READABLE[step.tenant]:
        assert response.status_code == 403, response.text
        check(world, step, response, set())
        return
    check(world, step, response, world.tokens(name))
    if step.action == "list":
        assert response.status_code == (200 if name in world.held else 404)
        if name in world.held:
            listed = response.json()
            assert listed["total"] == len(world.held[name])
            assert {one["id"]: one["metadata"]["case"] for one in listed["data"]} == world.held[name]
    if step.action == "facets" and name in world.held:
        facets = {one["field"]: one["values"] for one in response.json()["data"]}
        assert {one["value"] for one in facets.get("case", [])} == set(world.held[name].values())
    if step.action == "search" and not step.filters and world.held.get(name):
        assert TOKEN.search(response.text), "what is its own is found"


def check(world: World, step: Write | Read, response: httpx.Response, allowed: set[str]) -> None:
    """No token of another's document, or of one that is gone, and no name of another's collection in the answer."""
    known = {*READABLE[step.tenant], *WRITABLE[step.tenant], step.collection, "default"}
    assert not [one for one in COLLECTIONS if one not in known and one in response.text], response.text
    seen = set(TOKEN.findall(response.text + json.dumps(dict(response.headers))))
    assert seen <= allowed, response.text
    world.counts["answers with documents"] += bool(seen)


async def begin(world: World) -> None:
    """One document of each tenant in the first of its collections, and nothing else."""
    admin = world.clients["admin"]
    for one in (await admin.get("/v1/collections")).json()["data"]:
        if one["name"] != "default":
            assert (await admin.delete(f"/v1/collections/{one['name']}")).status_code == 200
    world.held = {"default": {}}
    for tenant, names in WRITABLE.items():
        for name in names[:1]:
            await write(world, Write(tenant, name, DOCUMENT_IDS[0], "add", TOPICS[0]))


# --- The property ----------------------------------------------------------------------------------------------------


@pytest.mark.asyncio(loop_scope="module")
@settings(max_examples=CASES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=steps)
async def test_nothing_of_a_tenant_reaches_another(world: World, steps: list[tuple[Write, list[Read]]]) -> None:
    await begin(world)
    world.counts["cases"] += 1
    for one, several in steps:
        await write(world, one)
        await asyncio.gather(*(read(world, each) for each in several))
    event(f"{sum(map(len, world.held.values()))} documents at the end")
