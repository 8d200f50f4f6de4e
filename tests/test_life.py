"""The life of a document: any row of writes, deletions, restarts and kills leaves each one whole or gone."""

import asyncio
import itertools
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from app.deletion import delete
from app.domain import Document
from app.errors import DeletionFailed, RetrieverUnavailable, WriteConflict
from app.store import Store, Vectors, edge
from app.store.server import ServerStore, open_server_store
from tests import store_writer
from tests.qdrant_peer import qdrant_peer
from tests.running_service import ROOT
from tests.store_writer import DELETED, DIMENSION, MANIFEST, NAMES, check, essay, is_whole, read_log, texts_of

names = st.sampled_from(NAMES[:3])
sizes = st.sampled_from([0, 1, 3, 130, 300])


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with qdrant_peer() as url:
        yield url


async def on_server(url: str, collection: str) -> ServerStore:
    return await open_server_store(url=url, api_key=None, collection=collection, dimension=DIMENSION, manifest=MANIFEST)


@pytest.fixture(params=["edge", "server"])
async def store(request: pytest.FixtureRequest, tmp_path: Path, server: str) -> Any:
    if request.param == "edge":
        opened: Store = edge.open_edge_store(tmp_path / "collection", dimension=DIMENSION, manifest=MANIFEST)
    else:
        opened = await on_server(server, str(uuid.uuid4()))
    yield opened
    await opened.close()


# --- Versions and deletions ------------------------------------------------------------------------------------------


async def test_versions_count_the_writes_and_the_first_time_is_kept(store: Store) -> None:
    seen = []
    for version in ("1x2", "2x300", "3x0"):
        await store.put(*essay("d0", version))
        [stored] = await store.documents()
        seen.append(stored)
    assert [stored.version for stored in seen] == [1, 2, 3]
    assert {stored.ingested_at for stored in seen} == {seen[0].updated_at}
    assert seen[0].updated_at < seen[1].updated_at < seen[2].updated_at
    await delete(store, "d0")
    await store.put(*essay("d0", "4x1"))
    [again] = await store.documents()
    assert again.version == 1
    assert again.ingested_at == again.updated_at > seen[2].updated_at


@pytest.mark.parametrize(("size", "num_queried"), [(0, 0), (3, 3), (300, 150)])
async def test_a_deletion_is_proved_in_every_way(store: Store, size: int, num_queried: int) -> None:
    await store.put(*essay("d0", f"1x{size}"))
    await store.put(*essay("d0", f"2x{size}"))
    await store.put(*essay("d1", "3x2"))
    receipt = await delete(store, "d0")
    assert receipt is not None
    assert (receipt.document_id, receipt.version, receipt.num_chunks) == ("d0", 2, size)
    assert receipt.checks == {"filter": 1, "dense": num_queried, "sparse": num_queried}
    assert await delete(store, "d0") is None
    await check(store, {name: {"3x2" if name == "d1" else DELETED} for name in NAMES})


async def test_what_is_still_there_is_found_in_every_way(store: Store) -> None:
    await store.put(*essay("d0", "1x3"))
    located = await store.locate("d0")
    assert located is not None
    assert not any((await store.find_leftovers("d0", located.vectors)).values())
    record, *_ = essay("d0", "2x0")
    await store.put(record, [])
    kept = Forgetful(store, located.write)
    await store.remove("d0", {located.write})
    leftovers = await kept.find_leftovers("d0", located.vectors)
    assert leftovers == {"filter": {located.write}, "dense": {located.write}, "sparse": {located.write}}


class Forgetful:
    """A store that says it has removed a write and still finds it, some times."""

    def __init__(self, store: Store, write: str, times: int = 1) -> None:
        self._store = store
        self._write = write
        self.times = times

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    async def find_leftovers(self, document_id: str, vectors: Sequence[Vectors]) -> Mapping[str, set[str]]:
        self.times -= 1
        found = await self._store.find_leftovers(document_id, vectors)
        return {check: {self._write} for check in found} if self.times >= 0 else found


@pytest.mark.parametrize("times", [1, 3])
async def test_a_deletion_that_did_not_happen_is_tried_again_and_then_told(store: Store, times: int) -> None:
    await store.put(*essay("d0", "1x3"))
    located = await store.locate("d0")
    assert located is not None
    forgetful: Any = Forgetful(store, located.write, times)
    if times < 3:
        assert await delete(forgetful, "d0") is not None
    else:
        with pytest.raises(DeletionFailed, match="still found by filter and dense and sparse: delete it again"):
            await delete(forgetful, "d0")


async def test_a_write_that_fails_on_its_way_leaves_the_old_version_and_nothing_else(store: Store) -> None:
    await store.put(*essay("d0", "1x3"))
    document, chunks = essay("d0", "2x300")

    async def breaking() -> Any:
        yield chunks[:260]
        raise RetrieverUnavailable("The encoder broke.")

    with pytest.raises(RetrieverUnavailable):
        await store.put(document, breaking())
    await check(store, {name: {"1x3" if name == "d0" else DELETED} for name in NAMES})
    await delete(store, "d0")
    assert await store.counts() == (0, 0)


async def test_chunks_may_come_some_at_a_time(store: Store) -> None:
    document, chunks = essay("d0", "1x300")

    async def in_turns() -> Any:
        for start in range(0, 300, 70):
            yield chunks[start : start + 70]

    await store.put(document, in_turns())
    await check(store, {name: {"1x300" if name == "d0" else DELETED} for name in NAMES})


async def test_a_deletion_during_an_update_ends_in_one_of_both_orders(store: Store) -> None:
    generator = random.Random(5)
    for turn in range(5):
        await store.put(*essay("d0", f"{turn}x3"))
        version = f"1{turn}x{generator.choice([2, 300])}"
        document, chunks = essay("d0", version)

        async def in_turns(chunks: Sequence[Any] = chunks) -> Any:
            for start in range(0, len(chunks), 100):
                await asyncio.sleep(generator.uniform(0, 0.005))
                yield chunks[start : start + 100]

        async def late() -> None:
            await asyncio.sleep(generator.uniform(0, 0.02))
            assert await delete(store, "d0") is not None

        await asyncio.gather(store.put(document, in_turns()), late())
        await check(store, {name: {version, DELETED} if name == "d0" else {DELETED} for name in NAMES})


# --- Several processes on one server ---------------------------------------------------------------------------------


async def test_processes_that_write_the_same_document_at_once_leave_one_whole_version(server: str) -> None:
    collection = str(uuid.uuid4())
    stores = [await on_server(server, collection) for _ in range(4)]
    last = {f"{number}{turn}x{(0, 1, 5, 140)[number]}" for number in range(4) for turn in range(4)}

    async def write(number: int) -> None:
        for turn in range(4):
            await stores[number].put(*essay("d0", f"{number}{turn}x{(0, 1, 5, 140)[number]}"))

    writing = asyncio.gather(*map(write, range(4)))
    while not writing.done():
        assert await is_whole(stores[0], "d0")
        await asyncio.sleep(0.01)
    await writing
    await check(stores[0], {name: last if name == "d0" else {DELETED} for name in NAMES})
    [stored] = await stores[0].documents()
    assert stored.version == 16
    for store in stores:
        await store.close()


async def test_a_write_that_others_always_get_ahead_of_is_told(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.store.server.MAX_TRIES", 0)
    store = await on_server(server, str(uuid.uuid4()))
    with pytest.raises(WriteConflict, match="send it again"):
        await store.put(*essay("d0", "1x3"))
    assert await store.document("d0") is None
    await store.close()


async def test_whoever_comes_next_completes_a_write_that_was_cut_short(server: str) -> None:
    """The process ended after its record was in place, before its chunks were published."""

    class Ending(ServerStore):
        async def _settle(self, record: dict[str, Any]) -> None:
            raise RetrieverUnavailable("The process ended.")

    collection = str(uuid.uuid4())
    store = await on_server(server, collection)
    for use in (store.document, store.locate):
        await store.put(*essay("d0", "1x3"))
        ending = Ending(store._client, collection)
        with pytest.raises(RetrieverUnavailable):
            await ending.put(*essay("d0", "2x2"))
        assert await store_writer.found_texts(store, "d0", weights=(1, 0)) == texts_of("1x3")
        await use("d0")  # type: ignore[operator]
        await check(store, {name: {"2x2" if name == "d0" else DELETED} for name in NAMES})
        with pytest.raises(RetrieverUnavailable):
            await ending.put(*essay("d1", "3x1"))
        await (await on_server(server, collection)).close()
        assert await is_whole(store, "d1")
        assert (await store_writer.found_texts(store, "d1", weights=(0, 1))) == texts_of("3x1")
        await delete(store, "d1")
    await store.close()


# --- Any row of steps ------------------------------------------------------------------------------------------------


class Life(RuleBasedStateMachine):
    """Writes, deletions and both at once against a model that knows what must stand."""

    open_it: "Callable[[Path], Coroutine[Any, Any, Store]]"
    can_reopen = False

    @initialize()
    def begin(self) -> None:
        self.runner = asyncio.Runner()
        self.folder = Path(tempfile.mkdtemp())
        self.store = self.runner.run(type(self).open_it(self.folder))
        self.model: dict[str, str] = {}
        self.count = 0

    def version(self, size: int) -> str:
        self.count += 1
        return f"{self.count}x{size}"

    @rule(name=names, size=sizes)
    def put(self, name: str, size: int) -> None:
        self.model[name] = self.version(size)
        self.runner.run(self.store.put(*essay(name, self.model[name])))

    @rule(name=names)
    def delete(self, name: str) -> None:
        receipt = self.runner.run(delete(self.store, name))
        assert (receipt is not None) == (name in self.model)
        version = self.model.pop(name, DELETED)
        assert receipt is None or receipt.num_chunks == len(texts_of(version))

    @rule(name=names, size=sizes, other=sizes)
    def put_twice_and_delete_at_once(self, name: str, size: int, other: int) -> None:
        versions = [self.version(size), self.version(other)]

        async def at_once() -> Document | None:
            puts = [self.store.put(*essay(name, version)) for version in versions]
            await asyncio.gather(puts[0], delete(self.store, name), puts[1])
            found = await self.store.document(name)
            return Document(name, found[0].title, found[1]) if found else None

        document = self.runner.run(at_once())
        self.model.pop(name, None)
        if document is not None:
            assert document.title in versions
            self.model[name] = document.title

    @rule()
    def reopen(self) -> None:
        if self.can_reopen:
            self.runner.run(self.store.close())
            self.store = self.runner.run(type(self).open_it(self.folder))

    @invariant()
    def every_document_is_whole_or_gone(self) -> None:
        if hasattr(self, "store"):
            self.runner.run(check(self.store, {name: {self.model.get(name, DELETED)} for name in NAMES}))

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.runner.run(self.store.close())
            self.runner.close()
            shutil.rmtree(self.folder)


async def _in_folder(folder: Path) -> Store:
    return edge.open_edge_store(folder / "collection", dimension=DIMENSION, manifest=MANIFEST)


async def _in_memory(_: Path) -> Store:
    return await on_server(":memory:", "life")


class EdgeLife(Life):
    open_it = staticmethod(_in_folder)
    can_reopen = True


class MemoryLife(Life):
    open_it = staticmethod(_in_memory)


@pytest.mark.parametrize("machine", [EdgeLife, MemoryLife])
def test_any_row_of_steps_leaves_what_the_model_says(machine: type[Life]) -> None:
    few = settings(max_examples=3, stateful_step_count=6)
    run_state_machine_as_test(machine, settings=few)


# --- Kills -----------------------------------------------------------------------------------------------------------


class Writer:
    """A process that writes; its lines are read as they come, so that it never waits for us."""

    def __init__(self, place: str, seed: int) -> None:
        command = [sys.executable, "-m", "tests.store_writer", place, str(seed)]
        self._process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self._done = threading.Semaphore(0)
        self._reading = threading.Thread(target=self._read)
        self._reading.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line)
            if line.startswith("done"):
                self._done.release()

    def kill(self, *, after: int, delay_s: float) -> list[str]:
        """Kill it when so many steps are done, some milliseconds into the next one; give its lines."""
        for _ in range(after):
            assert self._done.acquire(timeout=180), self._process.poll()
        threading.Event().wait(delay_s)
        self._process.kill()
        self._reading.join()
        self._process.communicate()
        return self.lines


def kill_again_and_again(folder: Path, kills: Sequence[tuple[int, float]], seed: int) -> None:
    possible = {name: {DELETED} for name in NAMES}
    for number, (after, delay_s) in enumerate(kills):
        lines = Writer(str(folder / "collection"), seed + number).kill(after=after, delay_s=delay_s)
        possible = read_log(lines, possible)

        async def look(possible: dict[str, set[str]]) -> dict[str, set[str]]:
            store = edge.open_edge_store(folder / "collection", dimension=DIMENSION, manifest=MANIFEST)
            await check(store, possible)
            held = {stored.id: stored.title for stored in await store.documents()}
            await store.close()
            return {name: {held.get(name, DELETED)} for name in NAMES}

        possible = asyncio.run(look(possible))


@pytest.mark.parametrize(
    ("versions", "num_changes"), [("1x3,2x300,,3x1", 7), ("1x300,2x2,3x0", 4)], ids=["longer", "shorter"]
)
def test_a_process_killed_between_any_two_changes_leaves_one_version(
    tmp_path: Path, versions: str, num_changes: int
) -> None:
    command = [sys.executable, "-m", "tests.store_writer", "everywhere", str(tmp_path), versions]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert (finished.returncode, finished.stdout) == (0, f"{num_changes}\n"), finished.stderr


class DyingClient:
    """The Qdrant client of a process that ends when it has sent so many requests."""

    def __init__(self, client: Any, num_requests: int) -> None:
        self._client = client
        self.num_left = num_requests

    def __getattr__(self, name: str) -> Any:
        async def request(*arguments: Any, **options: Any) -> Any:
            if self.num_left == 0:
                raise RetrieverUnavailable("The process has ended.")
            self.num_left -= 1
            return await getattr(self._client, name)(*arguments, **options)

        return request


async def test_a_process_that_ends_between_any_two_requests_leaves_one_version(server: str) -> None:
    for num_requests in itertools.count(1):
        collection = str(uuid.uuid4())
        store = await on_server(server, collection)
        await store.put(*essay("d0", "1x3"))
        dying: Any = DyingClient(store._client, num_requests)
        with suppress(RetrieverUnavailable):
            await ServerStore(dying, collection).put(*essay("d0", "2x300"))
        assert await is_whole(store, "d0")
        again = await on_server(server, collection)
        await check(again, {name: {"1x3", "2x300"} if name == "d0" else {DELETED} for name in NAMES})
        await again.close()
        await store.close()
        if dying.num_left:
            assert num_requests == 8  # three pieces; read, place, read, settle; and one to spare
            return


@pytest.mark.slow
@settings(max_examples=5)
@given(st.lists(st.tuples(st.integers(0, 12), st.floats(0, 0.02)), min_size=1, max_size=3), st.integers(0, 10**6))
def test_however_often_and_whenever_it_is_killed(kills: list[tuple[int, float]], seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        kill_again_and_again(Path(folder), kills, seed)


@pytest.mark.slow
def test_killed_processes_on_one_server_leave_each_document_in_one_version() -> None:
    generator = random.Random(3)

    async def watch(url: str, writers: Sequence[Writer]) -> list[str]:
        store = await store_writer.open_store(url)
        lines: list[str] = []
        for writer in writers:
            killed = asyncio.create_task(
                asyncio.to_thread(writer.kill, after=generator.randint(2, 5), delay_s=generator.uniform(0, 0.05))
            )
            while not killed.done():
                assert await is_whole(store, generator.choice(NAMES))
            lines += killed.result()
        await store.close()
        return lines

    with qdrant_peer() as url:
        asyncio.run(watch(url, [Writer(url, seed) for seed in range(2)]))

        async def look() -> None:
            store = await store_writer.open_store(url)
            held = {stored.id: {stored.title} for stored in await store.documents()}
            await check(store, {name: held.get(name, {DELETED}) for name in NAMES})
            await store.close()

        asyncio.run(look())
