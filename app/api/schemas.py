"""What goes over the wire: OpenAI's chat completions with one extension object, `rag`, and Cleave's own routes."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeAlias

from fastapi import Query
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_core import PydanticCustomError

from app.domain import Dialect, JSONFormat, Message, Ranking, SamplingParams
from app.errors import InvalidRequest, UnsupportedParameter
from app.json_schema import FORMAT, check_schema

PROFILE = "cleave"
"""The model that answers from the documents; the raw language model is served under its own name."""


def one_error(expected: str) -> WrapValidator:
    """Say what a union takes in one error, in place of one for each of its members."""

    def validate(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError("union", "Input should be {expected}", {"expected": expected}) from None

    return WrapValidator(validate)


# Limits also make pydantic refuse lone surrogates, which no store and no response can hold.
Text: TypeAlias = Annotated[str, Field(max_length=2_000_000)]
Name: TypeAlias = Annotated[str, Field(max_length=1_000)]
StopText: TypeAlias = Annotated[str, Field(min_length=1, max_length=1_000)]
SchemaName: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
TokenId: TypeAlias = Annotated[int, Field(ge=0, lt=2**31)]
Bias: TypeAlias = Annotated[float, Field(ge=-100, le=100)]
CollectionName: TypeAlias = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
InCollection: TypeAlias = Annotated[CollectionName | None, Query(description="default: the configured one")]
Value: TypeAlias = Annotated[Text | int | float | bool, one_error("a text, a finite number or a boolean")]
Wanted: TypeAlias = Annotated[Value | list[Value], one_error("a text, a finite number, a boolean, or a list of them")]

UNSUPPORTED = {
    "tools": "Cleave answers from documents; it calls no tools.",
    "tool_choice": "Cleave answers from documents; it calls no tools.",
    "functions": "Cleave answers from documents; it calls no functions.",
    "function_call": "Cleave answers from documents; it calls no functions.",
    "logprobs": "Log probabilities are not returned.",
    "top_logprobs": "Log probabilities are not returned.",
    "audio": "Only text is produced.",
    "prediction": "Predicted outputs are not used.",
    "web_search_options": "Only the ingested documents are searched.",
}
"""Parameters that would change the answer if they were silently ignored. Others that are unknown are ignored."""


class Wire(BaseModel):
    """A body: no infinities, unknown fields kept for the check above."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)


class TextPart(BaseModel):
    """A part of a message; only text is read."""

    type: Literal["text"]
    text: Text


Content: TypeAlias = Annotated[Text | list[TextPart], one_error("a text, or a list of parts of the type 'text'")]


class WireMessage(Wire):
    """A turn of the conversation; `developer` is a newer name for `system`."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content

    def to_domain(self) -> Message:
        """Join the parts to one text."""
        text = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class StreamOptions(Wire):
    """Options of a stream."""

    include_usage: bool = False


class RAGOptions(BaseModel):
    """How to answer from the documents; unknown keys are errors, since a misspelt filter must not be ignored."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    enabled: bool = True
    filters: dict[Name, Wanted] = Field(default_factory=dict, examples=[{"author": "Marit Oldershaw"}])
    recognise_filters: bool | None = Field(None, description="default: planning.recognise_filters of the service")
    top_k: int | None = Field(None, ge=1, le=50)
    collection: CollectionName | None = None
    timeout_s: float | None = Field(None, gt=0, le=600)
    dialect: Dialect | None = Field(None, description="how sources are told; default: the profile's")


class NamedSchema(Wire):
    """A JSON Schema with a name."""

    name: SchemaName
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")
    strict: bool | None = None

    def to_domain(self) -> JSONFormat:
        """Check the schema, which may take milliseconds. Raises `InvalidRequest`."""
        return JSONFormat(check_schema(self.schema_), self.name, self.strict)


class ResponseFormat(Wire):
    """What form the answer has."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    def to_domain(self) -> JSONFormat | None:
        """Give the form, None for prose. Raises `InvalidRequest`."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return JSONFormat()
        if self.json_schema is None:
            raise InvalidRequest("The type json_schema needs the schema.", param=f"{FORMAT}.json_schema")
        return self.json_schema.to_domain()


class Sampled(Wire):
    """What both kinds of answers say of their sampling."""

    model: str = Field(PROFILE, max_length=256)
    stream: bool | None = False
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    rag: RAGOptions = RAGOptions()

    def refuse(self, reasons: Mapping[str, str]) -> None:
        """Refuse by name what would otherwise be ignored silently. Raises `UnsupportedParameter`."""
        for name, value in (self.model_extra or {}).items():
            if name in reasons and value not in (None, False, [], {}, "none"):
                raise UnsupportedParameter(f"{reasons[name]} Leave {name!r} out.", param=name)


class ChatCompletionRequest(Sampled):
    """OpenAI's request body, with `rag`."""

    messages: list[WireMessage] = Field(
        min_length=1, max_length=1000, examples=[[{"role": "user", "content": "How long did the outage last?"}]]
    )
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[StopText | list[StopText], one_error("a text that is not empty, or a list of them")] | None = None
    logit_bias: dict[TokenId, Bias] | None = Field(None, max_length=1024)
    n: int | None = None
    modalities: list[str] | None = None
    response_format: ResponseFormat | None = None

    def check_supported(self) -> None:
        """Refuse by name what would otherwise be ignored silently. Raises `UnsupportedParameter`."""
        if self.n not in (None, 1):
            raise UnsupportedParameter("Only one answer is given per request: leave n out or set it to 1.", param="n")
        if self.modalities not in (None, ["text"]):
            raise UnsupportedParameter("Only text is produced: leave modalities out.", param="modalities")
        if isinstance(self.stop, list) and len(self.stop) > 4:
            raise UnsupportedParameter("At most 4 stop sequences are taken.", param="stop")
        self.refuse(UNSUPPORTED)

    def sampling(self, *, max_tokens: int, temperature: float, json: JSONFormat | None = None) -> SamplingParams:
        """Fill what is not said from the service's defaults."""
        return SamplingParams(
            max_tokens=self.max_completion_tokens or self.max_tokens or max_tokens,
            temperature=temperature if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            seed=self.seed,
            stop=() if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            logit_bias=self.logit_bias or {},
            json=json,
        )


class SearchRequest(BaseModel):
    """Retrieval alone, for a query or for the last of the `messages` of a conversation."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    query: Text | None = Field(None, examples=["How long did the outage last?"])
    messages: list[WireMessage] | None = Field(None, min_length=1, max_length=1000)
    top_k: int | None = Field(None, ge=1, le=50)
    filters: dict[Name, Wanted] = Field(default_factory=dict)
    recognise_filters: bool | None = Field(None, description="default: planning.recognise_filters of the service")
    ranking: Ranking = "hybrid"
    collection: CollectionName | None = None
    index: Literal["live", "candidate"] = "live"


class DocumentBody(BaseModel):
    """A document as JSON."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    text: str
    id: str | None = Field(None, min_length=1, max_length=512, description="default: named after the content")
    title: str = Field("", max_length=1000)
    url: str = Field("", max_length=4000)
    metadata: dict[Name, Value] = Field(default_factory=dict, max_length=64)


class DocumentsBody(BaseModel):
    """Several documents as JSON."""

    model_config = ConfigDict(extra="forbid")

    documents: list[DocumentBody] = Field(min_length=1, max_length=1000)
