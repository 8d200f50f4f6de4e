"""One contract for all stores, then what each one promises.

The server is met over HTTP, and is a stand-in: see `tests/qdrant_peer.py`. What kills do is tested in `test_life.py`.
"""

import asyncio
import contextlib
import itertools
import random
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import pytest
from qdrant_client import AsyncQdrantClient

from app import sparse
from app.deletion import delete
from app.domain import Chunk, Document, EncodedChunk, Filters, Passage, Scalar
from app.errors import ConfigurationError, RetrieverUnavailable
from app.store import Aliases, Database, Manifest, Stamp, Store, edge
from app.store.edge import EdgeDatabase, open_edge_store
from app.store.payload import MAX_CHUNKS_PER_OPERATION, best_passages, chunk_points, difference, new_stored_name
from app.store.server import ServerStore, open_server_database, open_server_store
from tests.qdrant_peer import qdrant_peer
from tests.running_service import free_port

DIMENSION = 8
MANIFEST: Manifest = {"embedding.model": "fake", "chunking.max_tokens": 160}
ROOT = Path(__file__).parent.parent


def vector(text: str) -> tuple[float, ...]:
    """A direction that depends on the text alone."""
    generator = random.Random(text)
    return tuple(generator.gauss(0, 1) for _ in range(DIMENSION))


def encode(*texts: str) -> list[EncodedChunk]:
    return [
        EncodedChunk(Chunk(index, text, 0, len(text)), vector(text), sparse.encode_document(text))
        for index, text in enumerate(texts)
    ]


def essay(document_id: str, num_chunks: int, version: str = "first") -> tuple[Document, list[EncodedChunk]]:
    """A document that can be asked for by its name; the text of each chunk names its version."""
    document = Document(document_id, "Essay", f"{document_id} {version}", metadata={"name": document_id})
    return document, encode(*(f"{version} {index}" for index in range(num_chunks)))


async def put(store: Store, document_id: str, *texts: str, **metadata: Scalar) -> None:
    await store.put(Document(document_id, document_id.title(), " ".join(texts), metadata=metadata), encode(*texts))


async def search(
    store: Store,
    text: str,
    *,
    filters: Filters | None = None,
    limit: int = 10,
    num_candidates: int = 50,
    weights: tuple[float, float] = (1.0, 1.0),
) -> list[Passage]:
    return await store.search(
        vector(text),
        sparse.encode_query(text),
        filters=filters or {},
        limit=limit,
        num_candidates=num_candidates,
        weights=weights,
    )


async def chunks_of(store: Store, document_id: str) -> list[str]:
    """The texts of all chunks that a search can find of a document from `essay`."""
    found = await search(store, "x", filters={"name": document_id}, limit=500, num_candidates=500, weights=(1, 0))
    return sorted(passage.text for passage in found)


def texts(passages: Sequence[Passage]) -> list[str]:
    return [passage.text for passage in passages]


STORES = ("edge", "memory", "server")


async def open_store(kind: str, folder: Path, server: str) -> Store:
    if kind == "edge":
        return open_edge_store(folder / "collection", dimension=DIMENSION, manifest=MANIFEST)
    return await open_on(":memory:" if kind == "memory" else server)


async def open_on(
    url: str, collection: str = "", *, api_key: str | None = None, manifest: Manifest = MANIFEST
) -> ServerStore:
    """Open a collection on a server: one of its own when it is not named."""
    return await open_server_store(
        url=url, api_key=api_key, collection=collection or str(uuid.uuid4()), dimension=DIMENSION, manifest=manifest
    )


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with qdrant_peer() as url:
        yield url


@pytest.fixture(params=STORES)
async def store(request: pytest.FixtureRequest, tmp_path: Path, server: str) -> AsyncIterator[Store]:
    opened = await open_store(request.param, tmp_path, server)
    yield opened
    await opened.close()


async def test_an_empty_collection_answers_with_nothing(store: Store) -> None:
    assert await store.counts() == (0, 0)
    assert await store.filter_fields() == ()
    assert await store.metadata_values() == {}
    assert await store.documents() == []
    assert await store.document("absent") is None
    assert await search(store, "anything") == []
    assert await delete(store, "absent") is None


async def test_a_passage_carries_what_a_reader_needs(store: Store) -> None:
    document = Document("fox", "The Fox", "Foxes dig. They sleep.", "https://x.org/fox", {"year": 2024})
    await store.put(document, encode("Foxes dig.", "They sleep."))
    best = (await search(store, "They sleep."))[0]
    assert (best.chunk_id, best.document_id, best.text) == ("fox#1", "fox", "They sleep.")
    assert (best.title, best.url, best.metadata) == ("The Fox", "https://x.org/fox", {"year": 2024})


async def test_a_document_is_kept_with_its_whole_text(store: Store) -> None:
    document = Document("ü/ß 日本 🦊", "Füchse", "Der Fuchs 🦊 schläft.", metadata={"größe": "groß", 'a."b"[0]=': "c"})
    await store.put(document, encode("Der Fuchs 🦊", "schläft."))
    found = await store.document(document.id)
    assert found is not None
    stored, text = found
    assert text == document.text
    assert (stored.id, stored.title, stored.metadata) == (document.id, document.title, document.metadata)
    assert (stored.num_chunks, stored.num_characters) == (2, len(document.text))
    assert stored.content_hash == document.content_hash
    assert await store.filter_fields() == ('a."b"[0]=', "größe")
    assert len(await search(store, "Fuchs", filters={"größe": "groß", 'a."b"[0]=': "c"})) == 2


async def test_metadata_values_are_those_of_the_chunks_that_a_search_finds(store: Store) -> None:
    await put(store, "a", "one", "two", author="Ann", year=2024, draft=True, ratio=0.5)
    await put(store, "b", "three", **{"author": 'Bo "B" = x', "a=1": "c=2", "year": "2024"})
    await put(store, "c", "four", author="Cy")
    await put(store, "c", "five", author="Di")
    await put(store, "d", "six", author="Ed")
    await delete(store, "d")
    found = {field: sorted(values, key=repr) for field, values in (await store.metadata_values()).items()}
    assert found == {
        "author": ["Ann", 'Bo "B" = x', "Di"],
        "year": ["2024", 2024],
        "draft": [True],
        "ratio": [0.5],
        "a=1": ["c=2"],
    }


async def test_metadata_values_are_counted_by_document(store: Store) -> None:
    await put(store, "a", "one", "two", author="Ann", year=2024, draft=True)
    await put(store, "b", "three", "four", "five", author="Ann", year=2024.0, draft=1)
    await put(store, "c", "six", author="Cy")
    await put(store, "c", "seven", author="Bo")
    await put(store, "d", "eight", author="Di")
    await delete(store, "d")
    counts = {
        field: [(repr(value), count) for value, count in found] for field, found in (await store.value_counts()).items()
    }
    assert counts == {
        "author": [("'Ann'", 2), ("'Bo'", 1)],
        "year": [("2024", 2)],
        "draft": [("1", 1), ("True", 1)],
    }


async def test_documents_come_in_pages_without_gaps_or_repeats(store: Store) -> None:
    names = [f"document {number}" for number in range(25)]
    for name in names:
        await put(store, name, "text")
    seen: list[str] = []
    while page := await store.documents(after=seen[-1] if seen else None, limit=10):
        seen += [stored.id for stored in page]
    assert sorted(seen) == sorted(names)


async def test_paging_goes_on_behind_a_document_that_was_deleted(store: Store) -> None:
    for number in range(6):
        await put(store, str(number), "text")
    first, second, *rest = [stored.id for stored in await store.documents()]
    await delete(store, second)
    assert [stored.id for stored in await store.documents(after=second)] == rest
    assert [stored.id for stored in await store.documents(after=first, limit=1)] == rest[:1]


async def test_a_deleted_document_is_gone_whole(store: Store) -> None:
    await put(store, "a", "one", "two", lang="en")
    await put(store, "b", "one")
    assert await delete(store, "a")
    assert await store.document("a") is None
    assert await store.counts() == (1, 1)
    assert await store.filter_fields() == ()
    assert {passage.document_id for passage in await search(store, "one")} == {"b"}


async def test_an_update_replaces_every_chunk_and_field(store: Store) -> None:
    await put(store, "a", "old one", "old two", "old three", lang="en")
    await put(store, "a", "new one", year=2024)
    assert texts(await search(store, "old one")) == ["new one"]
    assert await store.counts() == (1, 1)
    assert await store.filter_fields() == ("year",)


async def test_the_same_version_with_fewer_chunks_leaves_none_behind(store: Store) -> None:
    document, chunks = essay("a", 3)
    await store.put(document, chunks)
    await store.put(document, chunks[:1])
    assert await store.counts() == (1, 1)


async def test_a_document_without_chunks_is_kept(store: Store) -> None:
    await put(store, "blank")
    assert await store.counts() == (1, 0)


@pytest.mark.parametrize("sizes", [(300, 2), (2, 300), (300, 290), (2 * MAX_CHUNKS_PER_OPERATION, 0)])
async def test_a_long_document_is_written_and_replaced_whole(store: Store, sizes: tuple[int, int]) -> None:
    for size, version in zip(sizes, ("old", "new"), strict=True):
        await store.put(*essay("long", size, version))
        assert await chunks_of(store, "long") == sorted(f"{version} {index}" for index in range(size))
        assert await store.counts() == (1, size)


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("en", {"string"}),
        (2024, {"integer"}),
        (2024.0, {"integer"}),
        ("2024", {"numeral"}),
        (1.5, {"float"}),
        (True, {"true"}),
        (1, {"one"}),
        (False, {"false"}),
        (["en", 1.5, True], {"string", "float", "true"}),
        (["absent"], set()),
        ([], set()),
    ],
)
async def test_a_filter_matches_values_of_its_type(
    store: Store, wanted: Scalar | list[Scalar], found: set[str]
) -> None:
    values: dict[str, Scalar] = {
        "string": "en",
        "integer": 2024,
        "numeral": "2024",
        "float": 1.5,
        "true": True,
        "one": 1,
        "false": False,
    }
    for name, value in values.items():
        await put(store, name, "text", field=value)
        stored = await store.document(name)
        assert stored is not None
        assert type(stored[0].metadata["field"]) is type(value)
    assert {passage.document_id for passage in await search(store, "text", filters={"field": wanted})} == found


async def test_all_filters_must_match(store: Store) -> None:
    await put(store, "a", "text", lang="en", year=2023)
    await put(store, "b", "text", lang="en", year=2024)
    await put(store, "c", "text", lang="de", year=2024)
    found = await search(store, "text", filters={"lang": ["en", "fr"], "year": 2024})
    assert [passage.document_id for passage in found] == ["b"]
    assert await store.filter_fields() == ("lang", "year")


async def test_a_list_of_documents_is_filtered_and_counted_as_a_search_is(store: Store) -> None:
    for number in range(7):
        await put(store, f"d{number}", "text", parity=number % 2, number=number)
    await put(store, "blank", parity=1)
    await put(store, "d1", "text", parity="odd")
    odd = {"blank", "d3", "d5"}
    assert {stored.id for stored in await store.documents(filters={"parity": 1})} == odd
    seen: list[str] = []
    while page := await store.documents(after=seen[-1] if seen else None, limit=2, filters={"parity": 1}):
        seen += [stored.id for stored in page]
    assert sorted(seen) == sorted(odd)
    assert await store.num_documents({"parity": 1}) == 3
    assert await store.num_documents({"parity": [1, "odd"], "number": [1, 3]}) == 1
    assert await store.num_documents({"parity": 2}) == 0
    assert await store.num_documents({}) == 8


async def test_the_chunks_of_a_version_are_read_in_order_and_of_no_other(store: Store) -> None:
    for size, version in ((1100, 1), (3, 2)):
        document, chunks = essay("a", size, f"v{version}")
        await store.put(document, chunks)
        assert await store.chunks("a", version=version) == [encoded.chunk for encoded in chunks]
        assert await store.chunks("a", version=version, only=2) == [chunks[2].chunk]
        assert await store.chunks("a", version=version, only=size) == []
        assert await store.chunks("a", version=3 - version) is None
    await delete(store, "a")
    assert await store.chunks("a", version=2) is None


async def test_a_filter_reaches_what_better_hits_would_crowd_out(store: Store) -> None:
    for number in range(30):
        await put(store, f"near {number}", "fox", lang="en")
    await put(store, "far", "fox and much else", lang="de")
    found = await search(store, "fox", filters={"lang": "de"}, num_candidates=2)
    assert [passage.document_id for passage in found] == ["far"]


async def test_a_weight_of_zero_leaves_its_list_out(store: Store) -> None:
    await put(store, "words", "fox fox fox")
    await put(store, "other", "entirely different")
    assert [passage.document_id for passage in await search(store, "fox", weights=(0, 1))] == ["words"]
    assert len(await search(store, "fox", weights=(1, 0))) == 2
    assert await search(store, "fox", weights=(0, 0)) == []


async def test_a_question_of_stop_words_alone_is_searched_by_meaning(store: Store) -> None:
    await put(store, "a", "the of and", "fox")
    assert texts(await search(store, "the of and"))[0] == "the of and"
    assert await search(store, "the of and", weights=(0, 1)) == []


async def test_equal_scores_come_in_one_order(store: Store) -> None:
    for name in "dbca":
        await put(store, name, "same words")
    orders = {tuple(p.chunk_id for p in await search(store, "same words", num_candidates=4)) for _ in range(20)}
    assert len(orders) == 1


async def test_a_stamp_can_be_renewed_and_is_no_document(store: Store) -> None:
    assert await store.stamp() == Stamp(MANIFEST)
    renewed = Stamp({**MANIFEST, "sparse.average_length": 70.0, "embedding.revision": None}, MANIFEST)
    await store.set_stamp(renewed)
    assert await store.stamp() == renewed
    assert await store.counts() == (0, 0)


async def open_database(kind: str, folder: Path, server: str) -> Database:
    if kind == "edge":
        return EdgeDatabase(folder)
    return await open_server_database(url=":memory:" if kind == "memory" else server, api_key=None)


@pytest.fixture(params=STORES)
async def database(request: pytest.FixtureRequest, tmp_path: Path, server: str) -> AsyncIterator[Database]:
    opened = await open_database(request.param, tmp_path, server)
    yield opened
    await opened.close()


def names_for(test: str) -> tuple[str, str]:
    """Names of one test's own, since all share the server: of a collection, and of another version of it."""
    name = f"{test}-{uuid.uuid4().hex[:8]}"
    return name, new_stored_name(name)


async def create(database: Database, stored: str) -> None:
    store = await database.open(stored, dimension=DIMENSION, manifest=MANIFEST)
    await put(store, "held", stored)
    await store.close()


async def test_a_name_stands_for_the_collection_that_an_alias_says(database: Database) -> None:
    name, other = names_for("aliases")
    assert await database.aliases(name) is None
    await create(database, name)
    assert await database.aliases(name) == Aliases(name)
    await create(database, other)
    for aliases in (Aliases(name, candidate=other), Aliases(other, previous=name), Aliases(name)):
        await database.set_aliases(name, aliases)
        assert await database.aliases(name) == aliases
    assert name in await database.names()
    assert other not in await database.names()


async def test_a_collection_is_dropped_with_all_its_versions_or_but_for_some(database: Database) -> None:
    name, other = names_for("dropped")
    longer = f"{name}-2"
    for stored in (name, other, longer):
        await create(database, stored)
    await database.set_aliases(name, Aliases(other, previous=name))
    await database.drop(name, keep=Aliases(other))
    await database.set_aliases(name, Aliases(other))
    kept = await database.open(other, dimension=DIMENSION, manifest=MANIFEST)
    assert texts(await search(kept, other)) == [other]
    await kept.close()
    await database.drop(name)
    assert await database.aliases(name) is None
    assert longer in await database.names()
    await create(database, name)
    assert await database.aliases(name) == Aliases(name)


async def test_all_stores_rank_alike(tmp_path: Path, server: str) -> None:
    stores = [await open_store(kind, tmp_path, server) for kind in STORES]
    generator = random.Random(7)
    words = [f"word{number}" for number in range(30)]
    for number in range(40):
        corpus = [" ".join(generator.choices(words, k=5 + 3 * number + index)) for index in range(2)]
        for store in stores:
            await put(store, f"d{number}", *corpus, year=2000 + number % 3)
    for number in range(20):
        question = " ".join(generator.sample(words, 3))
        filters: Filters = {"year": [2001, 2002]} if number % 2 else {}
        weights = generator.choice([(1.0, 1.0), (3.0, 1.0), (1.0, 0.5), (0.0, 1.0), (1.0, 0.0)])
        one, *others = [await search(store, question, filters=filters, weights=weights) for store in stores]
        for other in others:
            assert [passage.chunk_id for passage in one] == [passage.chunk_id for passage in other]
            assert [passage.score for passage in one] == pytest.approx([passage.score for passage in other])
    for store in stores:
        await store.close()


async def test_a_search_sees_one_version_while_documents_are_written(store: Store) -> None:
    await store.put(*essay("busy", 150, "0"))

    async def write() -> None:
        for version in range(1, 6):
            await store.put(*essay("busy", 150, str(version)))

    writing = [asyncio.create_task(write()), *(asyncio.create_task(put(store, f"d{n}", "text")) for n in range(20))]
    while not all(task.done() for task in writing):
        await asyncio.sleep(0)  # The store in memory never gives way by itself.
        found = await chunks_of(store, "busy")
        assert len(found) == 150
        assert len({text.split()[0] for text in found}) == 1
    await asyncio.gather(*writing)
    assert await store.counts() == (21, 170)


def test_of_two_versions_in_a_result_the_newer_is_kept() -> None:
    old, new = (chunk_points(*essay("a", 2, version), version, at) for version, at in (("old", 1), ("new", 2)))
    hits = [(point.payload, 0.9 - number / 10) for number, point in enumerate([*old, *new])]
    for dense, sparse_hits in ((hits, []), ([], hits), (hits[:2], hits[2:]), (hits[2:], hits[:2])):
        found = best_passages(dense, sparse_hits, weights=(1, 1), num_candidates=50, limit=4)
        assert texts(found) == ["new 0", "new 1"]


def test_a_difference_of_manifests_is_readable() -> None:
    stored: Manifest = {"embedding.model": "a", "sparse.b": 0.75, "gone": 1}
    wanted: Manifest = {"embedding.model": "b", "sparse.b": 0.75, "chunking.max_tokens": 160}
    assert difference(stored, wanted) == (
        "chunking.max_tokens: was absent, now 160; embedding.model: was 'a', now 'b'; gone: was 1, now absent"
    )
    assert difference(stored, dict(stored)) == ""


# The server


async def test_two_processes_on_one_server_see_each_others_writes(server: str) -> None:
    one = await open_on(server, "shared")
    other = await open_on(server, "shared")
    await one.put(*essay("a", 150, "old"))
    assert len(await chunks_of(other, "a")) == 150
    await other.put(*essay("a", 2, "new"))
    assert await chunks_of(one, "a") == ["new 0", "new 1"]
    assert await one.counts() == (1, 2)
    assert await delete(one, "a")
    assert await other.document("a") is None
    await one.close()
    await other.close()


async def test_many_processes_may_create_the_collection_at_once(server: str) -> None:
    for number in range(4):
        stores = await asyncio.gather(*(open_on(server, f"new-{number}") for _ in range(6)))
        await asyncio.gather(*(put(store, str(index), "text") for index, store in enumerate(stores)))
        assert await stores[0].counts() == (6, 6)
        for store in stores:
            await store.close()


async def test_the_stamp_of_a_server_collection_is_its_first_owners(server: str) -> None:
    await (await open_on(server, "stamped")).close()
    again = await open_on(server, "stamped", manifest={**MANIFEST, "chunking.max_tokens": 128})
    assert await again.stamp() == Stamp(MANIFEST)
    await again.close()


@pytest.mark.filterwarnings("ignore:Api key is used with an insecure connection")
async def test_a_wrong_key_is_one_line() -> None:
    with qdrant_peer(api_key="right") as url:
        for key in (None, "wrong"):
            with pytest.raises(ConfigurationError) as caught:
                await open_on(url, api_key=key)
            assert str(caught.value) == (
                f"store.url: the Qdrant server at {url} refuses the key; set store.api_key or QDRANT_API_KEY."
            )
        store = await open_on(url, api_key="right")
        await put(store, "fox", "text")
        assert await store.counts() == (1, 1)
        await store.close()


async def write_without_an_end(store: Store) -> None:
    for version in itertools.count():
        await store.put(*essay("busy", 3, str(version)))


async def test_a_server_that_dies_is_unavailable_until_it_is_back() -> None:
    port = free_port()
    with qdrant_peer(port=port) as url:
        store = await open_on(url, "c")
        await put(store, "fox", "text")
        writing = asyncio.create_task(write_without_an_end(store))
        await asyncio.sleep(0.2)
    with pytest.raises(RetrieverUnavailable, match="does not answer"):
        await writing
    with pytest.raises(RetrieverUnavailable, match="does not answer") as caught:
        await search(store, "fox")
    assert len(str(caught.value).splitlines()) == 1
    with qdrant_peer(port=port) as url:
        # The stand-in has lost everything, which a server with a disk does not. Who opens the collection creates it,
        # and then the store that was open all along works on.
        with pytest.raises(RetrieverUnavailable, match=r"answers with an error: .*404"):
            await search(store, "fox")
        await (await open_on(url, "c")).close()
        assert await store.counts() == (0, 0)
        await put(store, "fox", "text")
        assert texts(await search(store, "text")) == ["text"]
        await store.close()


async def test_a_server_that_is_not_there_is_named_at_the_start() -> None:
    with pytest.raises(ConfigurationError, match=r"store\.url: no Qdrant server answers at http://127\.0\.0\.1:1 "):
        await open_on("http://127.0.0.1:1")


async def test_a_server_that_went_away_is_unavailable() -> None:
    store = ServerStore(AsyncQdrantClient(location="http://127.0.0.1:1", check_compatibility=False), "c")
    with pytest.raises(RetrieverUnavailable, match="does not answer"):
        await search(store, "fox")
    with pytest.raises(RetrieverUnavailable, match="does not answer"):
        await put(store, "fox", "text")


@contextlib.asynccontextmanager
async def always_answering(answer: bytes) -> AsyncIterator[str]:
    """Answer every request with the same bytes; silence without any."""

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        if not answer:
            await reader.read()
        writer.write(answer)
        writer.close()

    listening = await asyncio.start_server(connected, "127.0.0.1", 0)
    async with listening:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"


PAGE = b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\nContent-Type: text/html\r\n\r\n<html>?</html>\n"
BUSY = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 7\r\nContent-Length: 0\r\n\r\n"


async def test_something_else_at_the_address_is_no_qdrant_server() -> None:
    async with always_answering(PAGE) as url:
        with pytest.raises(ConfigurationError, match=f"store.url: no Qdrant server answers at {url} "):
            await open_on(url)


@pytest.mark.parametrize(
    ("answer", "message", "retry_after_s"),
    [
        (PAGE, "does not answer: Expecting value", 5),
        (BUSY, "answers with an error: Resource Exhausted", 7),
        (b"", "does not answer: ReadTimeout", 5),
    ],
)
async def test_a_server_in_trouble_is_unavailable_on_one_line(answer: bytes, message: str, retry_after_s: int) -> None:
    async with always_answering(answer) as url:
        client = AsyncQdrantClient(location=url, timeout=60 if answer else 1, check_compatibility=False)
        store = ServerStore(client, "c")
        with pytest.raises(RetrieverUnavailable, match=message) as caught:
            await store.counts()
        await store.close()
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.retry_after_s == retry_after_s


# The embedded store


def reopen(folder: Path, **changes: str | int) -> edge.EdgeStore:
    return open_edge_store(folder / "collection", dimension=DIMENSION, manifest={**MANIFEST, **changes})


async def test_a_reopened_folder_holds_what_was_written(tmp_path: Path) -> None:
    store = reopen(tmp_path)
    await put(store, "kept", "a fox digs", lang="en")
    await put(store, "deleted", "a fox sleeps")
    await delete(store, "deleted")
    before = await search(store, "fox")
    await store.close()
    store = reopen(tmp_path)
    assert await search(store, "fox") == before
    assert await store.counts() == (1, 1)
    assert await store.filter_fields() == ("lang",)
    await store.close()


async def test_the_stamp_of_a_folder_is_its_first_owners(tmp_path: Path) -> None:
    await reopen(tmp_path).close()
    again = reopen(tmp_path, **{"chunking.max_tokens": 128})
    assert await again.stamp() == Stamp(MANIFEST)
    await again.close()


async def test_a_second_process_is_refused_in_one_line(tmp_path: Path) -> None:
    store = reopen(tmp_path)
    second = run_python(OPEN, tmp_path / "collection")
    _, errors = second.communicate()
    *_, line = errors.strip().splitlines()
    assert line.startswith("app.errors.StoreInUse: The folder ")
    assert str(tmp_path / "collection") in line
    assert "open in another process" in line
    assert "store.kind" in line
    await store.close()
    assert run_python(OPEN, tmp_path / "collection").wait() == 0


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "collection").write_text("a file, not a folder")
    with pytest.raises(ConfigurationError, match=f"cannot use the folder {tmp_path}/collection: Not a directory"):
        reopen(tmp_path)


async def test_a_full_disk_is_refused_before_the_engine_touches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = reopen(tmp_path)
    monkeypatch.setattr(edge, "RESERVED_BYTES", 2**62)
    with pytest.raises(RetrieverUnavailable, match="MiB free"):
        await put(store, "a", "text")
    await store.close()
    with pytest.raises(ConfigurationError, match="MiB free"):
        reopen(tmp_path)


async def test_a_clock_that_was_set_back_does_not_keep_the_old_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = reopen(tmp_path)
    await store.put(*essay("a", 2, "old"))
    monkeypatch.setattr("app.store.payload.time.time", lambda: 0.0)
    await store.put(*essay("a", 2, "new"))
    assert await chunks_of(store, "a") == ["new 0", "new 1"]
    await store.close()


OPEN = """
import sys
from pathlib import Path
from app.store.edge import open_edge_store
manifest = {"embedding.model": "fake", "chunking.max_tokens": 160}
store = open_edge_store(Path(sys.argv[1]), dimension=8, manifest=manifest)
"""


def run_python(code: str, path: Path, *arguments: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", code, str(path), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
