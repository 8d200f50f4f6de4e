"""Answer events as one OpenAI response, and as the events of its stream."""

import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from typing import Any

from app.api.answers import AnswerRecord, Source
from app.api.dialects import annotations
from app.api.errors import internal_error
from app.api.sse import data_line
from app.api.vector_stores import file_result
from app.chat import AnswerEnd, AnswerEvent, AnswerStart, AnswerText
from app.errors import CleaveError

Event = dict[str, Any]


class ResponseWriter:
    """Writes one response: the search for sources, if there was one, and the message.

    `head` is what the response repeats of its request.
    """

    def __init__(
        self,
        head: Mapping[str, Any],
        *,
        base_url: str,
        collection: str | None = None,
        searches: bool,
        with_results: bool,
    ) -> None:
        created = {"id": f"resp_{uuid.uuid4().hex}", "object": "response", "created_at": int(time.time())}
        self._head = {**created, "error": None, "incomplete_details": None, **head}
        self._record = AnswerRecord(base_url=base_url, collection=collection)
        self._is_json = head["text"]["format"]["type"] != "text"
        self._searches = searches
        self._with_results = with_results
        self._output: list[dict[str, Any]] = []
        self._message_id = f"msg_{uuid.uuid4().hex}"
        self._text = ""
        self._is_refusal = False
        self._num_events = 0

    async def response(self, events: AsyncIterator[AnswerEvent]) -> dict[str, Any]:
        """Collect the events into one response."""
        last: Event = {}
        async for event in events:
            for one in self._events(event):
                last = one
        found: dict[str, Any] = last["response"]
        return found

    async def stream(self, events: AsyncIterator[AnswerEvent]) -> AsyncGenerator[str, None]:
        """Turn the events into server-sent ones. An error becomes `response.failed`, the last of them."""
        try:
            async for event in events:
                for one in self._events(event):
                    yield self._line(one)
        except CleaveError as error:
            yield self._line(self._failed(error))
        except Exception as error:
            yield self._line(self._failed(internal_error(error)))

    def _line(self, event: Event) -> str:
        numbered = {"type": event["type"], "sequence_number": self._num_events, **event}
        self._num_events += 1
        return f"event: {event['type']}\n{data_line(numbered)}"

    def _events(self, event: AnswerEvent) -> Iterator[Event]:
        if isinstance(event, AnswerStart):
            yield from self._start(event)
        elif isinstance(event, AnswerText):
            yield from self._piece(event)
        else:
            yield from self._end(event)

    def _start(self, event: AnswerStart) -> Iterator[Event]:
        begun = self._response("in_progress")
        yield {"type": "response.created", "response": {**begun, "rag": self._record.start(event)}}
        yield {"type": "response.in_progress", "response": begun}
        if self._searches:
            yield from self._search(event.query)
        yield {"type": "response.output_item.added", **self._place, "item": self._message("in_progress", [])}

    def _search(self, query: str) -> Iterator[Event]:
        """Say that was searched, which is over when the first event comes."""
        call: dict[str, Any] = {"id": f"fs_{uuid.uuid4().hex}", "type": "file_search_call", "queries": [query]}
        place = {"output_index": 0, "item_id": call["id"]}
        yield {"type": "response.output_item.added", "output_index": 0, "item": {**call, "status": "in_progress"}}
        for state in ("in_progress", "searching", "completed"):
            yield {"type": f"response.file_search_call.{state}", **place}
        call["results"] = [_result(one) for one in self._record.sources] if self._with_results else None
        self._output.append({**call, "status": "completed"})
        yield {"type": "response.output_item.done", "output_index": 0, "item": self._output[-1]}

    def _piece(self, event: AnswerText) -> Iterator[Event]:
        if not self._text:
            self._is_refusal = self._is_json and event.is_refusal
            yield {"type": "response.content_part.added", **self._part_place, "part": self._part("")}
        self._text += event.text
        if self._is_refusal:
            yield {"type": "response.refusal.delta", **self._part_place, "delta": event.text}
        else:
            yield {"type": "response.output_text.delta", **self._part_place, "delta": event.text, "logprobs": []}

    def _end(self, event: AnswerEnd) -> Iterator[Event]:
        rag = self._record.end(event)
        content = []
        if self._text:
            content = [self._part(self._text)]
            yield from self._part_end(content[0])
        is_whole = event.finish_reason == "stop"
        status = "completed" if is_whole else "incomplete"
        place = self._place
        self._output.append(self._message(status, content))
        yield {"type": "response.output_item.done", **place, "item": self._output[-1]}
        details = {} if is_whole else {"incomplete_details": {"reason": "max_output_tokens"}}
        completed = {**self._response(status), **details, "usage": _usage(event), "rag": rag}
        yield {"type": f"response.{status}", "response": completed}

    def _part_end(self, part: dict[str, Any]) -> Iterator[Event]:
        place = self._part_place
        if self._is_refusal:
            yield {"type": "response.refusal.done", **place, "refusal": self._text}
        else:
            for index, annotation in enumerate(part["annotations"]):
                added = {"annotation_index": index, "annotation": annotation}
                yield {"type": "response.output_text.annotation.added", **place, **added}
            yield {"type": "response.output_text.done", **place, "text": self._text, "logprobs": []}
        yield {"type": "response.content_part.done", **place, "part": part}

    def _failed(self, error: CleaveError) -> Event:
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        failure = {"code": code, "message": error.message, "type": error.code, "param": error.param}
        return {"type": "response.failed", "response": {**self._response("failed"), "error": failure}}

    def _response(self, status: str) -> dict[str, Any]:
        return {**self._head, "status": status, "output": list(self._output), "usage": None}

    def _message(self, status: str, content: list[dict[str, Any]]) -> dict[str, Any]:
        message = {"id": self._message_id, "type": "message", "role": "assistant"}
        return {**message, "status": status, "content": content}

    def _part(self, text: str) -> dict[str, Any]:
        if self._is_refusal:
            return {"type": "refusal", "refusal": text}
        found = annotations(self._record.sources, self._record.citations)
        cited = [{"type": "url_citation", **one} for one in found]
        return {"type": "output_text", "text": text, "annotations": cited, "logprobs": []}

    @property
    def _place(self) -> dict[str, Any]:
        return {"output_index": len(self._output)}

    @property
    def _part_place(self) -> dict[str, Any]:
        return {"item_id": self._message_id, **self._place, "content_index": 0}


def _result(source: Source) -> dict[str, Any]:
    return {**file_result(source.passage), "text": source.passage.text}


def _usage(event: AnswerEnd) -> dict[str, Any]:
    return {
        "input_tokens": event.prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": event.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": event.prompt_tokens + event.completion_tokens,
    }
