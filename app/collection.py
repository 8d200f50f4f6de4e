"""A collection of documents behind its name: the index that is used, and the one that may take its place."""

import asyncio
import time
import weakref
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from app.domain import CollectionInfo, ReindexStatus
from app.embedding import Embedder
from app.errors import CleaveError, CollectionMismatch, CollectionNotFound, ConfigurationError, InvalidRequest
from app.ingestion import Ingestor, manifest, recorded_settings
from app.models import identify, resolve_encoder
from app.reindexing import catch_up, synchronise
from app.reranking import Reranker
from app.retrieval import Index
from app.settings import EmbeddingSettings, IndexSettings, RetrievalSettings
from app.store import Aliases, Database, Manifest, Stamp, Store
from app.store.payload import changed_keys, difference, new_stored_name
from app.telemetry import logger

POLL_S = 2.0
"""How soon a process sees that another one has put a new index behind a name."""
MAX_PASSES = 5
SMALL_DIFFERENCE = 16
"""Documents that the last comparison before a swap may find changed; writers wait for it."""
MAX_PATIENCE_S = 1.0
"""How long building steps back for requests that are being answered, before each write."""

CLEANER_KEY, PROMPT_KEYS = "text.cleaner", "prompt."

T = TypeVar("T")
_running: set[asyncio.Task[Any]] = set()


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """Await what must not be cut in half when who asked for it leaves: a store that is opened, a name that changes."""
    task = asyncio.create_task(work)
    _running.add(task)
    task.add_done_callback(_running.discard)
    return await asyncio.shield(task)


@dataclass(frozen=True, slots=True)
class Plan:
    """Settings of an index, with the encoder loaded and the manifest that follows."""

    settings: IndexSettings
    embedder: Embedder
    manifest: Manifest


class IndexBuilder:
    """Makes indexes over stores; those with the same embedding settings share one encoder."""

    def __init__(
        self,
        retrieval: RetrievalSettings,
        chat_template: Path | None,
        *,
        reranker: Reranker | None = None,
        turn: asyncio.Lock | None = None,
    ) -> None:
        self._retrieval = retrieval
        self._reranker = reranker
        self._turn = turn or asyncio.Lock()
        self._chat_template = chat_template
        # An encoder goes with the last index that uses it. Another model may come to stand under the same name.
        self._embedders: weakref.WeakValueDictionary[tuple[EmbeddingSettings, str | None], Embedder]
        self._embedders = weakref.WeakValueDictionary()
        self._loading = asyncio.Lock()

    async def plan(self, settings: IndexSettings) -> Plan:
        """Load the encoder unless it is there. Raises `ConfigurationError`."""
        async with self._loading:
            content = await asyncio.to_thread(lambda: identify(resolve_encoder(settings.embedding.model)))
            key = (settings.embedding, content)
            embedder = self._embedders.get(key)
            if embedder is None:
                embedder = self._embedders[key] = await asyncio.to_thread(Embedder, settings.embedding, self._turn)
        stamp = manifest(embedder, settings.chunking, chat_template=self._chat_template)
        return Plan(settings, embedder, stamp)

    def index(self, plan: Plan, store: Store, name: str) -> Index:
        """Put an index over a store that was written by the same plan."""
        ingestor = Ingestor(plan.embedder, store, plan.settings.chunking)
        return Index(plan.embedder, store, ingestor, self._retrieval, name, self._reranker)


class _Open:
    """A stored collection that is open, with the index over it, or why there is none."""

    def __init__(self, store: Store, index: Index | None, refusal: str = "") -> None:
        self.store = store
        self.index = index
        self.refusal = refusal
        self.unused = asyncio.Event()
        self.unused.set()
        self._num_uses = 0
        self._is_closed = False

    @asynccontextmanager
    async def used(self) -> AsyncIterator[Index]:
        """Use the index; it stays open until the end, whatever takes its place.

        Raises `CollectionMismatch`, and `CollectionNotFound` when the collection was just dropped.
        """
        if self._is_closed:
            raise CollectionNotFound("The collection was removed.", param="collection")
        if self.index is None:
            raise CollectionMismatch(self.refusal)
        self._num_uses += 1
        self.unused.clear()
        try:
            yield self.index
        finally:
            self._num_uses -= 1
            if not self._num_uses:
                self.unused.set()

    async def close(self) -> None:
        """Wait for the last user and close the store."""
        self._is_closed = True
        await self.unused.wait()
        await self.store.close()


class _Writes:
    """Writers share it; whoever moves what they write to has it alone."""

    def __init__(self) -> None:
        self._allowed = asyncio.Event()
        self._allowed.set()
        self._unused = asyncio.Event()
        self._unused.set()
        self._num_writers = 0

    @asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        while not self._allowed.is_set():
            await self._allowed.wait()
        self._num_writers += 1
        self._unused.clear()
        try:
            yield
        finally:
            self._num_writers -= 1
            if not self._num_writers:
                self._unused.set()

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Hold writers off; one at a time may do so."""
        self._allowed.clear()
        try:
            await self._unused.wait()
            yield
        finally:
            self._allowed.set()


class Collection:
    """One collection as this process has it open.

    A request takes the live index once and keeps it to its end, so that no answer mixes two.
    """

    def __init__(
        self, name: str, database: Database, builder: IndexBuilder, configured: Plan, live: str, *, is_default: bool
    ) -> None:
        self.name = name
        self._is_default = is_default
        self._database = database
        self._builder = builder
        self._configured = configured
        self._live_name = live
        self._live: _Open
        self._candidate: _Open | None = None
        self._build: asyncio.Task[int] | None = None
        self._num_built = 0
        self._writes = _Writes()
        # Held by whoever changes what stands behind the name, and by whoever opens the candidate.
        self._changing = asyncio.Lock()
        self._opening = asyncio.Lock()

    @classmethod
    async def open(
        cls,
        name: str,
        database: Database,
        builder: IndexBuilder,
        settings: IndexSettings,
        *,
        is_default: bool,
        create: bool,
    ) -> Self:
        """Open a collection, or create it if that is wanted. Raises `CollectionNotFound`, `ConfigurationError`."""
        aliases = await database.aliases(name)
        if aliases is None and not create:
            held = ", ".join(await database.names()) or "none yet"
            raise CollectionNotFound(
                f"There is no collection {name!r}; there are: {held}. Adding documents to it creates it.",
                param="collection",
            )
        stored = aliases.live if aliases else name
        collection = cls(name, database, builder, await builder.plan(settings), stored, is_default=is_default)
        collection._live = await collection._open_live(stored)
        return collection

    @asynccontextmanager
    async def reading(self, index: Literal["live", "candidate"] = "live") -> AsyncIterator[Index]:
        """Use one index for one request. Raises `CollectionMismatch`, `InvalidRequest` when there is no candidate."""
        held = self._live if index == "live" else await to_the_end(self._candidate_or_error())
        async with held.used() as found:
            yield found

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[Index]:
        """Use the live index for a change; a swap waits for it, or it for the swap."""
        if self._database.is_shared:
            await self.refresh()
        async with self._writes.shared(), self.reading() as found:
            yield found

    async def info(self) -> CollectionInfo:
        """Say what is held, also of a collection that is refused."""
        num_documents, num_chunks = await self._live.store.counts()
        model = (await self._live.store.stamp()).manifest.get("embedding.model")
        return CollectionInfo(self.name, num_documents, num_chunks, str(model), self._is_default)

    async def close(self) -> None:
        """Stop building and release what is open, as soon as nobody uses it."""
        await self._stop_building()
        for held in (self._candidate, self._live):
            if held is not None:
                await held.close()

    # --- Reindexing --------------------------------------------------------------------------------------------------

    async def reindex(self, settings: IndexSettings) -> ReindexStatus:
        """Start building an index by these settings beside the live one, or go on with it.

        Where only the prompts have changed, nothing is built: the collection is stamped anew.

        Raises:
            ConfigurationError: the settings cannot be used.
            InvalidRequest: another one is being built.
        """
        plan = await self._builder.plan(settings)
        async with self._changing:
            stamp = await self._live.store.stamp()
            changed = changed_keys(stamp.manifest, plan.manifest)
            if all(key.startswith(PROMPT_KEYS) for key in changed):
                await self._stamp_anew(plan, stamp)
                return await self.status("current")
            candidate = await self._existing_candidate(plan)
            if self._is_building():
                if candidate is None:
                    raise InvalidRequest(
                        "Another index is being built. Wait for it, or give it up: `cleave reindex --discard`."
                    )
                return await self.status()
            candidate = candidate or await self._new_candidate(plan)
            self._num_built = 0
            self._build = asyncio.create_task(
                self._synchronise(candidate, is_cleaned_anew=CLEANER_KEY in changed), name=f"reindex {self.name}"
            )
            # Whoever asks is told by `status`; nobody else waits for the error.
            self._build.add_done_callback(_log_failure)
        return await self.status()

    async def status(self, state: Literal["current"] | None = None) -> ReindexStatus:
        """Say how far it is."""
        aliases = await self._aliases()
        num_documents, _ = await self._live.store.counts()
        live = (await self._live.store.stamp()).manifest
        candidate, num_done = None, 0
        if aliases.candidate:
            held = await self._candidate_or_error()
            candidate = (await held.store.stamp()).manifest
            num_done = self._num_built if self._is_building() else (await held.store.counts())[0]
        return ReindexStatus(
            collection=self.name,
            state=state or self._state(aliases, is_complete=num_done == num_documents),
            num_done=num_done,
            num_documents=num_documents,
            live=live,
            candidate=candidate,
            has_previous=aliases.previous is not None,
            is_live_served=self._live.index is not None,
            error=self._failure(),
        )

    async def swap(self) -> ReindexStatus:
        """Make the candidate the live index; the one before is kept for `rollback`. Raises `InvalidRequest`."""
        async with self._changing:
            candidate = await self._candidate_or_error()
            if self._is_building():
                raise InvalidRequest("The new index is still being built. `cleave reindex` waits for it.")
            aliases = await self._aliases()
            assert aliases.candidate is not None
            live, wanted = await self._live.store.stamp(), await candidate.store.stamp()
            is_cleaned_anew = CLEANER_KEY in changed_keys(live.manifest, wanted.manifest)
            await self._switch(candidate, Aliases(aliases.candidate, previous=aliases.live), is_cleaned_anew)
        return await self.status()

    async def rollback(self) -> ReindexStatus:
        """Make the index before the live one live again, brought up to date first. Raises `InvalidRequest`."""
        async with self._changing:
            aliases = await self._aliases()
            if aliases.previous is None:
                raise InvalidRequest(f"The collection {self.name!r} has no earlier index to go back to.")
            await self._close_candidate()
            previous = await self._open_recorded(aliases.previous)
            try:
                configured = self._configured.manifest
                prompts = {key: value for key, value in configured.items() if key.startswith(PROMPT_KEYS)}
                stamped = (await previous.store.stamp()).manifest
                await previous.store.set_stamp(Stamp({**stamped, **prompts}, stands_in_for=configured))
                await self._switch(previous, Aliases(aliases.previous, previous=aliases.live))
            finally:
                if self._live is not previous:
                    await previous.close()
        return await self.status()

    async def discard(self) -> ReindexStatus:
        """Give up the candidate and the index before the live one, and free their room."""
        async with self._changing:
            await self._close_candidate()
            aliases = Aliases((await self._aliases()).live)
            await self._database.set_aliases(self.name, aliases)
            await self._database.drop(self.name, keep=aliases)
        return await self.status()

    async def refresh(self) -> None:
        """Take over what another process has put behind the name. Raises `CollectionNotFound`."""
        if (await self._aliases()).live == self._live_name:
            return
        async with self._changing:
            stored = (await self._aliases()).live
            if stored == self._live_name:
                return
            before = self._live
            self._live = await self._open_live(stored)
            self._live_name = stored
            await self._close_candidate()
        logger.info("another index is live", extra={"collection": self.name, "stored": stored})
        await before.close()

    async def _switch(self, other: _Open, aliases: Aliases, is_cleaned_anew: bool = False) -> None:
        """Bring another index up to date and put it behind the name; requests that run keep the one they have."""
        for _ in range(MAX_PASSES):
            if await self._synchronise(other, is_cleaned_anew=is_cleaned_anew) <= SMALL_DIFFERENCE:
                break
        before = self._live
        async with self._writes.alone():
            await synchronise(before.store, _index(other), is_cleaned_anew=is_cleaned_anew)
            swapped_at = time.time()
            await self._database.set_aliases(self.name, aliases)
            self._live, self._live_name = other, aliases.live
            self._candidate = self._build = None
        logger.info("another index is live", extra={"collection": self.name, "stored": aliases.live})
        try:
            if self._database.is_shared:
                # Writes of other processes that had begun before.
                await asyncio.sleep(2 * POLL_S)
                await catch_up(before.store, _index(other), since=swapped_at - POLL_S)
            await before.close()
            await self._database.drop(self.name, keep=aliases)
        except CleaveError as error:
            # It is live all the same; what is left over goes with the next change.
            logger.warning("not all was tidied up", extra={"collection": self.name, "why": error.message})

    async def _synchronise(self, target: _Open, *, is_cleaned_anew: bool) -> int:
        def report(num_done: int) -> None:
            self._num_built = num_done

        return await synchronise(
            self._live.store,
            _index(target),
            is_cleaned_anew=is_cleaned_anew,
            before_write=self._let_requests_go_first,
            report=report,
        )

    async def _let_requests_go_first(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(MAX_PATIENCE_S):
                await self._live.unused.wait()

    async def _stamp_anew(self, plan: Plan, stamp: Stamp) -> None:
        if stamp.manifest != plan.manifest:
            await self._live.store.set_stamp(replace(stamp, manifest=plan.manifest))
        if self._live.index is None and not difference(plan.manifest, self._configured.manifest):
            self._live = _Open(self._live.store, self._builder.index(plan, self._live.store, self.name))

    def _is_building(self) -> bool:
        return self._build is not None and not self._build.done()

    def _failure(self) -> str | None:
        if self._build is None or not self._build.done() or self._build.cancelled():
            return None
        error = self._build.exception()
        if error is None:
            return None
        return error.message if isinstance(error, CleaveError) else "Internal error; the service's log says more."

    def _state(
        self, aliases: Aliases, *, is_complete: bool
    ) -> Literal["none", "building", "built", "interrupted", "failed"]:
        if aliases.candidate is None:
            return "none"
        if self._is_building():
            return "building"
        if self._failure():
            return "failed"
        if self._build is not None or is_complete:
            return "built"
        return "building" if self._database.is_shared else "interrupted"

    async def _stop_building(self) -> None:
        if self._build is not None:
            self._build.cancel()
            await asyncio.gather(self._build, return_exceptions=True)
            self._build = None

    async def _close_candidate(self) -> None:
        await self._stop_building()
        async with self._opening:
            if self._candidate is not None:
                await self._candidate.close()
                self._candidate = None

    async def _aliases(self) -> Aliases:
        aliases = await self._database.aliases(self.name)
        if aliases is None:
            raise CollectionNotFound(f"The collection {self.name!r} was removed.", param="collection")
        return aliases

    async def _candidate_or_error(self) -> _Open:
        async with self._opening:
            if self._candidate is None:
                aliases = await self._aliases()
                if aliases.candidate is None:
                    raise InvalidRequest(f"No index is being built for the collection {self.name!r}.", param="index")
                self._candidate = await self._open_recorded(aliases.candidate)
            return self._candidate

    async def _existing_candidate(self, plan: Plan) -> _Open | None:
        """Give the candidate if it is built by this plan."""
        async with self._opening:
            stored = (await self._aliases()).candidate
            if stored is None:
                return None
            candidate = self._candidate or await self._open_as(plan, stored)
            if not difference((await candidate.store.stamp()).manifest, plan.manifest):
                self._candidate = candidate
                return candidate
            if candidate is not self._candidate:
                await candidate.close()
            return None

    async def _new_candidate(self, plan: Plan) -> _Open:
        """Lay out an index beside the live one, in the place of a candidate that there is."""
        await self._close_candidate()
        async with self._opening:
            stored = new_stored_name(self.name)
            candidate = await self._open_as(plan, stored)
            await candidate.store.set_stamp(Stamp(plan.manifest, self._configured.manifest))
            aliases = replace(await self._aliases(), candidate=stored)
            await self._database.set_aliases(self.name, aliases)
            await self._database.drop(self.name, keep=aliases)
            self._candidate = candidate
            return candidate

    # --- Opening -----------------------------------------------------------------------------------------------------

    async def _open_live(self, stored: str) -> _Open:
        """Open what stands behind the name, and decide whether it may be used."""
        found = await self._open_as(self._configured, stored)
        stamp = await found.store.stamp()
        changed = difference(stamp.manifest, self._configured.manifest)
        if not changed:
            return found
        option = "" if self._is_default else f" --collection {self.name}"
        refusal = (
            f"The collection {self.name!r} was written with other settings than the service's ({changed}): "
            f"run `cleave reindex{option}` to rebuild it with the new ones, or set the old ones again."
        )
        if stamp.stands_in_for is not None and not difference(stamp.stands_in_for, self._configured.manifest):
            plan = await self._recorded_plan(stamp)
            if plan is not None:
                logger.warning(
                    "the collection was reindexed: set the new settings in the config file too",
                    extra={"collection": self.name, "difference": changed},
                )
                return _Open(found.store, self._builder.index(plan, found.store, self.name))
        logger.error("the collection is not used", extra={"collection": self.name, "why": refusal})
        return _Open(found.store, None, refusal)

    async def _open_as(self, plan: Plan, stored: str) -> _Open:
        """Open a stored collection by a plan, or create it."""
        store = await self._database.open(stored, dimension=plan.embedder.dimension, manifest=plan.manifest)
        return _Open(store, self._builder.index(plan, store, self.name))

    async def _open_recorded(self, stored: str) -> _Open:
        """Open a stored collection by the settings that it was written with. Raises `InvalidRequest`."""
        found = await self._open_as(self._configured, stored)
        plan = await self._recorded_plan(await found.store.stamp())
        if plan is None:
            await found.store.close()
            raise InvalidRequest(
                f"The index {stored!r} was written by another version of Cleave or with a model that is not here "
                "any more, and cannot be used: `cleave reindex` builds a new one."
            )
        return _Open(found.store, self._builder.index(plan, found.store, self.name))

    async def _recorded_plan(self, stamp: Stamp) -> Plan | None:
        """Load what a collection was written with; None when vectors would not be what they were."""
        before = self._configured.settings
        embedding, chunking = recorded_settings(stamp.manifest, before.embedding, before.chunking)
        try:
            plan = await self._builder.plan(IndexSettings(embedding=embedding, chunking=chunking))
        except ConfigurationError as error:
            logger.warning("an index cannot be opened", extra={"collection": self.name, "why": error.message})
            return None
        changed = changed_keys(stamp.manifest, plan.manifest)
        return plan if all(key.startswith(PROMPT_KEYS) for key in changed) else None


def _index(held: _Open) -> Index:
    assert held.index is not None
    return held.index


def _log_failure(build: asyncio.Task[int]) -> None:
    if not build.cancelled() and (error := build.exception()):
        logger.error("the new index could not be built", exc_info=error)
