"""The pipeline: plan the query, retrieve, generate, check. It cannot tell local parts from remote ones."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TypeAlias, TypeVar

from app.answerability import assess
from app.chunking import sentences
from app.citations import Citation, MarkerFilter, find_citations, without_markers
from app.domain import (
    Delta,
    Filters,
    FinishReason,
    GenerationRequest,
    Grounded,
    Grounding,
    Message,
    Passage,
    Refusal,
    SamplingParams,
    SearchQuery,
    SearchResult,
)
from app.errors import DeadlineExceeded, LLMUnavailable, Unavailable
from app.gate import Gate
from app.grounding import is_supported
from app.llm import LLM
from app.llm.extractive import ExtractiveEngine
from app.planning import Plan, RewritingFailed, plan_query, rewrite_question
from app.prompts import CITING_INSTRUCTIONS, JSON_INSTRUCTIONS, PLAIN_INSTRUCTIONS
from app.retrieval import Searcher
from app.self_query import describe
from app.settings import AnswerSettings, PlanningSettings
from app.telemetry import Stopwatch, logger

REFUSAL = "The documents do not hold an answer to this question."
NEAR_MISS = "The sources come closest."
REWRITING_SHARE = 0.25
"""Of the request's time: what making a follow-up stand alone may take."""
RETRIEVAL_SHARE = 0.5
"""Of the request's time: what retrieval may take, so that an answer can still be made."""
QUOTING_RESERVE = 0.1
"""Of the request's time: kept for quoting when the model does not come to an end."""

MAX_GATED_TOKENS = 96
"""Two sentences; a small model that needs more is rambling, and the gate would wait for it."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """One question with its conversation."""

    request_id: str
    messages: tuple[Message, ...]
    sampling: SamplingParams
    top_k: int
    timeout_s: float
    filters: Filters = field(default_factory=dict)
    recognise_filters: bool = False
    collection: str | None = None
    use_documents: bool = True
    grounding: Grounding | None = None
    """None: the service's own. JSON is not checked, whatever it says."""


@dataclass(frozen=True, slots=True)
class AnswerStart:
    """The first event. `sources` are what was retrieved; markers count them from 1."""

    sources: tuple[Passage, ...]
    query: str
    degraded: tuple[str, ...] = ()
    recognised_filters: Filters = field(default_factory=dict)
    notice: str | None = None


@dataclass(frozen=True, slots=True)
class AnswerText:
    """A piece of the answer, markers checked."""

    text: str
    is_refusal: bool = False


@dataclass(frozen=True, slots=True)
class AnswerEnd:
    """The last event."""

    citations: tuple[Citation, ...]
    grounded: Grounded
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    num_presented: int
    num_removed_markers: int
    unsupported: tuple[str, ...]
    degraded: tuple[str, ...]
    timings_ms: Mapping[str, float]
    refusal: Refusal | None = None
    """Set exactly when `grounded` is `refused`."""


AnswerEvent: TypeAlias = AnswerStart | AnswerText | AnswerEnd


class ChatService:
    """Answers questions from the passages of a searcher with the words of an LLM."""

    def __init__(
        self,
        searcher: Searcher,
        llm: LLM,
        *,
        grounding: Grounding,
        settings: AnswerSettings,
        planning: PlanningSettings | None = None,
    ) -> None:
        self._searcher = searcher
        self._llm = llm
        self._fallback = ExtractiveEngine()
        self._grounding = grounding
        self._settings = settings
        self._planning = planning or PlanningSettings()

    def over(
        self,
        searcher: Searcher,
        llm: LLM,
        *,
        settings: AnswerSettings | None = None,
        rewrite_timeout_s: float | None = None,
    ) -> "ChatService":
        """Make the same service over other parts, perhaps with other limits."""
        settings, planning = settings or self._settings, self._planning
        if rewrite_timeout_s is not None:
            planning = planning.model_copy(update={"rewrite_timeout_s": rewrite_timeout_s})
        return ChatService(searcher, llm, grounding=self._grounding, settings=settings, planning=planning)

    async def answer(self, request: ChatRequest) -> AsyncGenerator[AnswerEvent, None]:
        """Yield an `AnswerStart`, the text in pieces, and an `AnswerEnd`.

        The first event waits for the engine's first token, so an error that comes before it is raised in time to
        become an HTTP status. Closing the generator aborts the engine's request.

        Raises:
            InvalidRequest, UnknownFilter, ContextTooLong: before the first event.
            RetrieverUnavailable, LLMUnavailable, DeadlineExceeded.
        """
        run = _Run(request, plan_query(request.messages), request.grounding or self._grounding)
        found = await self._retrieve(run) if request.use_documents else SearchResult(())
        passages = found.passages
        start = AnswerStart(passages, run.query, tuple(run.degraded), found.recognised_filters, found.notice)
        refusal = self._refusal(run, found) if request.use_documents else None
        if refusal:
            yield start
            yield AnswerText(_in_words(refusal, found), is_refusal=True)
            yield run.end(grounded="refused", refusal=refusal)
            return
        engines = (self._llm, self._fallback)
        generation = self._generation(run, passages)
        first_delta = run.first_delta(
            engines,
            generation,
            self._settings.first_token_timeout_s,
            is_llm_required=self._settings.without_llm == "error",
        )
        async with first_delta as deltas:
            yield replace(start, degraded=tuple(run.degraded))
            text = ""
            async with aclosing(self._checked(run, deltas, generation.passages)) as pieces:
                async for piece in pieces:
                    text += piece
                    yield AnswerText(piece)
        # What the model was not given cannot be cited, whatever brackets it puts around a number; in JSON, none is.
        markers = [] if request.sampling.json else find_citations(text)
        citations = [one for one in markers if 1 <= one.n <= len(generation.passages)]
        yield run.end(grounded=run.grounded, citations=citations)

    async def _retrieve(self, run: "_Run") -> SearchResult:
        await self._make_standalone(run)
        timeout_s = RETRIEVAL_SHARE * run.request.timeout_s
        query = SearchQuery(
            run.query,
            run.request.top_k,
            run.request.filters,
            num_scored=self._settings.num_passages,
            timeout_s=timeout_s,
            context=run.plan.context,
            recognise_filters=run.request.recognise_filters,
            collection=run.request.collection,
        )
        with run.watch.stage("retrieve"):
            found = await run.within(timeout_s, self._searcher.search(query), "retrieval")
        for reason in found.degraded:
            run.degrade(reason)
        run.watch.timings_ms |= {f"retrieve.{stage}": duration for stage, duration in found.timings_ms.items()}
        return found

    async def _make_standalone(self, run: "_Run") -> None:
        """Have a follow-up rewritten by a model that can; else the earlier questions count lightly."""
        if self._planning.rewrite != "always" or not run.plan.may_depend:
            return
        timeout_s = min(self._planning.rewrite_timeout_s, REWRITING_SHARE * run.request.timeout_s)
        request = run.request
        try:
            with run.watch.stage("rewrite"):
                question = await rewrite_question(
                    request.messages, self._llm, request_id=request.request_id, timeout_s=timeout_s
                )
            run.plan = Plan(question)
        except RewritingFailed as error:
            run.degrade("rewriting_skipped", str(error))

    def _refusal(self, run: "_Run", found: SearchResult) -> Refusal | None:
        if not found.passages:
            return Refusal("no_match" if found.notice else "off_topic")
        if run.grounding == "off":
            return None
        judged = assess(run.query, found.passages)
        if judged.score >= self._settings.min_evidence:
            return None
        return Refusal("off_topic" if judged.is_off_topic else "not_in_passages", judged.score, judged.missing)

    def _generation(self, run: "_Run", passages: tuple[Passage, ...]) -> GenerationRequest:
        request = run.request
        instructions, sampling = CITING_INSTRUCTIONS, request.sampling
        if sampling.json:
            instructions = JSON_INSTRUCTIONS
        elif run.grounding == "gate" and passages:
            instructions = PLAIN_INSTRUCTIONS
            sampling = replace(sampling, max_tokens=min(sampling.max_tokens, MAX_GATED_TOKENS))
        presented = passages[: self._settings.num_passages]
        return GenerationRequest(request.request_id, request.messages, sampling, presented, instructions)

    async def _checked(
        self, run: "_Run", deltas: AsyncIterator[Delta], passages: tuple[Passage, ...]
    ) -> AsyncGenerator[str, None]:
        if not run.request.use_documents or run.request.sampling.json:
            checked = self._raw(deltas)
        elif run.grounding == "gate" and not run.first.is_quote:
            # What did not fit into the prompt can still be quoted.
            checked = self._gated(run, deltas, passages)
        else:
            checked = self._filtered(run, deltas, passages[: run.first.num_presented])
        async with aclosing(checked) as pieces:
            async for piece in pieces:
                if piece:
                    yield piece

    async def _raw(self, deltas: AsyncIterator[Delta]) -> AsyncGenerator[str, None]:
        """Stream as it is: where there are no sources, and in JSON, `[0]` is no marker."""
        async for delta in deltas:
            yield delta.text

    async def _gated(
        self, run: "_Run", deltas: AsyncIterator[Delta], passages: tuple[Passage, ...]
    ) -> AsyncGenerator[str, None]:
        """Release supported sentences as they are completed; whatever stops the model, quotes complete the answer."""
        gate = Gate(run.query, passages)
        is_whole = False
        try:
            async for delta in deltas:
                yield gate.feed(delta.text)
                if gate.is_full:
                    break
            is_whole = run.finish_reason == "stop"
        except LLMUnavailable as error:
            run.degrade("llm_failed", error.message)
        except DeadlineExceeded:
            run.degrade("llm_timeout")
        yield gate.finish(is_whole=is_whole)
        run.finish_reason = "stop"  # Whatever ended the model's text, quotes make the answer whole.
        run.grounded = gate.grounded
        run.unsupported = tuple(gate.unsupported)
        run.num_removed_markers = gate.num_removed_markers

    async def _filtered(
        self, run: "_Run", deltas: AsyncIterator[Delta], presented: tuple[Passage, ...]
    ) -> AsyncGenerator[str, None]:
        """Stream at once, without markers that name no source; say at the end what the passages do not support."""
        markers = MarkerFilter(len(presented))
        text = ""
        async for delta in deltas:
            piece = markers.feed(delta.text)
            text += piece
            yield piece
        rest = markers.flush()
        yield rest
        run.num_removed_markers = markers.num_removed
        if run.first.is_quote:
            run.grounded = "quotes"
        elif presented and run.grounding == "flag":
            stated = sentences(without_markers(text + rest))
            run.unsupported = tuple(one for one in stated if not is_supported(one, run.query, presented))
            run.grounded = "flagged" if run.unsupported else "model"


def _in_words(refusal: Refusal, found: SearchResult) -> str:
    """Word a refusal: what the question itself narrowed the search to is said, and what no source mentions."""
    if found.notice:
        return found.notice
    said = REFUSAL
    if found.recognised_filters:
        named = describe(found.recognised_filters)
        said = f"The documents with {named}, which the question names, do not hold an answer to it."
    if refusal.reason == "not_in_passages":
        said += f" {NEAR_MISS}"
        if refusal.missing:
            said += f" None of them mentions {', '.join(refusal.missing)}."
    return said


class _Run:
    """The state of one answer: its deadline, its timings, and what is said of it at the end."""

    def __init__(self, request: ChatRequest, plan: Plan, grounding: Grounding) -> None:
        self.request = request
        self.plan = plan
        self.grounding = grounding
        self.watch = Stopwatch()
        self.degraded: list[str] = []
        self.grounded: Grounded = "unchecked"
        self.unsupported: tuple[str, ...] = ()
        self.num_removed_markers = 0
        self.finish_reason: FinishReason = "stop"
        self.first = Delta("")
        self._last = Delta("")
        self._started = asyncio.get_running_loop().time()

    @property
    def query(self) -> str:
        """What is searched for."""
        return self.plan.question

    def degrade(self, reason: str, why: str = "") -> None:
        """Name something that the answer had to do without; `why` is for the log."""
        logger.warning("answer degraded", extra={"reason": reason} | ({"why": why} if why else {}))
        self.degraded.append(reason)

    async def within(self, seconds: float, work: Awaitable[T], stage: str) -> T:
        """Await until so many seconds have passed since the request began."""
        try:
            async with asyncio.timeout_at(self._started + seconds):
                return await work
        except TimeoutError:
            raise DeadlineExceeded(
                f"The request's {self.request.timeout_s:g} s were not enough for {stage}. "
                "Give it more with rag.timeout_s, or try again when there is less load."
            ) from None

    @asynccontextmanager
    async def first_delta(
        self, engines: tuple[LLM, LLM], generation: GenerationRequest, patience_s: float, *, is_llm_required: bool
    ) -> AsyncGenerator[AsyncGenerator[Delta, None], None]:
        """Wait for the first engine's first token, or the second's when the first is down or too slow."""
        engine, fallback = engines
        can_quote = bool(generation.passages) and not generation.sampling.json
        patience_end_s = asyncio.get_running_loop().time() - self._started + patience_s
        if not can_quote:
            patience_end_s = self._generation_end_s  # There is nothing else to wait for.
        stream = engine.generate(generation)
        try:
            try:
                self.first = await self._next(stream, min(patience_end_s, self._generation_end_s))
            except (Unavailable, DeadlineExceeded) as error:
                if not can_quote or (is_llm_required and isinstance(error, LLMUnavailable)):
                    raise
                self.degrade("llm_timeout" if isinstance(error, DeadlineExceeded) else error.code, error.message)
                await stream.aclose()
                stream = fallback.generate(generation)
                self.first = await self._next(stream, self.request.timeout_s)
            self.watch.mark("first_token")
            async with aclosing(self._deltas(stream, len(generation.passages))) as deltas:
                yield deltas
        finally:
            await stream.aclose()

    def end(
        self, *, grounded: Grounded, citations: Sequence[Citation] = (), refusal: Refusal | None = None
    ) -> AnswerEnd:
        """Sum the answer up."""
        self.watch.mark("total")
        return AnswerEnd(
            citations=tuple(citations),
            grounded=grounded,
            finish_reason=self.finish_reason,
            prompt_tokens=self._last.prompt_tokens or self.first.prompt_tokens,
            completion_tokens=self._last.completion_tokens,
            num_presented=self.first.num_presented,
            num_removed_markers=self.num_removed_markers,
            unsupported=self.unsupported,
            degraded=tuple(self.degraded),
            timings_ms=self.watch.timings_ms,
            refusal=refusal,
        )

    async def _deltas(self, stream: AsyncGenerator[Delta, None], num_passages: int) -> AsyncGenerator[Delta, None]:
        if self.first.num_dropped_messages:
            self.degrade("history_trimmed")
        if self.first.num_presented < num_passages:
            self.degrade("passages_dropped")
        delta = self.first
        while True:
            self._last = delta
            self.finish_reason = delta.finish_reason or self.finish_reason
            yield delta
            if delta.finish_reason:
                return
            delta = await self._next(stream, self._generation_end_s)

    @property
    def _generation_end_s(self) -> float:
        return (1 - QUOTING_RESERVE) * self.request.timeout_s

    async def _next(self, stream: AsyncGenerator[Delta, None], seconds: float) -> Delta:
        try:
            return await self.within(seconds, anext(stream), "the answer")
        except StopAsyncIteration:
            raise LLMUnavailable("The language model's stream ended before its answer did.") from None
