"""The one settings tree: what `args:` in serve_config.yaml may say, and its defaults.

The Serve builders take `Settings` as their typed argument and the CLI reads the same file, so a misspelt key is an
error everywhere. Each part of the service is handed only its own branch.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from app.domain import Dialect, Grounding, Scalar

Device = Literal["gpu", "cpu"]
MAX_THREADS = 256
"""Of one part of the service. Far more than a machine has end the process, which the system gives no more threads."""
ProfileName = Annotated[str, Field(min_length=1, max_length=256)]


class Branch(BaseModel):
    """A branch of the tree: frozen, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class EmbeddingSettings(Branch):
    """The encoder. Another one needs another index (`cleave reindex`): what it wrote before cannot be compared."""

    model: str = Field("all-MiniLM-L6-v2", description="bundled name, hub-id[@revision], or folder")
    batch_size: int = Field(32, ge=1, le=1024)
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 where the CPU has it")
    num_threads: int = Field(2, ge=1, le=MAX_THREADS, description="CPU threads of one retriever replica")
    query_prefix: str | None = Field(None, description="put before each question; default: the model's own prompt")
    document_prefix: str | None = Field(None, description="put before each chunk; default: the model's own prompt")


class ChunkingSettings(Branch):
    """How documents are cut. Lengths are tokens of the encoder."""

    max_tokens: int = Field(160, ge=16, description="of one chunk's text, without its title")


class IndexSettings(Branch):
    """What a collection is written with."""

    embedding: EmbeddingSettings = EmbeddingSettings()
    chunking: ChunkingSettings = ChunkingSettings()


class StoreSettings(Branch):
    """Where chunks live. `embedded` has one owner process; `server` is a Qdrant server; `memory` is for tests."""

    kind: Literal["embedded", "server", "memory"] = "embedded"
    url: str = "http://127.0.0.1:6333"
    api_key: str | None = Field(None, repr=False, description="better: the environment variable QDRANT_API_KEY")
    collection: str = Field("default", pattern=r"^[A-Za-z0-9_-]{1,64}$")


class RetrievalSettings(Branch):
    """How passages are found: a dense and a BM25 list, fused by their scores."""

    top_k: int = Field(5, ge=1, le=50, description="passages a request gets when it does not say")
    num_candidates: int = Field(100, ge=1, le=1000, description="length of each list before fusion")
    dense_weight: float = Field(0.65, ge=0)
    sparse_weight: float = Field(0.35, ge=0)


class RerankingSettings(Branch):
    """The cross-encoder that orders the best passages anew; without a model there is none."""

    model: str | None = Field(None, description="hub-id[@revision] or folder of a sentence-transformers CrossEncoder")
    num_candidates: int = Field(30, ge=2, le=1000, description="passages that it reads for a question")
    timeout_s: float = Field(1.0, gt=0, description="after this the order stays that of the search")
    batch_size: int = Field(32, ge=1, le=1024, description="passages read at once, of all searches together")
    dtype: Literal["auto", "float32", "bfloat16"] = Field("auto", description="auto: bfloat16 where the CPU has it")


class ModelByDevice(Branch):
    """A model per device, so that one file serves a laptop and a GPU box."""

    gpu: str
    cpu: str

    def on(self, device: Device) -> str:
        """Pick the model for a device."""
        return self.gpu if device == "gpu" else self.cpu


class LLMSettings(Branch):
    """The language model and its engine. Models are a bundled name, hub-id[@revision], or a folder.

    With `engine: openai` the model runs in another server, and `model` is its name there.
    """

    engine: Literal["vllm", "openai", "extractive"] = "vllm"
    url: str | None = Field(None, description="of an OpenAI-compatible server, up to and including /v1")
    api_key: str | None = Field(None, repr=False, description="better: the environment variable LLM_API_KEY")
    device: Literal["auto", "gpu", "cpu"] = "auto"
    model: str | ModelByDevice = ModelByDevice(gpu="Qwen/Qwen3-4B-Instruct-2507", cpu="SmolLM2-135M-Instruct")
    max_model_len: int | None = Field(None, ge=256, description="context window in tokens; default: the model's own")
    max_num_seqs: int = Field(32, ge=1, description="requests that the engine runs at once")
    stream_interval: int = Field(8, ge=1, description="tokens per message after the first")
    kv_cache_gib: int = Field(1, ge=1, description="KV cache on the CPU, GiB; a GPU takes what is free")
    num_threads: int = Field(2, ge=1, le=MAX_THREADS, description="CPU threads of the engine on the CPU")
    chat_template: Path | None = Field(None, description="a Jinja file, for a model without its own template")
    engine_options: dict[str, Any] = Field(default_factory=dict, description="passed to vLLM's AsyncEngineArgs")

    @model_validator(mode="after")
    def _check_engine(self) -> "LLMSettings":
        if self.engine == "openai" and not (self.url and isinstance(self.model, str)):
            raise ValueError(
                "engine: openai needs `url`, such as http://127.0.0.1:8001/v1, and `model`, its name there"
            )
        return self

    def model_on(self, device: Device) -> str:
        """Pick the model for a device; a plain name serves both."""
        return self.model if isinstance(self.model, str) else self.model.on(device)


class PlanningSettings(Branch):
    """What is done to a question before the search."""

    recognise_filters: bool = Field(True, description="filter by authors and other values that a question names")
    rewrite: Literal["auto", "always", "never"] = Field(
        "auto", description="make a follow-up stand alone by the LLM; auto: on a GPU and with engine openai"
    )
    rewrite_timeout_s: float = Field(2.0, gt=0, description="after this the question is searched for as it is")


class AnswerSettings(Branch):
    """How an answer is made."""

    grounding: Grounding | Literal["auto"] = Field("auto", description="auto: gate on the CPU, flag on a GPU")
    num_passages: int = Field(3, ge=1, le=50, description="passages put into the prompt")
    min_evidence: float = Field(0.6, ge=-1, le=1.5, description="below this the documents do not hold the answer")
    max_tokens: int = Field(256, ge=1, description="of a completion when the request does not say")
    temperature: float = Field(0.0, ge=0, le=2)
    timeout_s: float = Field(60.0, gt=0, description="deadline of a request that names none")
    first_token_timeout_s: float = Field(20.0, gt=0, description="after this the answer is quoted instead")
    without_llm: Literal["quote", "error"] = Field("quote", description="while no replica of the LLM runs")
    llm_start_s: float = Field(60.0, gt=0, description="expected length of its start, until one was measured")


class ProfileSettings(Branch):
    """A name under which clients find the service as a model: how a request is answered that does not say otherwise."""

    description: str = "Answers from the ingested documents, with citations."
    collection: str | None = Field(None, pattern=r"^[A-Za-z0-9_-]{1,64}$", description="default: store.collection")
    filters: dict[str, Scalar | list[Scalar]] = Field(default_factory=dict)
    top_k: int | None = Field(None, ge=1, le=50, description="default: retrieval.top_k")
    grounding: Grounding | None = Field(None, description="default: answer.grounding")
    dialect: Dialect = "annotations"


class APISettings(Branch):
    """Limits of the HTTP border."""

    max_file_bytes: int = Field(25 * 2**20, ge=1, description="of one uploaded file")
    max_body_bytes: int = Field(32 * 2**20, ge=1, description="of a request that is held in memory: all but uploads")
    max_upload_bytes: int = Field(10 * 2**30, ge=1, description="of an upload of files, which goes to disk as it comes")
    min_free_bytes: int = Field(2**30, ge=0, description="of disk under data_dir that uploads leave alone")


class BatchSettings(Branch):
    """Batches: files of requests that are answered when there is time."""

    folder: Path | None = Field(None, description="of files and batches, shared by all nodes; default: data_dir")
    broker_url: str | None = Field(
        None,
        pattern=r"^(rediss?://.+|redis\+socket://.+|amqps?://.+)",
        repr=False,
        description="of the queue, such as redis://host:6379/1; default: files in that folder",
    )
    max_file_bytes: int = Field(512 * 2**20, ge=1, description="of one file of requests")
    num_concurrent: int = Field(4, ge=1, le=1024, description="requests of one part that are answered at once")
    timeout_s: float = Field(600.0, gt=0, description="deadline of a request that names none")
    webhook_url: str | None = Field(None, pattern=r"^https?://.+", description="told of each batch that has ended")
    webhook_secret: str | None = Field(
        None, repr=False, description="whsec_...; better: the environment variable CLEAVE_WEBHOOK_SECRET"
    )


class AccessSettings(Branch):
    """Who may use the service, and how much."""

    keys_file: Path | None = Field(None, description="default: keys.json in data_dir")
    allow_without_keys: bool = Field(False, description="serve other machines too while there are no keys")
    rates_url: str = Field(
        "memory://",
        pattern=r"^(memory://|rediss?://.+|redis\+unix://.+)",
        repr=False,
        description="where rates are counted: each replica by itself, or all in one Redis",
    )


class LoggingSettings(Branch):
    """Structured logs on standard error."""

    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    format: Literal["json", "text"] = "json"


class Settings(Branch):
    """The whole tree."""

    data_dir: Path = Field(Path(".cleave"), description="everything that Cleave keeps: documents and prepared models")
    seed: Path | None = Field(None, description="a file or folder that a new, empty collection is filled from")
    embedding: EmbeddingSettings = EmbeddingSettings()
    chunking: ChunkingSettings = ChunkingSettings()
    store: StoreSettings = StoreSettings()
    retrieval: RetrievalSettings = RetrievalSettings()
    reranking: RerankingSettings = RerankingSettings()
    llm: LLMSettings = LLMSettings()
    planning: PlanningSettings = PlanningSettings()
    answer: AnswerSettings = AnswerSettings()
    profiles: dict[ProfileName, ProfileSettings] = Field(default_factory=dict, description="more names of models")
    api: APISettings = APISettings()
    batch: BatchSettings = BatchSettings()
    access: AccessSettings = AccessSettings()
    logging: LoggingSettings = LoggingSettings()

    def only(self, *branches: str) -> "Settings":
        """Keep these branches; the others get their defaults. A part built from it depends on nothing else."""
        return Settings().model_copy(update={branch: getattr(self, branch) for branch in branches})

    @model_validator(mode="after")
    def _check_together(self) -> "Settings":
        if self.answer.num_passages > self.retrieval.top_k:
            raise ValueError(
                f"answer.num_passages ({self.answer.num_passages}) is more than retrieval.top_k "
                f"({self.retrieval.top_k}): raise top_k or lower num_passages"
            )
        return self
