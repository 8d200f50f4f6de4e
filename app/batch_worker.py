"""Answers the requests of batches: a part at a time, by the same code and with the same rights as online."""

import asyncio
import math
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from pydantic import ValidationError

from app.access import Caller, caller
from app.api.completions import complete
from app.api.errors import error_body, internal_error, refusal
from app.api.guards import guarded
from app.api.schemas import ChatCompletionRequest
from app.batch_lines import BatchRequest, Line, parse_request, result
from app.batch_queue import LocalQueue
from app.batches import Batch, Part
from app.domain import Delta, GenerationRequest, ModelInfo
from app.durable import finish_in_thread
from app.errors import (
    CleaveError,
    DeadlineExceeded,
    LLMUnavailable,
    Overloaded,
    RateLimited,
    Unavailable,
    UnsupportedParameter,
)
from app.keys import KeyFile
from app.llm import LLM
from app.rates import Rates
from app.services import Answering, Services
from app.settings import Settings
from app.telemetry import logger, request_id
from app.webhooks import Webhooks

MAX_PARTS_AT_ONCE = 8
"""Of one batch: so many entries of it are in the queue."""
NUM_LOCAL_WORKERS = 1
WATCH_S = 0.5
"""How soon work stops when a batch is to end."""
SEARCHED_EVERY_S = 5.0
"""How soon work is found that the queue has lost, by whoever has nothing to do."""
SEARCHED_AT_WORK_EVERY_S = 60.0
"""And by whoever has."""
TOLD_EVERY_S = 2.0
"""How soon a webhook is sent."""
MIN_RETRY_S, MAX_RETRY_S = 1.0, 30.0
MAX_LATE_ANSWERS = 3
"""Of one request: then that there was no time is its answer."""
MAX_SPOILT_ANSWERS = 5
"""Of one request, by a model that is there: a content filter, or what breaks the model."""


class BackgroundLLM:
    """An `LLM` whose requests let those go first that somebody waits for."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """See `LLM.generate`."""
        async with aclosing(self._llm.generate(replace(request, is_background=True))) as deltas:
            async for delta in deltas:
                yield delta

    async def info(self) -> ModelInfo:
        """See `LLM.info`."""
        return await self._llm.info()

    async def close(self) -> None:
        """Nothing is held here: who built the model closes it."""


class BatchWorker:
    """Works on batches for as long as it is open. What it works on is on disk: any other goes on with it."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._settings = services.settings
        self._keys = KeyFile(services.settings)
        self._rates = Rates(services.settings.access)
        self._answering = guarded(patient(services), self._rates)
        self._webhooks = Webhooks(services.settings.batch)
        self._num_busy = 0
        self._busy_at = self._searched_at = time.monotonic()
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Look for work that nobody does; and, where the queue is one of this process, take its entries."""
        self._tasks.append(asyncio.create_task(asyncio.to_thread(self._services.files.clean_up)))
        self._tasks += [
            asyncio.create_task(self._repeat(self._search, SEARCHED_EVERY_S), name="batches: search"),
            asyncio.create_task(self._repeat(self._tell, TOLD_EVERY_S), name="batches: webhooks"),
        ]
        queue = self._services.queue
        if isinstance(queue, LocalQueue):
            self._tasks += [asyncio.create_task(self._serve(queue), name="batches") for _ in range(NUM_LOCAL_WORKERS)]

    async def close(self) -> None:
        """Stop working."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def work(self, batch_id: str) -> None:
        """Do what an entry of the queue asks for: prepare the batch, answer its next part, or end it."""
        self._num_busy += 1
        try:
            await self._work(batch_id)
        finally:
            self._num_busy -= 1
            self._busy_at = time.monotonic()

    async def num_parts(self) -> int:
        """Count the parts that are not done, of all batches; one that is not cut into parts yet counts as one."""
        return await asyncio.to_thread(self._services.batches.num_waiting_parts)

    async def _work(self, batch_id: str) -> None:
        batches = self._services.batches
        before = await asyncio.to_thread(batches.read, batch_id)
        batch = await finish_in_thread(batches.prepare, batch_id)
        if before.status == "validating" and batch.status == "in_progress":
            # Others take part.
            await self._announce(batch_id, min(batches.num_parts(batch), MAX_PARTS_AT_ONCE) - 1)
        part = None
        if batch.status == "in_progress" and await asyncio.to_thread(batches.is_wanted, batch):
            part = await asyncio.to_thread(batches.take_part, batch)
        if part is not None:
            with part:
                has_time = await self._answer(batch, part)
            if has_time:
                await self._announce(batch_id, 1)
        elif not batch.is_finished and (await finish_in_thread(batches.finish, batch_id)).is_finished:
            logger.info("batch ended", extra={"batch_id": batch_id})

    async def _announce(self, batch_id: str, times: int) -> None:
        for _ in range(times):
            await self._services.queue.put(batch_id)

    async def _serve(self, queue: LocalQueue) -> None:
        while True:
            batch_id = await queue.get()
            try:
                await self.work(batch_id)
            except CleaveError as error:
                logger.warning("a batch waits", extra={"batch_id": batch_id, "why": error.message})
            except Exception:
                logger.exception("a batch could not be worked on", extra={"batch_id": batch_id})

    async def _repeat(self, function: Callable[[], Awaitable[None]], seconds: float) -> None:
        """Call it again and again, whatever becomes of a call."""
        while True:
            await asyncio.sleep(seconds)
            try:
                await function()
            except Exception:
                logger.exception("a look after batches failed, and is repeated")

    async def _search(self) -> None:
        """Put back what the queue has lost, and what waits for its key's rate.

        While this worker has nothing to do, nothing is in the queue. A busy one looks for what nobody works on: its
        entry may be lost or far behind. An entry too many does no harm.
        """
        now, batches = time.monotonic(), self._services.batches
        is_idle = not self._num_busy and now - self._busy_at >= SEARCHED_EVERY_S
        if not is_idle and now - self._searched_at < SEARCHED_AT_WORK_EVERY_S:
            return
        self._searched_at = now
        for batch_id in await asyncio.to_thread(lambda: list(batches.unfinished())):
            if is_idle or not await asyncio.to_thread(batches.is_worked_on, batch_id):
                await self._services.queue.put(batch_id)

    async def _tell(self) -> None:
        """Tell of batches that have ended: apart, since whoever is told may take his time."""
        await self._webhooks.send_due(self._services.batches)

    # --- One part ----------------------------------------------------------------------------------------------------

    async def _answer(self, batch: Batch, part: Part) -> bool:
        """Answer all that is left of a part, unless the batch is to end before.

        False: the key has used up its rate. Others go on meanwhile; a worker that has nothing to do finds the part.
        """
        lines = iter(await finish_in_thread(part.remaining))
        work = asyncio.create_task(self._answer_lines(batch, part, lines))
        try:
            while not (await asyncio.wait({work}, timeout=WATCH_S))[0]:
                if not await asyncio.to_thread(self._services.batches.is_wanted, batch):
                    return True
            if work.result():
                await finish_in_thread(part.finish)
            return work.result()
        except ExceptionGroup as group:
            raise group.exceptions[0] from None
        finally:
            work.cancel()
            await asyncio.gather(work, return_exceptions=True)

    async def _answer_lines(self, batch: Batch, part: Part, lines: Iterator[Line]) -> bool:
        """Answer lines, some at once. False: the key's rate did not suffice."""
        is_limited = False

        async def answer_some() -> None:
            nonlocal is_limited
            for line in lines:
                try:
                    found = await self._result(batch, line)
                except RateLimited:
                    is_limited = True
                else:
                    await finish_in_thread(part.write, line, found)
                if is_limited:
                    return

        async with asyncio.TaskGroup() as group:
            for _ in range(self._settings.batch.num_concurrent):
                group.create_task(answer_some())
        return not is_limited

    async def _result(self, batch: Batch, line: Line) -> Mapping[str, Any]:
        request = await asyncio.to_thread(parse_request, line.content)
        is_admitted = False

        async def ask() -> dict[str, Any]:
            nonlocal is_admitted
            key = await self._keys.by_id(batch.key_id) if batch.key_id else None
            caller.set(Caller(key, self._settings.store.collection))
            if key is not None and not is_admitted:
                await self._rates.admit(key)
                is_admitted = True  # Asked again, it is the same request.
            return await answer(self._answering, request, base_url=batch.base_url)

        return await persistently(request, ask, self._services.llm)


async def answer(services: Answering, request: BatchRequest, *, base_url: str) -> dict[str, Any]:
    """Answer a request as online; what a client there would have had to make do with is `Unavailable` here."""
    body = await complete(services, read_body(request), base_url=base_url)
    for missed in body["rag"]["degraded"]:
        if missed == Overloaded.code:
            raise Overloaded("The language model has too much to do.")
        if missed.startswith("llm_"):
            raise LLMUnavailable(f"The language model was lost in the middle of an answer ({missed}).")
    return body


async def persistently(
    request: BatchRequest, ask: Callable[[], Awaitable[dict[str, Any]]], llm: LLM, *, patience_s: float = math.inf
) -> Mapping[str, Any]:
    """Ask until there is an answer or an error that stays: what passes by itself is waited for.

    Raises `RateLimited`; and `Unavailable` when it has not passed after `patience_s`.
    """
    request_id.set(str(uuid.uuid4()))
    began, retry_s, num_late, num_spoilt = time.monotonic(), MIN_RETRY_S, 0, 0
    while True:
        try:
            return result(request.custom_id, status=200, body=await ask(), request_id=request_id.get())
        except RateLimited:
            raise
        except (Unavailable, DeadlineExceeded) as error:
            num_late += isinstance(error, DeadlineExceeded)
            # Where all others are answered, it is the request.
            num_spoilt += isinstance(error, LLMUnavailable) and await _is_up(llm)
            if num_late == MAX_LATE_ANSWERS or num_spoilt == MAX_SPOILT_ANSWERS:
                return _refused(request, error)
            if isinstance(error, Unavailable) and time.monotonic() - began > patience_s:
                raise
            logger.warning("a request of a batch waits", extra={"why": error.message})
            await asyncio.sleep(min(max(error.retry_after_s or 0, retry_s), MAX_RETRY_S))
            retry_s *= 2
        except CleaveError as error:
            return _refused(request, error)
        except Exception as error:
            return _refused(request, internal_error(error))


async def _is_up(llm: LLM) -> bool:
    try:
        await llm.info()
    except Unavailable:
        return False
    return True


def read_body(request: BatchRequest) -> ChatCompletionRequest:
    """Read the body of a request. Raises `InvalidRequest`."""
    try:
        body = ChatCompletionRequest.model_validate(request.body)
    except ValidationError as error:
        first = error.errors()[0]
        raise refusal(dict(first), first["loc"]) from None
    if body.stream:
        raise UnsupportedParameter("A batch answers in one piece: leave stream out.", param="stream")
    # Nobody waits: what time there is is the service's to say.
    return body.model_copy(update={"rag": body.rag.model_copy(update={"timeout_s": None})})


def patient(services: Services) -> Services:
    """Answer as the service does, behind those that somebody waits for, by `patient_settings`."""
    settings = patient_settings(services.settings)
    llm = BackgroundLLM(services.llm)
    chat = services.chat.over(
        services.retriever, llm, settings=settings.answer, rewrite_timeout_s=settings.planning.rewrite_timeout_s
    )
    return replace(services, settings=settings, llm=llm, chat=chat)


def patient_settings(settings: Settings) -> Settings:
    """Have answers take more time, and wait for the language model in place of quoting."""
    answer = settings.answer.model_copy(
        update={
            "timeout_s": settings.batch.timeout_s,
            "first_token_timeout_s": settings.batch.timeout_s,
            "without_llm": "error",
        }
    )
    planning = settings.planning.model_copy(update={"rewrite_timeout_s": settings.batch.timeout_s})
    return settings.model_copy(update={"answer": answer, "planning": planning})


def _refused(request: BatchRequest, error: CleaveError) -> Mapping[str, Any]:
    return result(request.custom_id, status=error.status, body=error_body(error), request_id=request_id.get())
