"""Answer events as OpenAI chunks, as one completion, and as server-sent events."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from app.api.answers import AnswerRecord
from app.api.dialects import annotations, footer, source_events
from app.api.errors import error_body, internal_error
from app.chat import AnswerEnd, AnswerEvent, AnswerStart, AnswerText
from app.domain import Dialect
from app.errors import CleaveError

STREAM_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
EVENT_STREAM: dict[str, Any] = {"text/event-stream": {"schema": {"type": "string"}}}
"""How the description of the API shows a stream."""
HEARTBEAT_S = 10.0
"""A comment goes out after this much silence, before proxies take the connection for dead."""


class CompletionWriter:
    """Writes one answer in OpenAI's shapes; ids, time and model are the same in all of its chunks."""

    def __init__(
        self,
        *,
        model: str,
        base_url: str,
        collection: str | None = None,
        include_usage: bool = False,
        dialect: Dialect = "annotations",
        is_json: bool = False,
    ) -> None:
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._record = AnswerRecord(base_url=base_url, collection=collection)
        self._include_usage = include_usage
        self._dialect = dialect
        self._is_json = is_json

    async def completion(self, events: AsyncIterator[AnswerEvent]) -> dict[str, Any]:
        """Collect the events into one `chat.completion`."""
        said = {"content": "", "refusal": ""}
        async for event in events:
            if isinstance(event, AnswerStart):
                self._record.start(event)
            elif isinstance(event, AnswerText):
                said[self._place(event)] += event.text
            else:
                rag = self._record.end(event)
                message = {
                    "role": "assistant",
                    "content": None if said["refusal"] else said["content"] + self._footer(),
                    "annotations": self._annotations(),
                    "refusal": said["refusal"] or None,
                }
                choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": event.finish_reason}
                return {
                    **self._head,
                    "object": "chat.completion",
                    "choices": [choice],
                    "usage": _usage(event),
                    "rag": rag,
                }
        raise RuntimeError("the answer ended without its last event")

    async def stream(self, events: AsyncIterator[AnswerEvent]) -> AsyncGenerator[str, None]:
        """Turn the events into `data:` lines. An error becomes one error chunk and the end, never a fake stop."""
        try:
            async for event in events:
                for chunk in self._chunks(event):
                    yield data_line(chunk)
        except CleaveError as error:
            yield data_line(error_body(error))
            return
        except Exception as error:
            yield data_line(error_body(internal_error(error)))
            return
        yield "data: [DONE]\n\n"

    def _chunks(self, event: AnswerEvent) -> list[dict[str, Any]]:
        if isinstance(event, AnswerStart):
            return [self._chunk({"role": "assistant", "content": ""}, rag=self._record.start(event))]
        if isinstance(event, AnswerText):
            return [self._chunk({self._place(event): event.text})]
        self._record.end(event)
        chunks = [self._chunk({"content": footer})] if (footer := self._footer()) else []
        summary: dict[str, Any] = {"annotations": self._annotations()}
        if self._dialect == "openwebui":
            # Its reader makes a source of each annotation too.
            found = source_events(self._record.sources, self._record.citations)
            chunks += [{"event": one} for one in found]
            summary = {}
        chunks += [self._chunk(summary, rag=self._record.summary), self._chunk({}, finish_reason=event.finish_reason)]
        if self._include_usage:
            chunks.append({**self._head, "object": "chat.completion.chunk", "choices": [], "usage": _usage(event)})
        return chunks

    def _chunk(self, delta: dict[str, Any], *, finish_reason: str | None = None, **extension: Any) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        usage = {"usage": None} if self._include_usage else {}
        return {**self._head, "object": "chat.completion.chunk", "choices": [choice], **usage, **extension}

    def _place(self, event: AnswerText) -> str:
        """Where JSON is expected, a refusal in words has a field of its own."""
        return "refusal" if self._is_json and event.is_refusal else "content"

    def _footer(self) -> str:
        return footer(self._record.sources, self._record.citations) if self._dialect == "markdown" else ""

    def _annotations(self) -> list[dict[str, Any]]:
        found = annotations(self._record.sources, self._record.citations)
        return [{"type": "url_citation", "url_citation": one} for one in found]


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


def data_line(body: Mapping[str, Any]) -> str:
    """Write one server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _usage(event: AnswerEnd) -> dict[str, int]:
    return {
        "prompt_tokens": event.prompt_tokens,
        "completion_tokens": event.completion_tokens,
        "total_tokens": event.prompt_tokens + event.completion_tokens,
    }
