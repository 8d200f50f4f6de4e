"""Answer events as OpenAI chunks, as one completion, and as server-sent events."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any
from urllib.parse import quote

from app.api.errors import error_body, internal_error
from app.chat import AnswerEnd, AnswerEvent, AnswerStart, AnswerText
from app.domain import Passage, Refusal
from app.errors import CleaveError
from app.telemetry import request_id

HEARTBEAT_S = 10.0
"""A comment goes out after this much silence, before proxies take the connection for dead."""


class CompletionWriter:
    """Writes one answer in OpenAI's shapes; ids, time and model are the same in all of its chunks."""

    def __init__(
        self, *, model: str, base_url: str, collection: str | None = None, include_usage: bool = False
    ) -> None:
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._base_url = base_url.rstrip("/")
        self._collection = collection
        self._include_usage = include_usage
        self._sources: Sequence[Passage] = ()
        self._rag: dict[str, Any] = {}

    async def completion(self, events: AsyncIterator[AnswerEvent]) -> dict[str, Any]:
        """Collect the events into one `chat.completion`."""
        text = ""
        async for event in events:
            if isinstance(event, AnswerStart):
                self._start(event)
            elif isinstance(event, AnswerText):
                text += event.text
            else:
                message = {
                    "role": "assistant",
                    "content": text,
                    "annotations": self._annotations(event),
                    "refusal": None,
                }
                choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": event.finish_reason}
                return {
                    **self._head,
                    "object": "chat.completion",
                    "choices": [choice],
                    "usage": _usage(event),
                    "rag": self._end(event),
                }
        raise RuntimeError("the answer ended without its last event")

    async def stream(self, events: AsyncIterator[AnswerEvent]) -> AsyncGenerator[str, None]:
        """Turn the events into `data:` lines. An error becomes one error chunk and the end, never a fake stop."""
        try:
            async for event in events:
                for chunk in self._chunks(event):
                    yield _data(chunk)
        except CleaveError as error:
            yield _data(error_body(error))
            return
        except Exception as error:
            yield _data(error_body(internal_error(error)))
            return
        yield "data: [DONE]\n\n"

    def _chunks(self, event: AnswerEvent) -> list[dict[str, Any]]:
        if isinstance(event, AnswerStart):
            return [self._chunk({"role": "assistant", "content": ""}, rag=self._start(event))]
        if isinstance(event, AnswerText):
            return [self._chunk({"content": event.text})]
        rag = self._end(event)
        summary = {key: rag[key] for key in rag if key != "sources"}
        chunks = [
            self._chunk({"annotations": self._annotations(event)}, rag=summary),
            self._chunk({}, finish_reason=event.finish_reason),
        ]
        if self._include_usage:
            chunks.append({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": _usage(event)})
        return chunks

    def _chunk(self, delta: dict[str, Any], *, finish_reason: str | None = None, **extension: Any) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        usage = {"usage": None} if self._include_usage else {}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], **usage, **extension}

    def _start(self, event: AnswerStart) -> dict[str, Any]:
        self._sources = event.sources
        self._rag = {
            "request_id": request_id.get(),
            "sources": [{"n": n, **source(one)} for n, one in enumerate(event.sources, start=1)],
            "rewritten_query": event.query,
            "recognised_filters": dict(event.recognised_filters),
            "notice": event.notice,
            "degraded": list(event.degraded),
        }
        return self._rag

    def _end(self, event: AnswerEnd) -> dict[str, Any]:
        return {
            **self._rag,
            "presented": list(range(1, event.num_presented + 1)),
            "cited": sorted({citation.n for citation in event.citations}),
            "grounded": event.grounded,
            "refusal": _refusal(event.refusal),
            "unsupported": list(event.unsupported),
            "removed_markers": event.num_removed_markers,
            "degraded": list(event.degraded),
            "timings_ms": dict(event.timings_ms),
        }

    def _annotations(self, event: AnswerEnd) -> list[dict[str, Any]]:
        return [
            {
                "type": "url_citation",
                "url_citation": {
                    "url": self._url(self._sources[citation.n - 1]),
                    "title": self._sources[citation.n - 1].title,
                    "start_index": citation.start,
                    "end_index": citation.end,
                },
            }
            for citation in event.citations
        ]

    def _url(self, passage: Passage) -> str:
        """Every passage has an address that resolves: its own, or that of its document here."""
        if passage.url.startswith(("http://", "https://")):
            return passage.url
        chunk = passage.chunk_id.rpartition("#")[2]
        return f"{self._base_url}{document_path(passage.document_id, self._collection)}#{chunk}"


def document_path(document_id: str, collection: str | None = None) -> str:
    """Give the path of a document in this API, which leads to it whatever its id is."""
    # A browser would take the segments "." and ".." for steps, so that there the slash must not look like one.
    has_steps = not {".", ".."}.isdisjoint(document_id.split("/"))
    query = "" if collection is None else f"?collection={collection}"
    return f"/v1/documents/{quote(document_id, safe='' if has_steps else '/')}{query}"


def source(passage: Passage) -> dict[str, Any]:
    """Show a passage as clients see it."""
    return {
        "document_id": passage.document_id,
        "chunk_id": passage.chunk_id,
        "title": passage.title,
        "url": passage.url,
        "metadata": dict(passage.metadata),
        "text": passage.text,
        "score": round(passage.score, 6),
        "also_in": list(passage.also_in),
    }


async def with_heartbeats(lines: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    """Pass lines on, with a comment in between where they pause for long."""
    async with aclosing(lines):
        pending = asyncio.ensure_future(anext(lines))
        try:
            while True:
                if not (await asyncio.wait({pending}, timeout=HEARTBEAT_S))[0]:
                    yield ": ping\n\n"
                    continue
                try:
                    line = pending.result()
                except StopAsyncIteration:
                    return
                yield line
                pending = asyncio.ensure_future(anext(lines))
        finally:
            pending.cancel()
            await asyncio.gather(pending, return_exceptions=True)


def _refusal(refusal: Refusal | None) -> dict[str, Any] | None:
    if refusal is None:
        return None
    return {"reason": refusal.reason, "score": round(refusal.score, 4), "missing": list(refusal.missing)}


def _data(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _usage(event: AnswerEnd) -> dict[str, int]:
    return {
        "prompt_tokens": event.prompt_tokens,
        "completion_tokens": event.completion_tokens,
        "total_tokens": event.prompt_tokens + event.completion_tokens,
    }
