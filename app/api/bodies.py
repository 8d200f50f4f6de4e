"""What answers hold, for the description of the API: nothing is checked against it at run time.

Where an answer shows an object of the domain, that object is its description too.
"""

from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from app.batches import Status as BatchStatus
from app.domain import (
    Chunk,
    CollectionInfo,
    DeletionReceipt,
    FinishReason,
    Grounded,
    IngestReceipt,
    Refusal,
    ReindexStatus,
    Scalar,
    StoredDocument,
)
from app.files import Purpose
from app.ingestion_jobs import Status
from app.settings import APISettings

T = TypeVar("T")
WITH_DEFAULTS = ConfigDict(json_schema_serialization_defaults_required=True)
"""Of dataclasses that have them: an answer says them all."""
SOMETIMES: Any = Field(default_factory=lambda: None)
"""Of fields that an answer may be without."""


class Body(BaseModel):
    """An object of an answer."""

    model_config = ConfigDict(use_attribute_docstrings=True)


class Listed(Body, Generic[T]):
    """A list of all there is."""

    object: Literal["list"]
    data: list[T]


class Page(Listed[T], Generic[T]):
    """A part of a list."""

    has_more: bool


class Pages(Page[T], Generic[T]):
    """A part of a list that names its ends, unless it is empty."""

    first_id: str = SOMETIMES
    last_id: str = SOMETIMES


# --- Errors and health -----------------------------------------------------------------------------------------------


class ErrorDetails(Body):
    """What is wrong, in one line, and what to do about it."""

    message: str
    type: str
    param: str | None
    """Which field of the request it is about."""
    code: str
    """What programs tell errors apart by."""


class Error(Body):
    """OpenAI's error object."""

    error: ErrorDetails


class Live(Body):
    """The process answers."""

    status: Literal["ok"]


class Part(Body):
    """Whether a part of the service answers."""

    status: Literal["ok", "cold", "unavailable"]
    error: str = SOMETIMES
    code: str = SOMETIMES


class RetrieverPart(Part):
    """The retriever. With keys, what it holds is not told."""

    embedding_model: str = SOMETIMES
    collection: str = SOMETIMES
    num_documents: int = SOMETIMES
    num_chunks: int = SOMETIMES
    filter_fields: list[str] = SOMETIMES


class LLMPart(Part):
    """The language model."""

    id: str = SOMETIMES
    engine: str = SOMETIMES
    context_window: int = SOMETIMES
    num_running: int = SOMETIMES
    max_num_seqs: int = SOMETIMES
    kv_cache_usage: float = SOMETIMES


class Parts(Body):
    """The two parts of the service."""

    retriever: RetrieverPart
    llm: LLMPart


class Ready(Body):
    """Whether questions can be answered; `parts` and `limits` with `verbose`, and when they cannot."""

    status: Literal["ready", "degraded", "not_ready"]
    parts: Parts = SOMETIMES
    limits: APISettings = SOMETIMES


# --- Answers ---------------------------------------------------------------------------------------------------------


class FoundPassage(Body):
    """A passage that was found; `n` is what markers in the text name it by."""

    n: int
    document_id: str
    chunk_id: str
    title: str
    url: str
    metadata: dict[str, Scalar]
    text: str
    score: float
    """Only its order within one result means something."""
    also_in: list[str]
    """Other documents that hold nearly the same text."""


class RAG(Body):
    """How the answer came about."""

    request_id: str
    sources: list[FoundPassage]
    rewritten_query: str
    recognised_filters: dict[str, Scalar | list[Scalar]]
    notice: str | None
    degraded: list[str]
    presented: list[int]
    """The sources that the model was shown."""
    cited: list[int]
    grounded: Grounded
    refusal: Refusal | None
    unsupported: list[str]
    removed_markers: int
    timings_ms: dict[str, float]


class Place(Body):
    """A marker's place in the text, and where it leads."""

    url: str
    title: str
    start_index: int
    end_index: int


class Annotation(Body):
    """OpenAI's annotation of a chat completion."""

    type: Literal["url_citation"]
    url_citation: Place


class AnswerMessage(Body):
    """The answer. Where JSON was asked for, a refusal has a field of its own."""

    role: Literal["assistant"]
    content: str | None
    refusal: str | None
    annotations: list[Annotation]


class Choice(Body):
    """The only choice."""

    index: Literal[0]
    message: AnswerMessage
    logprobs: None
    finish_reason: FinishReason


class Usage(Body):
    """Tokens of the request and of the answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatCompletion(Body):
    """OpenAI's chat completion, with `rag`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    rag: RAG


class URLCitation(Place):
    """OpenAI's annotation of a response."""

    type: Literal["url_citation"]


class OutputText(Body):
    """The answer."""

    type: Literal["output_text"]
    text: str
    annotations: list[URLCitation]
    logprobs: list[Any]


class OutputRefusal(Body):
    """A refusal where JSON was asked for."""

    type: Literal["refusal"]
    refusal: str


class OutputMessage(Body):
    """The message of a response."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["completed", "incomplete"]
    content: list[OutputText | OutputRefusal]


class FileResult(Body):
    """A passage as OpenAI shows what was found in a file."""

    file_id: str
    filename: str
    score: float
    attributes: dict[str, Scalar]


class CallResult(FileResult):
    """A passage that was searched for an answer."""

    text: str


class FileSearchCall(Body):
    """The search for sources; `results` if they were asked for."""

    id: str
    type: Literal["file_search_call"]
    queries: list[str]
    status: Literal["completed"]
    results: list[CallResult] | None


class InputTokens(Body):
    """Of a response's input tokens."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokens(Body):
    """Of a response's output tokens."""

    reasoning_tokens: int


class ResponseUsage(Body):
    """Tokens of the request and of the answer."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    output_tokens_details: OutputTokens
    total_tokens: int


class Incomplete(Body):
    """Why the answer ends early."""

    reason: Literal["max_output_tokens"]


class ResponseBody(Body):
    """OpenAI's response, with `rag`."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    error: None
    incomplete_details: Incomplete | None
    model: str
    instructions: str | None
    metadata: dict[str, str]
    text: dict[str, Any]
    max_output_tokens: int | None
    temperature: float
    top_p: float
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    previous_response_id: None
    store: bool
    truncation: Literal["auto"]
    output: list[FileSearchCall | OutputMessage]
    usage: ResponseUsage
    rag: RAG


class ModelBody(Body):
    """A model that requests may name."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    description: str


# --- Search ----------------------------------------------------------------------------------------------------------


class Found(Listed[FoundPassage]):
    """What a search found, best first."""

    recognised_filters: dict[str, Scalar | list[Scalar]]
    notice: str | None
    """Why the filters match nothing."""
    timings_ms: dict[str, float]
    degraded: list[str]


class FileCounts(Body):
    """Documents, as OpenAI counts files."""

    in_progress: int
    completed: int
    failed: int
    cancelled: int
    total: int


class VectorStore(Body):
    """A collection as OpenAI's vector store."""

    id: str
    object: Literal["vector_store"]
    name: str
    status: Literal["completed"]
    file_counts: FileCounts
    metadata: dict[str, str]
    created_at: int
    usage_bytes: int


class TextContent(Body):
    """The text of a passage."""

    type: Literal["text"]
    text: str


class SearchedFile(FileResult):
    """A passage that was found."""

    content: list[TextContent]


class VectorStoreResults(Body):
    """OpenAI's page of search results, the only one."""

    object: Literal["vector_store.search_results.page"]
    search_query: list[str]
    data: list[SearchedFile]
    has_more: bool
    next_page: None


# --- Documents -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedDocument(StoredDocument):
    """A document without its text. Times are seconds since the epoch."""

    object: Literal["document"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DocumentChunk(Chunk):
    """A run of a document's text, from the character `start` to `end`."""

    id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class WholeDocument(ListedDocument):
    """A document with its text and its chunks."""

    text: str
    chunks: list[DocumentChunk]


@dataclass(frozen=True, slots=True, kw_only=True)
class SingleChunk(DocumentChunk):
    """One chunk, and whose it is."""

    object: Literal["chunk"]
    document_id: str
    title: str
    url: str


class Documents(Page[ListedDocument]):
    """Documents in a stable order."""

    total: int
    """That match, on all pages."""


class DeletedDocument(Body):
    """A document is gone; the receipt says how that was verified."""

    id: str
    object: Literal["document.deleted"]
    deleted: Literal[True]
    receipt: DeletionReceipt


@dataclass(frozen=True, slots=True, kw_only=True)
class FileReceipt(IngestReceipt):
    """What became of one document, and the file it came in, or the id it was sent under."""

    __pydantic_config__ = WITH_DEFAULTS

    file: str


class FacetValue(Body):
    """A value with the number of documents that have it."""

    value: Scalar
    count: int


class FacetBody(Body):
    """A metadata field with its most frequent values."""

    object: Literal["facet"]
    field: str
    values: list[FacetValue]
    num_values: int


class Progress(Body):
    """How far an ingestion is; `num_documents` is null until they are counted."""

    num_documents: int | None
    num_documents_done: int
    num_files: int
    num_files_done: int
    num_chunks: int
    num_failed: int


class IngestionBody(Body):
    """An ingestion. Times are seconds since the epoch."""

    object: Literal["ingestion"]
    id: str
    status: Status
    collection: str | None
    created_at: float
    started_at: float | None
    finished_at: float | None
    progress: Progress
    notice: str | None
    """What it waits for."""
    error: str | None
    """Why it failed as a whole."""


class IngestionResults(IngestionBody):
    """An ingestion with a page of its results."""

    results: list[FileReceipt]
    next: int
    """What `after` is for the next page."""


# --- Collections -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Collection(CollectionInfo):
    """One collection of the service; `embedding_model` is the one that wrote it."""

    object: Literal["collection"]


class DeletedCollection(Body):
    """A collection is gone."""

    object: Literal["collection.deleted"]
    name: str
    deleted: Literal[True]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reindexing(ReindexStatus):
    """How far the rebuilding of a collection's index is."""

    __pydantic_config__ = WITH_DEFAULTS

    object: Literal["reindex"]


# --- Batches ---------------------------------------------------------------------------------------------------------


class FileBody(Body):
    """A file of requests, or of what they were answered with."""

    id: str
    object: Literal["file"]
    bytes: int
    created_at: int
    """In seconds since the epoch."""
    expires_at: int | None
    filename: str
    purpose: Purpose
    status: Literal["processed"]
    status_details: str | None


class DeletedFile(Body):
    """A file is gone."""

    id: str
    object: Literal["file"]
    deleted: Literal[True]


class BatchError(Body):
    """Why a batch failed before it began."""

    code: str
    message: str
    param: str | None
    line: int | None
    """Of the input file, from 1."""


class RequestCounts(Body):
    """How many requests a batch has, and how many of them are answered."""

    total: int
    completed: int
    failed: int


class BatchBody(Body):
    """A batch and how far it is. Times are seconds since the epoch."""

    id: str
    object: Literal["batch"]
    endpoint: str
    errors: Listed[BatchError] | None
    """Lines of the input file that are no requests: then none is answered."""
    input_file_id: str
    completion_window: str
    status: BatchStatus
    output_file_id: str | None
    """Of the requests that succeeded."""
    error_file_id: str | None
    """Of those that failed."""
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    request_counts: RequestCounts
    metadata: dict[str, str] | None
