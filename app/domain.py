"""The nouns of Cleave: small frozen dataclasses, also what crosses a process.

`Document` > `Chunk` (a run of a document that fits the encoder) > `Passage` (a chunk found for a question).
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Scalar: TypeAlias = str | int | float | bool
Metadata: TypeAlias = Mapping[str, Scalar]
Filters: TypeAlias = Mapping[str, Scalar | list[Scalar]]
"""Exact match per metadata field; a list matches any of its values. All fields must match."""

Ranking: TypeAlias = Literal["hybrid", "dense", "bm25"]
"""Both lists fused, or one of them alone, to see what it contributes."""
Role: TypeAlias = Literal["system", "user", "assistant"]
FinishReason: TypeAlias = Literal["stop", "length"]
Grounding: TypeAlias = Literal["gate", "flag", "off"]
Dialect: TypeAlias = Literal["annotations", "openwebui", "markdown"]
"""How an answer tells its sources: OpenAI's annotations, Open WebUI's events, or a list at the end of the text."""
Grounded: TypeAlias = Literal["model", "mixed", "quotes", "refused", "flagged", "unchecked"]
"""How an answer came about: the model's sentences, all supported; some of them replaced by quotes; quotes only; the
documents hold no answer; the model's sentences, some named as unsupported; not checked."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Document:
    """One piece of writing. `url` is where a reader finds it; empty when it has no address."""

    id: str
    title: str
    text: str
    url: str = ""
    metadata: Metadata = field(default_factory=dict)

    @property
    def content_hash(self) -> str:
        """SHA-256 over everything a reader or a filter can see; equal hash means nothing to do."""
        content = [self.title, self.text, self.url, sorted(self.metadata.items())]
        return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of a document's text, `document.text[start:end]`; `heading` is the section it stands in."""

    index: int
    text: str
    start: int
    end: int
    heading: str = ""


@dataclass(frozen=True, slots=True)
class EncodedChunk:
    """A chunk with its vectors: `dense` has the encoder's dimension, `sparse` maps term to weight."""

    chunk: Chunk
    dense: tuple[float, ...]
    sparse: Mapping[int, float]


@dataclass(frozen=True, slots=True)
class StoredDocument:
    """What the store says of a document, without its text."""

    id: str
    title: str
    url: str
    metadata: Metadata
    num_chunks: int
    num_characters: int
    content_hash: str
    version: int
    """Counts the writes of this document, from 1; a document that was deleted and is added again starts anew."""
    ingested_at: float
    """When it was first written, in seconds since the epoch."""
    updated_at: float
    """When this version was written."""


@dataclass(frozen=True, slots=True)
class IngestReceipt:
    """What became of one document. `error` is set exactly when `status` is `failed`."""

    document_id: str
    status: Literal["created", "updated", "unchanged", "failed"]
    num_chunks: int = 0
    num_truncated_chunks: int = 0
    """Chunks that the encoder's window would cut: always 0, counted to prove it."""
    error: str | None = None


@dataclass(frozen=True, slots=True)
class DeletionReceipt:
    """A document is gone: after it was removed, queries looked for its chunks and found none.

    `checks` counts these queries by what they asked: `filter` (all its chunks by its id), `dense` and `sparse` (the
    vectors that its chunks had).
    """

    document_id: str
    version: int
    num_chunks: int
    verified_at: float
    """Seconds since the epoch."""
    checks: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence of a passage with its cosine to the question, in [-1, 1]."""

    text: str
    score: float


@dataclass(frozen=True, slots=True)
class Passage:
    """What was found for a question: a chunk, or two that stand side by side.

    `text` is `document.text[start:end]`, white space between chunks aside; `chunk_id` is the better chunk's.
    """

    chunk_id: str
    document_id: str
    title: str
    url: str
    metadata: Metadata
    text: str
    score: float
    """The fused score, or the cross-encoder's; only its order within one result means something."""
    sentences: tuple[Sentence, ...] = ()
    start: int = 0
    end: int = 0
    also_in: tuple[str, ...] = ()
    """Other documents that hold nearly the same text."""
    similarity: float | None = None
    """Cosine of the chunk to the question; None where the dense list does not hold it."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a question was not answered: no document matches the filters, none is about it, or none holds the answer.

    `score` was below `answer.min_evidence`; `missing` are names and numbers of the question that no passage holds.
    """

    reason: Literal["no_match", "off_topic", "not_in_passages"]
    score: float = 0.0
    missing: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SearchQuery:
    """What to find. The sentences of the best `num_scored` passages get their cosine to the question.

    `timeout_s` is how long the caller waits: what is optional is left out when it would take too much of it.
    """

    text: str
    top_k: int
    filters: Filters = field(default_factory=dict)
    num_scored: int = 0
    timeout_s: float = math.inf
    context: tuple[str, ...] = ()
    """The user's earlier questions, newest first; they count lightly."""
    recognise_filters: bool = False
    """Also filter by authors and other metadata values that `text` names, in fields that `filters` leaves open."""
    collection: str | None = None
    """None: the configured one."""
    ranking: Ranking = "hybrid"
    index: Literal["live", "candidate"] = "live"
    """`candidate`: the new index of a reindexing that is not live yet."""


@dataclass(frozen=True, slots=True)
class SearchResult:
    """Passages, best first, with the time that each stage took, and what the search had to do without."""

    passages: tuple[Passage, ...]
    timings_ms: Mapping[str, float] = field(default_factory=dict)
    degraded: tuple[str, ...] = ()
    recognised_filters: Filters = field(default_factory=dict)
    """What was read from the question and filtered by."""
    notice: str | None = None
    """Why the filters match no document, for the reader; None where they match or there are none."""


@dataclass(frozen=True, slots=True)
class JSONFormat:
    """The completion is one JSON value: one that `schema`, a JSON Schema as text, describes, or any object.

    `name` and `is_strict` are for servers that ask for them.
    """

    schema: str | None = None
    name: str = "answer"
    is_strict: bool | None = None


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to sample. `max_tokens` bounds the completion; `stop` strings are not part of the answer."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """What is added to the logits of tokens, by their ids in the model's vocabulary."""
    json: JSONFormat | None = None
    """None: prose."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """All that an engine needs. It packs `passages` (best first) into its context window by its own tokenizer.

    The last message is the question. Without passages the messages are sent as they are, else `instructions` go
    before them.
    """

    request_id: str
    messages: tuple[Message, ...]
    sampling: SamplingParams
    passages: tuple[Passage, ...] = ()
    instructions: str = ""
    is_background: bool = False
    """Nobody waits for it: those that somebody waits for go first."""


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of generated text. The first one of a stream says how the prompt was packed.

    `num_presented` is how many of the request's passages fitted into the prompt, `num_dropped_messages` how many of its
    oldest turns did not.
    """

    text: str
    completion_tokens: int = 0
    """Tokens generated so far."""
    prompt_tokens: int = 0
    num_presented: int = 0
    num_dropped_messages: int = 0
    finish_reason: FinishReason | None = None
    is_quote: bool = False
    """The text is quoted from the passages, markers included: there is nothing to check."""


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What an engine serves. `context_window` is in tokens, prompt and completion together."""

    id: str
    engine: str
    context_window: int
    num_running: int = 0
    """Requests that the engine holds right now, those that wait in it included."""
    max_num_seqs: int = 0
    """Requests that it computes at once; 0 when it cannot tell."""
    kv_cache_usage: float = 0.0
    """Share of the KV cache that its requests fill, in [0, 1]."""


@dataclass(frozen=True, slots=True)
class RetrieverInfo:
    """What a retriever holds. `filter_fields` are the metadata fields that a filter may name."""

    collection: str
    num_documents: int
    num_chunks: int
    filter_fields: tuple[str, ...]
    embedding_model: str


@dataclass(frozen=True, slots=True)
class Facet:
    """A metadata field with the values that most documents have, each with their number, the most frequent first."""

    field: str
    values: tuple[tuple[Scalar, int], ...]
    num_values: int
    """All that the field has."""


@dataclass(frozen=True, slots=True)
class CollectionInfo:
    """One collection of a service; `embedding_model` is the one that wrote it."""

    name: str
    num_documents: int
    num_chunks: int
    embedding_model: str
    is_default: bool


@dataclass(frozen=True, slots=True)
class ReindexStatus:
    """How far the rebuilding of a collection's index is.

    `current`: the collection is written with the settings that were asked for. `none`: nothing is being built.
    `interrupted`: the process that built it has ended. The manifests are those of `Stamp`.
    """

    collection: str
    state: Literal["none", "current", "building", "built", "interrupted", "failed"]
    num_done: int
    """Documents in the new index."""
    num_documents: int
    live: Mapping[str, Scalar | None]
    candidate: Mapping[str, Scalar | None] | None = None
    has_previous: bool = False
    """There is an earlier index to go back to."""
    is_live_served: bool = True
    """Questions are answered from the live index: it was written with the service's settings."""
    error: str | None = None
