"""The retriever and the LLM when they live in another deployment: the same interfaces, over a `DeploymentHandle`."""

import asyncio
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from app.domain import (
    Delta,
    Document,
    GenerationRequest,
    IngestReceipt,
    ModelInfo,
    RetrieverInfo,
    SearchQuery,
    SearchResult,
    StoredDocument,
)
from app.errors import CleaveError, LLMUnavailable, Overloaded, RetrieverUnavailable, Unavailable

PROBE_TIMEOUT_S = 1.0
"""A healthy engine answers in milliseconds, also while it generates."""


class RetrieverHandle:
    """An `app.retrieval.Retriever` in another deployment."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def search(self, query: SearchQuery) -> SearchResult:
        """See `Retriever.search`."""
        return cast(SearchResult, await self._call("search", query))

    async def ingest(self, documents: Sequence[Document]) -> list[IngestReceipt]:
        """See `Retriever.ingest`."""
        return cast(list[IngestReceipt], await self._call("ingest", documents))

    async def documents(self, *, after: str | None = None, limit: int = 100) -> list[StoredDocument]:
        """See `Retriever.documents`."""
        return cast(list[StoredDocument], await self._call("documents", after=after, limit=limit))

    async def document(self, document_id: str) -> tuple[StoredDocument, str]:
        """See `Retriever.document`."""
        return cast(tuple[StoredDocument, str], await self._call("document", document_id))

    async def delete(self, document_id: str) -> None:
        """See `Retriever.delete`."""
        await self._call("delete", document_id)

    async def info(self) -> RetrieverInfo:
        """See `Retriever.info`."""
        return cast(RetrieverInfo, await self._call("info"))

    async def close(self) -> None:
        """Nothing is held here: the deployment closes itself."""

    async def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        unavailable = RetrieverUnavailable("The retriever is restarting. Try again shortly.", retry_after_s=5)
        with _translated_errors(unavailable):
            return await getattr(self._handle, method).remote(*args, **kwargs)


class LLMHandle:
    """An `app.llm.LLM` in another deployment.

    A call to a deployment without replicas would wait for one to come. So a start, or a failure, is remembered, and
    until a probe succeeds calls fail at once: the caller can degrade instead of waiting.
    """

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._info = handle.info
        self._generate = handle.options(stream=True).generate
        self._is_suspect = True

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """See `LLM.generate`."""
        if self._is_suspect:
            await self.info()
        has_answered = False
        with _translated_errors(_llm_unavailable()):
            stream = self._generate.remote(request)
            try:
                async for delta in stream:
                    has_answered = True
                    yield delta
            finally:
                # Whoever gave up before the first token leaves the suspicion behind.
                self._is_suspect = not has_answered
                # Leaving the loop alone would let the engine generate to the end.
                stream.cancel()

    async def info(self) -> ModelInfo:
        """See `LLM.info`."""
        with _translated_errors(_llm_unavailable()):
            response = self._info.remote()
            try:
                async with asyncio.timeout(PROBE_TIMEOUT_S):
                    found = cast(ModelInfo, await response)
            except TimeoutError:
                response.cancel()
                raise _llm_unavailable() from None
        self._is_suspect = False
        return found

    async def close(self) -> None:
        """Nothing is held here: the deployment closes itself."""


def _llm_unavailable() -> LLMUnavailable:
    return LLMUnavailable("The language model is starting or restarting. Try again shortly.", retry_after_s=10)


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
