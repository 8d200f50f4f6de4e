"""A line of an offline batch in two halves: as far as it gets without the language model, and the rest.

Both are the pipeline that answers online, with the same checks. The first one finds passages for many lines and answers
those that need no model, such as refusals; the second one, in another process, is given what was found.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass
from typing import Any

from app.access import Caller, caller
from app.batch_lines import BatchRequest, Line, LineRefused, parse_question, unanswered
from app.batch_worker import answer, patient_settings, persistently
from app.chat import ChatService
from app.domain import Delta, GenerationRequest, ModelInfo, SearchQuery, SearchResult
from app.llm import LLM
from app.retrieval import Searcher
from app.services import build_chat, decide_grounding, decide_planning
from app.settings import Device, Settings

NUM_SEARCHES = 64
"""At once, as many as the retriever of a service takes."""
PATIENCE_S = 60.0
"""How long a part of the service may be away before the run ends; the next one goes on."""
SETTINGS_OF_ANSWERS = {
    *("embedding", "chunking", "store", "retrieval", "reranking", "llm", "planning", "answer", "profiles")
}
WITHOUT_EFFECT = {
    "embedding": {"batch_size", "num_threads"},
    "store": {"api_key"},
    "reranking": {"batch_size"},
    "llm": {"api_key", "device", "max_num_seqs", "stream_interval", "kv_cache_gib", "num_threads"},
    "planning": {"rewrite_timeout_s"},
    "answer": {"timeout_s", "first_token_timeout_s", "without_llm", "llm_start_s"},
}
"""What of these changes no answer."""


def settings_of_answers(settings: Settings, device: Device) -> dict[str, Any]:
    """Give the settings that an answer depends on, without secrets: two runs with the same ones answer the same."""
    found = settings.model_dump(mode="json", include=SETTINGS_OF_ANSWERS, exclude=WITHOUT_EFFECT)
    found["llm"]["model"] = settings.llm.model_on(device)
    found["answer"]["grounding"] = decide_grounding(settings, device)
    found["planning"]["rewrite"] = decide_planning(settings, device).rewrite
    return found


@dataclass(frozen=True, slots=True)
class Prepared:
    """A line: its result, or the request with what was searched for and found."""

    request: BatchRequest | None = None
    query: SearchQuery | None = None
    found: SearchResult | None = None
    result: Mapping[str, Any] | None = None


class Preparation:
    """The first half."""

    def __init__(self, settings: Settings, device: Device, searcher: Searcher, *, base_url: str) -> None:
        self._pipeline = _Pipeline(settings, device, searcher, _NoLLM())
        self._base_url = base_url
        self._turn = asyncio.Semaphore(NUM_SEARCHES)

    async def prepare(self, lines: Sequence[Line], repeated: Sequence[int] = ()) -> list[Prepared]:
        """Check lines and search for them, all at once. Those that are `repeated` have the custom_id of another.

        Raises `Unavailable` when passages cannot be searched for.
        """
        return await asyncio.gather(*(self._prepare(line, line.number in repeated) for line in lines))

    async def _prepare(self, line: Line, is_repeated: bool) -> Prepared:
        try:
            request = parse_question(line.content, line.number)
        except LineRefused as refused:
            message = f"Line {line.number}: {refused.message}"
            return Prepared(result=unanswered(None, refused.code, message))
        if is_repeated:
            message = f"Line {line.number}: custom_id {request.custom_id!r} stands in an earlier line too."
            return Prepared(result=unanswered(request.custom_id, "duplicate_custom_id", message))
        memory = _Memory(self._pipeline.searcher)
        try:
            async with self._turn:
                found = await self._pipeline.result(request, memory, self._base_url)
        except _ModelNeeded:
            return Prepared(request, memory.query, memory.found)
        return Prepared(result=found)


class Completion:
    """The second half. Where a question needs the model before the search, `searcher` searches."""

    def __init__(self, settings: Settings, device: Device, searcher: Searcher, llm: LLM, *, base_url: str) -> None:
        self._pipeline = _Pipeline(settings, device, searcher, llm)
        self._base_url = base_url
        # More than the engine runs at once, so that its own scheduler always has a next request to take.
        self._turn = asyncio.Semaphore(2 * settings.llm.max_num_seqs)

    async def complete(self, prepared: Prepared) -> Mapping[str, Any]:
        """Give the result of a line. Raises `Unavailable` when there is no answer to be had."""
        if prepared.request is None:
            assert prepared.result is not None
            return prepared.result
        memory = _Memory(self._pipeline.searcher, prepared.query, prepared.found)
        async with self._turn:
            return await self._pipeline.result(prepared.request, memory, self._base_url)


@dataclass(frozen=True, slots=True)
class Load:
    """What a language model has had to do, in seconds and tokens."""

    seconds: float = 0.0
    busy_s: float = 0.0
    """With at least one request."""
    full_s: float = 0.0
    """With as many as it runs at once, or more."""
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: "Load") -> "Load":
        """Add up what several had to do."""
        return Load(
            *(mine + theirs for mine, theirs in zip(asdict(self).values(), asdict(other).values(), strict=True))
        )


class MeasuredLLM:
    """An `LLM` that knows what it has had to do."""

    def __init__(self, llm: LLM, *, max_num_seqs: int) -> None:
        self._llm = llm
        self._max_num_seqs = max_num_seqs
        self._num_running = 0
        self._since = time.monotonic()
        self._load = Load()

    def load(self) -> Load:
        """Tell what it was until now."""
        now = time.monotonic()
        passed, self._since = now - self._since, now
        is_busy, is_full = self._num_running > 0, self._num_running >= self._max_num_seqs
        self._load += Load(passed, passed * is_busy, passed * is_full)
        return self._load

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """See `LLM.generate`."""
        prompt_tokens = completion_tokens = 0
        self._count(+1)
        try:
            async with aclosing(self._llm.generate(request)) as deltas:
                async for delta in deltas:
                    prompt_tokens = delta.prompt_tokens or prompt_tokens
                    completion_tokens = delta.completion_tokens
                    yield delta
        finally:
            self._count(-1)
            self._load += Load(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)

    async def info(self) -> ModelInfo:
        """See `LLM.info`."""
        return await self._llm.info()

    async def close(self) -> None:
        """See `LLM.close`."""
        await self._llm.close()

    def _count(self, change: int) -> None:
        self.load()
        self._num_running += change


class _Pipeline:
    """The pipeline that answers online, as a batch has it: with patience, and all rights."""

    def __init__(self, settings: Settings, device: Device, searcher: Searcher, llm: LLM) -> None:
        self.searcher = searcher
        self._settings = patient_settings(settings)
        self._llm = llm
        self._chat = build_chat(self._settings, device, searcher, llm)

    async def result(self, request: BatchRequest, searcher: Searcher, base_url: str) -> Mapping[str, Any]:
        """Answer a request with what this searcher finds."""
        caller.set(Caller(None, self._settings.store.collection))
        answering = _Answering(self._settings, self._llm, self._chat.over(searcher, self._llm))
        return await persistently(
            request, lambda: answer(answering, request, base_url=base_url), self._llm, patience_s=PATIENCE_S
        )


@dataclass(frozen=True, slots=True)
class _Answering:
    settings: Settings
    llm: LLM
    chat: ChatService


class _Memory:
    """A `Searcher` that knows the result of a search already, once it was asked or from the beginning."""

    def __init__(self, searcher: Searcher, query: SearchQuery | None = None, found: SearchResult | None = None) -> None:
        self._searcher = searcher
        self.query = query
        self.found = found

    async def search(self, query: SearchQuery) -> SearchResult:
        """See `Searcher.search`."""
        if self.found is None or query != self.query:
            self.query, self.found = query, await self._searcher.search(query)
        return self.found


class _ModelNeeded(BaseException):
    """A line has come as far as it gets without the model. No `Exception`: on its way nothing has failed."""


class _NoLLM:
    """The `LLM` of a process that has none."""

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """Say that from here on it is needed."""
        raise _ModelNeeded
        yield Delta("")  # Makes it a generator.

    async def info(self) -> ModelInfo:
        """Likewise."""
        raise _ModelNeeded

    async def close(self) -> None:
        """Nothing is held."""
