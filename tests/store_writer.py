"""A process that writes, rewrites and deletes documents without an end, to be killed, and what must hold afterwards.

It says on standard output what it begins and when that is done. The text of each chunk names its version, and the
version how many chunks there are, so that a reader can tell whether a document is whole.
"""

import asyncio
import itertools
import os
import random
import signal
import sys
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any

from qdrant_edge import EdgeShard

from app import sparse
from app.deletion import delete
from app.domain import Chunk, Document, EncodedChunk, Passage
from app.store import Manifest, Store, edge
from app.store.server import open_server_store

DIMENSION = 8
MANIFEST: Manifest = {"embedding.model": "fake"}
NAMES = [f"d{number}" for number in range(5)]
SIZES = (0, 1, 3, 20, 130, 300)
MAX_FOUND = 700
"""More than all chunks of two versions."""
DELETED = ""
"""In place of a version."""


async def open_store(place: str) -> Store:
    """Open a collection in a folder, or on the server at an address."""
    if place.startswith("http"):
        return await open_server_store(
            url=place, api_key=None, collection="life", dimension=DIMENSION, manifest=MANIFEST
        )
    return edge.open_edge_store(Path(place), dimension=DIMENSION, manifest=MANIFEST)


def texts_of(version: str) -> list[str]:
    """The texts of all chunks of a version such as `7x300`, sorted."""
    num_chunks = int(version.rpartition("x")[2]) if version else 0
    return sorted(f"{version} part {index}" for index in range(num_chunks))


def essay(name: str, version: str) -> tuple[Document, list[EncodedChunk]]:
    """A document whose title is its version."""
    num_chunks = int(version.rpartition("x")[2])
    texts = [f"{version} part {index}" for index in range(num_chunks)]
    chunks = [
        EncodedChunk(Chunk(index, text, 0, 1), (1.0, index + 1.0) * 4, sparse.encode_document(text))
        for index, text in enumerate(texts)
    ]
    return Document(name, version, f"{name} {version}", metadata={"name": name}), chunks


async def found_texts(store: Store, name: str, *, weights: tuple[float, float]) -> list[str]:
    """The texts of all chunks of a document that one of the lists finds, sorted."""
    found: list[Passage] = await store.search(
        (1.0,) * DIMENSION,
        sparse.encode_query("part"),
        filters={"name": name},
        limit=MAX_FOUND,
        num_candidates=MAX_FOUND,
        weights=weights,
    )
    return sorted(passage.text for passage in found)


async def is_whole(store: Store, name: str) -> bool:
    """Tell whether a search finds all chunks of one version of a document, or none at all."""
    texts = await found_texts(store, name, weights=(1, 0))
    return not texts or texts == texts_of(texts[0].split()[0])


async def check(store: Store, possible: dict[str, set[str]]) -> None:
    """Check that each document stands in one of the versions that it may have, for every way to look."""
    num_chunks = 0
    held = {stored.id: stored for stored in await store.documents(limit=100)}
    for name in NAMES:
        stored = held.get(name)
        version = stored.title if stored else DELETED
        assert version in possible[name]
        num_chunks += len(texts_of(version))
        assert await found_texts(store, name, weights=(1, 0)) == texts_of(version)
        assert await found_texts(store, name, weights=(0, 1)) == texts_of(version)
        assert (stored.num_chunks if stored else 0) == len(texts_of(version))
    assert await store.counts() == (len(held), num_chunks)


def read_log(lines: Sequence[str], before: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """Say in which versions each document may be: the last that was done, or one that was begun after it.

    A line without its end is what the process was writing when it was killed, and says nothing yet: it writes before it
    begins, and after it is done.
    """
    possible = {name: set(versions) for name, versions in before.items()}
    for line in lines:
        if not line.endswith("\n"):
            continue
        assert not line.startswith("torn"), line
        event, name, *version = line.split()
        if event == "begin":
            possible[name].add(version[0] if version else DELETED)
        elif event == "done":
            possible[name] = {version[0] if version else DELETED}
    return possible


async def write(store: Store, generator: random.Random) -> None:
    """Put and delete without an end."""
    while True:
        name = generator.choice(NAMES)
        version = f"{generator.randrange(10**9)}x{generator.choice(SIZES)}" if generator.random() < 0.75 else DELETED
        print("begin", name, version, flush=True)  # noqa: T201
        if version:
            await store.put(*essay(name, version))
        else:
            await delete(store, name)
        print("done", name, version, flush=True)  # noqa: T201


async def read(store: Store, generator: random.Random) -> None:
    """Search while it is written."""
    while True:
        name = generator.choice(NAMES)
        if not await is_whole(store, name):
            print("torn", name, flush=True)  # noqa: T201
        await asyncio.sleep(0.001)


async def write_and_read(place: str, seed: str) -> None:
    store = await open_store(place)
    await asyncio.gather(write(store, random.Random(seed)), read(store, random.Random(seed)))


class DyingShard:
    """The embedded engine; the process is killed when it has changed something so many times."""

    def __init__(self, shard: EdgeShard, num_updates: int) -> None:
        self._shard = shard
        self._num_left = num_updates

    def __getattr__(self, name: str) -> Any:
        return getattr(self._shard, name)

    def update(self, operation: Any) -> None:
        self._shard.update(operation)
        self._num_left -= 1
        if self._num_left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


async def die_in_the_middle(place: Path, num_updates: int, versions: Sequence[str]) -> None:
    """Write these versions of one document one after the other, the first of them in peace."""
    first, *others = versions
    store = edge.open_edge_store(place, dimension=DIMENSION, manifest=MANIFEST)
    await store.put(*essay("d0", first))
    store._shard = DyingShard(store._shard, num_updates)  # type: ignore[assignment]
    with place.with_suffix(".log").open("w") as log:
        for version in others:
            log.write(f"begin d0 {version}\n")
            log.flush()
            await (store.put(*essay("d0", version)) if version else delete(store, "d0"))
            log.write(f"done d0 {version}\n")
            log.flush()
    await store.close()


async def look_after(place: Path, first: str) -> None:
    store = await open_store(str(place))
    log = place.with_suffix(".log").read_text().splitlines(keepends=True)
    await check(store, read_log(log, {name: {first if name == "d0" else DELETED} for name in NAMES}))
    await store.close()


def in_a_process(work: Coroutine[Any, Any, None]) -> int:
    """Run it in a fork of this process, which has no threads yet; give the exit status."""
    child = os.fork()
    if child:
        work.close()
        return os.waitpid(child, 0)[1]
    status = 1
    try:
        asyncio.run(work)
        status = 0
    finally:
        os._exit(status)


def die_everywhere(folder: Path, versions: Sequence[str]) -> None:
    """Kill a process after its first change, then one after its second, and so on; check what each has left."""
    for num_updates in itertools.count(1):
        place = folder / str(num_updates)
        status = in_a_process(die_in_the_middle(place, num_updates, versions))
        assert status in (0, signal.SIGKILL)
        assert in_a_process(look_after(place, versions[0])) == 0, f"after {num_updates} changes"
        if status == 0:
            print(num_updates - 1)  # noqa: T201
            return


if __name__ == "__main__":
    if sys.argv[1] == "everywhere":
        die_everywhere(Path(sys.argv[2]), sys.argv[3].split(","))
    else:
        asyncio.run(write_and_read(*sys.argv[1:]))
