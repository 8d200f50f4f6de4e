"""Routes: OpenAI's responses. Nothing is stored: a conversation is sent whole each time."""

import asyncio
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import Field

from app.api.bodies import ResponseBody
from app.api.filters import AttributeFilter, to_filters
from app.api.json_bodies import JSONRoute
from app.api.models import find_profile
from app.api.questions import begun, question
from app.api.response_writer import ResponseWriter
from app.api.schemas import (
    PROFILE,
    CollectionName,
    NamedSchema,
    RAGOptions,
    Sampled,
    SchemaName,
    Text,
    Wire,
    one_error,
)
from app.api.sse import EVENT_STREAM, STREAM_HEADERS, with_heartbeats
from app.api.vector_stores import RankingOptions
from app.domain import JSONFormat, Message, SamplingParams
from app.errors import InvalidRequest, NotFound, UnsupportedParameter
from app.json_schema import FORMAT, SCHEMA
from app.services import Services
from app.settings import AnswerSettings

UNSUPPORTED = {
    "previous_response_id": "Responses are not stored: send the whole conversation as input.",
    "conversation": "Conversations are not stored: send the whole one as input.",
    "prompt": "There are no stored prompts: send instructions.",
    "background": "Responses are made while the client waits.",
    "top_logprobs": "Log probabilities are not returned.",
    "moderation": "Nothing is moderated.",
}
"""Parameters that would change the answer if they were silently ignored. Others that are unknown are ignored."""
RESULTS = "file_search_call.results"
LOGPROBS = "message.output_text.logprobs"
NAMES = {FORMAT: "text.format", f"{FORMAT}.json_schema": "text.format", SCHEMA: "text.format.schema"}
"""What errors are about, as responses name it."""
WITHOUT_TEXT = frozenset({"file_search_call", "reasoning"})
"""Items of earlier responses that a client sends back with the others."""
ANSWER: dict[int | str, dict[str, Any]] = {
    200: {
        "model": ResponseBody,
        "description": "A response; with `stream` its events, of which the last has it whole, or its error.",
        "content": EVENT_STREAM,
    }
}


class InputPart(Wire):
    """A part of an item; only text is read."""

    type: Literal["input_text", "output_text", "text", "refusal"]
    text: Text = ""
    refusal: Text = ""


class InputItem(Wire):
    """A message, or what an earlier response held beside its message."""

    type: str = Field("message", max_length=64)
    role: Literal["system", "developer", "user", "assistant"] | None = None
    content: Annotated[Text | list[InputPart], one_error("a text, or a list of parts with text")] | None = None

    def to_domain(self, place: int) -> Message | None:
        """Join the parts to one text; None for what holds none."""
        if self.type in WITHOUT_TEXT:
            return None
        if self.type != "message":
            raise UnsupportedParameter(f"Items of the type {self.type!r} are not read.", param=f"input.{place}.type")
        if self.role is None or self.content is None:
            raise InvalidRequest("A message needs a role and content.", param=f"input.{place}")
        parts = self.content if isinstance(self.content, list) else [InputPart(type="text", text=self.content)]
        text = "\n".join(part.text or part.refusal for part in parts)
        return Message("system" if self.role == "developer" else self.role, text)


class Tool(Wire):
    """OpenAI's `file_search`, which a profile does anyway: here it says where and how."""

    type: str = Field(max_length=64)
    vector_store_ids: list[CollectionName] | None = Field(None, description="one collection")
    filters: AttributeFilter | None = None
    max_num_results: int | None = Field(None, ge=1, le=50)
    ranking_options: RankingOptions = RankingOptions()

    def check_supported(self, param: str) -> None:
        """Refuse any other tool by name. Raises `UnsupportedParameter`."""
        if self.type != "file_search":
            message = f"The only tool is file_search: leave {self.type!r} out."
            raise UnsupportedParameter(message, param=f"{param}.type")
        if len(self.vector_store_ids or ()) != 1:
            message = "One vector store is searched at a time: name one collection."
            raise UnsupportedParameter(message, param=f"{param}.vector_store_ids")
        self.ranking_options.check_supported(f"{param}.ranking_options")


class TextFormat(Wire):
    """What form the answer has."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: SchemaName | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    def to_domain(self) -> JSONFormat | None:
        """Give the form, None for prose. Raises `InvalidRequest`."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return JSONFormat()
        if self.name is None or self.schema_ is None:
            raise InvalidRequest("The type json_schema needs a name and a schema.", param="text.format")
        return NamedSchema(name=self.name, schema=self.schema_, strict=self.strict).to_domain()


class TextOptions(Wire):
    """Options of the text."""

    format: TextFormat = TextFormat()


class ResponsesRequest(Sampled):
    """OpenAI's request body, with `rag`."""

    input: Annotated[Text | list[InputItem], one_error("a text, or a list of messages")] = Field(
        examples=["How long did the outage last?"]
    )
    instructions: Text | None = None
    max_output_tokens: int | None = Field(None, ge=1, le=1_000_000)
    text: TextOptions = TextOptions()
    include: list[str] | None = Field(None, max_length=16)
    tools: list[Tool] | None = Field(None, max_length=16)
    tool_choice: str | dict[str, Any] | None = None
    metadata: dict[str, str] | None = Field(None, max_length=16)

    def check_supported(self) -> None:
        """Refuse by name what would otherwise be ignored silently. Raises `UnsupportedParameter`."""
        self.refuse(UNSUPPORTED)
        if self.rag.dialect not in (None, "annotations"):
            raise UnsupportedParameter("Responses tell their sources by annotations alone.", param="rag.dialect")
        if LOGPROBS in (self.include or ()):
            raise UnsupportedParameter("Log probabilities are not returned.", param="include")
        if self.tool_choice not in (None, "auto", "none", "required", {"type": "file_search"}):
            raise UnsupportedParameter("The only tool is file_search.", param="tool_choice")

    def options(self) -> RAGOptions:
        """Give what `rag` says, and of the rest what the tool says. Raises `UnsupportedParameter`."""
        if not self.tools:
            return self.rag
        for place, tool in enumerate(self.tools):
            tool.check_supported(f"tools.{place}")
        if len(self.tools) > 1:
            raise UnsupportedParameter("One file_search is done per response.", param="tools")
        [tool] = self.tools
        found = to_filters(tool.filters, param="tools.0.filters") if tool.filters else {}
        rest = {
            "enabled": self.rag.enabled and self.tool_choice != "none",
            "collection": self.rag.collection or next(iter(tool.vector_store_ids or ()), None),
            "filters": {**found, **self.rag.filters},
            "top_k": self.rag.top_k or tool.max_num_results,
        }
        return self.rag.model_copy(update=rest)

    def messages(self) -> list[Message]:
        """Give the conversation, the instructions first."""
        start = [Message("system", self.instructions)] if self.instructions else []
        if isinstance(self.input, str):
            return [*start, Message("user", self.input)]
        found = [item.to_domain(place) for place, item in enumerate(self.input)]
        return [*start, *(message for message in found if message is not None)]

    def sampling(self, settings: AnswerSettings, json: JSONFormat | None) -> SamplingParams:
        """Fill what is not said from the service's defaults."""
        return SamplingParams(
            max_tokens=self.max_output_tokens or settings.max_tokens,
            temperature=settings.temperature if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            json=json,
        )


def responses_router(services: Services) -> APIRouter:
    """Build the routes over the given parts."""
    router = APIRouter(tags=["responses"], route_class=JSONRoute)

    @router.post("/v1/responses", response_model=None, responses=ANSWER)
    async def create_response(body: ResponsesRequest, request: Request) -> JSONResponse | StreamingResponse:
        """Answer the input from the documents, with citations; streamed if asked for. Nothing is stored."""
        body.check_supported()
        options = body.options()
        profile = await find_profile(services, body.model)
        if profile is None and body.tools:
            message = f"The model {body.model!r} searches no documents: name a profile, such as {PROFILE!r}."
            raise UnsupportedParameter(message, param="tools")
        with _renamed():
            json = await asyncio.to_thread(body.text.format.to_domain)
            sampling = body.sampling(services.settings.answer, json)
            asked = question(services, profile, options, body.messages(), sampling)
            writer = ResponseWriter(
                _echoed(body, sampling),
                base_url=str(request.base_url),
                collection=asked.collection,
                searches=asked.use_documents,
                with_results=RESULTS in (body.include or ()),
            )
            events = services.chat.answer(asked)
            if not body.stream:
                async with aclosing(events):
                    return JSONResponse(await writer.response(events))
            lines = with_heartbeats(writer.stream(await begun(events)))
        return StreamingResponse(lines, media_type="text/event-stream", headers=STREAM_HEADERS)

    @router.get("/v1/responses/{response_id}", include_in_schema=False)
    async def read_response(response_id: str) -> None:
        raise NotFound(f"Responses are not stored, so there is no {response_id[:100]!r}.", param="response_id")

    return router


def _echoed(body: ResponsesRequest, sampling: SamplingParams) -> dict[str, Any]:
    """Say in the response what it was made of, as OpenAI does."""
    said = body.model_dump(mode="json", by_alias=True, exclude_none=True, include={"instructions", "text", "metadata"})
    return {
        "model": body.model,
        "instructions": None,
        "metadata": {},
        **said,
        "max_output_tokens": body.max_output_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "tools": [tool.model_dump(mode="json", exclude_none=True) for tool in body.tools or ()],
        "tool_choice": body.tool_choice or "auto",
        "parallel_tool_calls": False,
        "previous_response_id": None,
        "store": False,
        "truncation": "auto",
    }


@contextmanager
def _renamed() -> Iterator[None]:
    try:
        yield
    except InvalidRequest as error:
        if error.param is not None:
            error.param = "input" if error.param.startswith("messages") else NAMES.get(error.param, error.param)
        raise
