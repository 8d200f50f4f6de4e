"""The retriever and the LLM when they live in another deployment: the same interfaces, over a `DeploymentHandle`."""

import asyncio
import contextvars
import math
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, cast

from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from app.domain import (
    Chunk,
    CollectionInfo,
    DeletionReceipt,
    Delta,
    Document,
    Facet,
    Filters,
    GenerationRequest,
    IngestReceipt,
    ModelInfo,
    ReindexStatus,
    RetrieverInfo,
    SearchQuery,
    SearchResult,
    StoredDocument,
)
from app.errors import CleaveError, LLMCold, LLMUnavailable, Overloaded, RetrieverUnavailable, Unavailable
from app.settings import IndexSettings
from app.store import NO_FILTERS
from app.telemetry import logger
from deployments.tier import MAX_AGE_S, Tier

PROBE_TIMEOUT_S = 1.0
"""A healthy engine answers in milliseconds, also while it generates."""
WAKE_INTERVAL_S = 2.0
MIN_RETRY_AFTER_S = 5.0
"""What is said when a start takes longer than expected."""


class RetrieverHandle:
    """An `app.retrieval.Retriever` in another deployment."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle
        self._tier = Tier(handle.app_name, handle.deployment_name)

    async def search(self, query: SearchQuery) -> SearchResult:
        """See `Retriever.search`."""
        return cast(SearchResult, await self._call("search", query))

    async def ingest(self, documents: Sequence[Document], *, collection: str | None = None) -> list[IngestReceipt]:
        """See `Retriever.ingest`."""
        return cast(list[IngestReceipt], await self._call("ingest", documents, collection=collection))

    async def documents(
        self,
        *,
        after: str | None = None,
        limit: int = 100,
        filters: Filters = NO_FILTERS,
        collection: str | None = None,
    ) -> list[StoredDocument]:
        """See `Retriever.documents`."""
        found = await self._call("documents", after=after, limit=limit, filters=filters, collection=collection)
        return cast(list[StoredDocument], found)

    async def num_documents(self, filters: Filters, *, collection: str | None = None) -> int:
        """See `Retriever.num_documents`."""
        return cast(int, await self._call("num_documents", filters, collection=collection))

    async def document(self, document_id: str, *, collection: str | None = None) -> tuple[StoredDocument, str]:
        """See `Retriever.document`."""
        return cast(tuple[StoredDocument, str], await self._call("document", document_id, collection=collection))

    async def chunks(
        self, document_id: str, *, version: int, only: int | None = None, collection: str | None = None
    ) -> list[Chunk] | None:
        """See `Retriever.chunks`."""
        found = await self._call("chunks", document_id, version=version, only=only, collection=collection)
        return cast(list[Chunk] | None, found)

    async def delete(self, document_id: str, *, collection: str | None = None) -> DeletionReceipt:
        """See `Retriever.delete`."""
        return cast(DeletionReceipt, await self._call("delete", document_id, collection=collection))

    async def info(self, *, collection: str | None = None) -> RetrieverInfo:
        """See `Retriever.info`."""
        return cast(RetrieverInfo, await self._call("info", collection=collection))

    async def facets(self, *, limit: int, collection: str | None = None) -> list[Facet]:
        """See `Retriever.facets`."""
        return cast(list[Facet], await self._call("facets", limit=limit, collection=collection))

    async def collections(self) -> list[CollectionInfo]:
        """See `Retriever.collections`."""
        return cast(list[CollectionInfo], await self._call("collections"))

    async def drop_collection(self, name: str) -> None:
        """See `Retriever.drop_collection`."""
        await self._call("drop_collection", name)

    async def reindex(self, settings: IndexSettings, *, collection: str | None = None) -> ReindexStatus:
        """See `Retriever.reindex`."""
        return cast(ReindexStatus, await self._call("reindex", settings, collection=collection))

    async def reindex_status(self, *, collection: str | None = None) -> ReindexStatus:
        """See `Retriever.reindex_status`."""
        return cast(ReindexStatus, await self._call("reindex_status", collection=collection))

    async def swap_index(self, *, collection: str | None = None) -> ReindexStatus:
        """See `Retriever.swap_index`."""
        return cast(ReindexStatus, await self._call("swap_index", collection=collection))

    async def rollback_index(self, *, collection: str | None = None) -> ReindexStatus:
        """See `Retriever.rollback_index`."""
        return cast(ReindexStatus, await self._call("rollback_index", collection=collection))

    async def discard_index(self, *, collection: str | None = None) -> ReindexStatus:
        """See `Retriever.discard_index`."""
        return cast(ReindexStatus, await self._call("discard_index", collection=collection))

    async def close(self) -> None:
        """Nothing is held here: the deployment closes itself."""

    async def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        state = await self._tier.state()
        why = f"cannot start: {state.waits_because}" if state.waits_because else "is restarting. Try again shortly."
        unavailable = RetrieverUnavailable(f"The retriever {why}", retry_after_s=5)
        if not state.num_running:
            raise unavailable
        with _translated_errors(unavailable):
            response = getattr(self._handle, method).remote(*args, **kwargs)
            try:
                return await response
            except asyncio.CancelledError:
                # Leaving alone would let the retriever work on for nobody.
                response.cancel()
                raise


class LLMHandle:
    """An `app.llm.LLM` in another deployment, which may have no replica at the moment.

    A call to a deployment without replicas would wait for one to come. So the handle looks first, and fails at once
    when there is none: the caller can degrade instead of waiting. Such a request wakes a tier that is scaled to zero.
    """

    def __init__(self, handle: DeploymentHandle[Any], *, expected_start_s: float) -> None:
        self._info = handle.info
        self._generate = handle.options(stream=True).generate
        self._tier = Tier(handle.app_name, handle.deployment_name)
        self._expected_start_s = expected_start_s
        self._start_began: float | None = None
        self._waits_because = ""
        self._waking: asyncio.Task[None] | None = None
        self._is_suspect = True

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """See `LLM.generate`."""
        try:
            await self._check_is_up()
        except LLMCold:
            self._wake()
            raise
        if self._is_suspect:
            await self._probe()
        has_answered = False
        with _translated_errors(_restarting()):
            stream = self._generate.remote(request)
            try:
                yield await self._first(stream)
                has_answered = True
                self._is_suspect = False
                async for delta in stream:
                    yield delta
            except RayError:
                self._is_suspect = True
                raise
            finally:
                # Whoever gave up before the first token leaves the suspicion behind.
                self._is_suspect |= not has_answered
                # Leaving the loop alone would let the engine generate to the end.
                stream.cancel()

    async def info(self) -> ModelInfo:
        """See `LLM.info`. It wakes nothing: a monitor that asks every few seconds must not keep a GPU busy."""
        await self._check_is_up()
        return await self._probe()

    async def close(self) -> None:
        """Nothing is held here but a wait: the deployment closes itself."""
        if self._waking:
            self._waking.cancel()

    async def _check_is_up(self) -> None:
        state = await self._tier.state()
        if state.waits_because != self._waits_because:
            self._waits_because = state.waits_because
            if self._waits_because:
                logger.warning("the language model cannot be placed", extra={"why": self._waits_because})
        if state.num_running:
            self._start_began = None
            return
        if not state.scales_to_zero:
            self._start_began = self._start_began or time.monotonic()
        # A tier that is scaled to zero starts when it is woken.
        passed_s = time.monotonic() - self._start_began if self._start_began else 0.0
        left_s = max(self._expected_start_s - passed_s, MIN_RETRY_AFTER_S)
        if state.scales_to_zero:
            expected = state.waits_because or f"About {left_s:.0f} s are left."
            raise LLMCold(
                f"The language model is scaled to zero, and a request wakes it. {expected}",
                retry_after_s=math.ceil(left_s),
            )
        raise _restarting(state.waits_because, retry_after_s=math.ceil(left_s))

    async def _first(self, stream: AsyncIterator[Delta]) -> Delta:
        """Wait for the first delta, but not for a replica that has gone meanwhile."""
        first = asyncio.ensure_future(anext(stream))
        try:
            while not (await asyncio.wait({first}, timeout=MAX_AGE_S))[0]:
                await self._check_is_up()
            return first.result()
        except StopAsyncIteration:
            raise LLMUnavailable("The language model's stream ended before it began.", retry_after_s=2) from None
        finally:
            first.cancel()
            # Serve turns the cancellation into an error of its own, which nobody waits for.
            first.add_done_callback(lambda task: task.cancelled() or task.exception())

    async def _probe(self) -> ModelInfo:
        with _translated_errors(_restarting()):
            try:
                found = await self._ask(PROBE_TIMEOUT_S)
            except TimeoutError:
                raise LLMUnavailable("The language model does not answer: it is busy.", retry_after_s=5) from None
        self._is_suspect = False
        return found

    def _wake(self) -> None:
        if self._waking is None:
            self._start_began = time.monotonic()
            # In a context of its own: Serve would cancel the call together with the request that it came with.
            self._waking = asyncio.create_task(self._wait_for_a_replica(), context=contextvars.Context())

    async def _wait_for_a_replica(self) -> None:
        """Keep a call waiting, which is what makes Serve start a replica, and learn how long that takes."""
        started = time.monotonic()
        try:
            # Each new call to a tier without replicas is told to Serve at once; one that waits, only now and then.
            while True:
                with suppress(TimeoutError):
                    await self._ask(WAKE_INTERVAL_S)
                    break
            self._expected_start_s = time.monotonic() - started
            logger.info("the language model has started", extra={"took_s": round(self._expected_start_s, 1)})
        except Exception as error:
            logger.warning("the language model has not started", extra={"error": str(error)})
        finally:
            self._waking = None
            self._start_began = None

    async def _ask(self, timeout_s: float) -> ModelInfo:
        response = self._info.remote()
        try:
            async with asyncio.timeout(timeout_s):
                return cast(ModelInfo, await response)
        except TimeoutError:
            response.cancel()
            raise


def _restarting(why: str = "", *, retry_after_s: int = 10) -> LLMUnavailable:
    message = f"The language model cannot start: {why}" if why else "The language model is starting or restarting."
    return LLMUnavailable(message, retry_after_s=retry_after_s)


@contextmanager
def _translated_errors(unavailable: Unavailable) -> Iterator[None]:
    """Unwrap errors of ours from Ray's, and turn Ray's own into ours."""
    try:
        yield
    except RayTaskError as error:
        # Ray's wrapper carries the remote traceback in its text, which is no answer for a client.
        if isinstance(error.cause, CleaveError):
            raise error.cause from None
        raise
    except BackPressureError as error:
        raise Overloaded("Too many requests are waiting. Try again shortly.", retry_after_s=2) from error
    except (RayActorError, DeploymentUnavailableError) as error:
        raise unavailable from error
