"""The one composition root: settings in, running parts out. Any part can be handed in instead of built."""

import asyncio
import gc
import os
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from app.batch_queue import LocalQueue, Queue
from app.batches import BatchStore
from app.catalog import LocalRetriever
from app.chat import ChatService
from app.collection import IndexBuilder
from app.domain import Document, Grounding
from app.errors import CollectionMismatch, ConfigurationError
from app.files import FileStore
from app.ingestion_jobs import IngestionJobs, Ingestions
from app.llm import LLM
from app.llm.openai_http import OpenAIEngine, check_url
from app.loaders import SUFFIXES, load_file, walk
from app.models import check_chat_model
from app.reranking import Reranker
from app.retrieval import Retriever, Searcher
from app.settings import Device, IndexSettings, LLMSettings, PlanningSettings, Settings
from app.store import Database
from app.telemetry import logger


class Answering(Protocol):
    """What an answer needs of `Services`: enough for a process that holds neither documents nor files."""

    @property
    def settings(self) -> Settings:
        """See `Services`."""
        ...

    @property
    def llm(self) -> LLM:
        """See `Services`."""
        ...

    @property
    def chat(self) -> ChatService:
        """See `Services`."""
        ...


@dataclass(frozen=True, slots=True)
class Services:
    """The parts behind the API."""

    settings: Settings
    retriever: Retriever
    llm: LLM
    chat: ChatService
    ingestions: Ingestions
    files: FileStore
    batches: BatchStore
    queue: Queue

    def over(self, retriever: Retriever, llm: LLM, ingestions: Ingestions) -> "Services":
        """Put other parts in the place of these."""
        chat = self.chat.over(retriever, llm)
        return replace(self, retriever=retriever, llm=llm, chat=chat, ingestions=ingestions)

    async def close(self) -> None:
        """Stop what runs in this process."""
        await self.ingestions.close()
        await self.llm.close()
        await self.retriever.close()


async def build_services(
    settings: Settings,
    *,
    device: Device = "cpu",
    retriever: Retriever | None = None,
    llm: LLM | None = None,
    queue: Queue | None = None,
    ingests: bool = True,
) -> Services:
    """Build what is not handed in, and wire it. `device` is where an LLM that is built here runs.

    With `ingests` this process works on uploads that go on by themselves.
    """
    retriever = retriever or await build_retriever(settings)
    llm = llm or await build_llm(settings, device)
    chat = build_chat(settings, device, retriever, llm)
    ingestions = IngestionJobs(settings.data_dir, retriever, settings.api)
    if ingests:
        ingestions.start()
    shared = settings.batch.folder or settings.data_dir
    files = FileStore(shared, settings.api, settings.batch)
    batches = BatchStore(shared, files)
    return Services(settings, retriever, llm, chat, ingestions, files, batches, queue or LocalQueue())


def build_chat(settings: Settings, device: Device, searcher: Searcher, llm: LLM) -> ChatService:
    """Wire the pipeline over what finds passages and what writes; `device` is where the latter runs."""
    return ChatService(
        searcher,
        llm,
        grounding=decide_grounding(settings, device),
        settings=settings.answer,
        planning=decide_planning(settings, device),
    )


async def build_retriever(settings: Settings) -> LocalRetriever:
    """Load the encoder and the cross-encoder, open the configured collection, and fill it from `seed` when it is new.

    A collection that was written with other settings is no error here: the service lives, and says what to do.
    """
    turn = asyncio.Lock()
    reranker = None
    if settings.reranking.model is not None:
        reranker = await asyncio.to_thread(Reranker, settings.reranking, turn)
    builder = IndexBuilder(settings.retrieval, settings.llm.chat_template, reranker=reranker, turn=turn)
    index = IndexSettings(embedding=settings.embedding, chunking=settings.chunking)
    retriever = await LocalRetriever.open(await _open_database(settings), builder, index, settings.store.collection)
    if settings.seed is not None:
        with suppress(CollectionMismatch):
            await _seed(retriever, settings, settings.seed)
    return retriever


async def build_llm(settings: Settings, device: Device) -> LLM:
    """Start the engine that the settings name. One behind HTTP need not be up yet."""
    if settings.llm.engine == "extractive":
        from app.llm.extractive import ExtractiveEngine

        return ExtractiveEngine()
    if settings.llm.engine == "openai":
        return _reach_llm(settings.llm)
    from app.llm.vllm_engine import VLLMEngine

    return await VLLMEngine.start(settings.llm, device=device, data_dir=settings.data_dir)


def spare_from_collection() -> None:
    """Keep what exists now out of garbage collection; for a process to call once its parts are built.

    torch and transformers hold a million objects that live as long as the process. Each full collection looks at all of
    them, which stops every request for a quarter of a second; without them it takes a few milliseconds.
    """
    gc.collect()
    gc.freeze()


async def ask_for_models(settings: Settings) -> dict[str, int | None]:
    """Ask the server of `llm.engine: openai` which models it has, and how long their context windows are.

    Raises:
        ConfigurationError: its address or its key cannot be one.
        LLMUnavailable: it does not answer, or is no such server.
    """
    engine = _reach_llm(settings.llm)
    try:
        return await engine.models()
    finally:
        await engine.close()


def _reach_llm(settings: LLMSettings) -> OpenAIEngine:
    return OpenAIEngine(settings, api_key=settings.api_key or os.environ.get("LLM_API_KEY"))


def check_models(settings: LLMSettings, device: Device) -> None:
    """Refuse a model that cannot be loaded or asked, in seconds, without either. Raises `ConfigurationError`."""
    if settings.engine == "vllm":
        check_chat_model(settings.model_on(device), chat_template=settings.chat_template)
    if settings.engine == "openai":
        check_url(settings.url or "")


def decide_grounding(settings: Settings, device: Device) -> Grounding:
    """Tell what `auto` means: a model that fits a CPU needs the gate, a larger one is checked afterwards."""
    chosen = settings.answer.grounding
    if chosen != "auto":
        return chosen
    return "flag" if _is_large(settings, device) else "gate"


def decide_planning(settings: Settings, device: Device) -> PlanningSettings:
    """Tell what `rewrite: auto` means: a model that fits a CPU cannot rewrite a question, a larger one can."""
    if settings.planning.rewrite != "auto":
        return settings.planning
    can_rewrite = _is_large(settings, device) and settings.llm.engine != "extractive"
    return settings.planning.model_copy(update={"rewrite": "always" if can_rewrite else "never"})


def _is_large(settings: Settings, device: Device) -> bool:
    return device == "gpu" or settings.llm.engine == "openai"


async def _open_database(settings: Settings) -> Database:
    if settings.store.kind == "embedded":
        from app.store.edge import EdgeDatabase

        # The engine holds Python's global lock through each call. Asking for it back sooner than after the usual 5 ms
        # keeps the event loop punctual: with 16 busy clients 11 ms late at worst, in place of 52.
        sys.setswitchinterval(0.0005)
        return EdgeDatabase(settings.data_dir / "qdrant")
    from app.store.server import open_server_database

    url = ":memory:" if settings.store.kind == "memory" else settings.store.url
    return await open_server_database(url=url, api_key=settings.store.api_key or os.environ.get("QDRANT_API_KEY"))


async def _seed(retriever: LocalRetriever, settings: Settings, seed: Path) -> None:
    """Fill a collection once. A seed that was cut short goes on; a collection with other documents is left alone."""
    done = settings.data_dir / "seeded" / settings.store.collection
    if settings.store.kind != "memory" and await asyncio.to_thread(done.exists):
        return
    documents = await asyncio.to_thread(_load_seed, seed, settings.api.max_file_bytes)
    held = await retriever.documents(limit=len(documents) + 1)
    if {one.id for one in held} <= {document.id for document in documents}:
        receipts = await retriever.ingest(documents)
        failed = [receipt for receipt in receipts if receipt.status == "failed"]
        if failed:
            raise ConfigurationError(f"seed: {failed[0].document_id} could not be ingested: {failed[0].error}")
        logger.info("collection seeded", extra={"num_documents": len(receipts), "seed": str(seed)})
    if settings.store.kind != "memory":
        await asyncio.to_thread(_mark, done)


def _mark(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def _load_seed(seed: Path, max_bytes: int) -> list[Document]:
    if not seed.exists():
        raise ConfigurationError(
            f"seed: there is no {str(seed)!r} here. Name an existing file or folder, or leave it out."
        )
    documents: list[Document] = []
    files = [(Path(seed.name), seed)]
    if seed.is_dir():
        files = [(relative, path) for relative, path in walk(seed) if path.suffix.lower() in SUFFIXES]
    for relative, path in files:
        for one in load_file(relative.as_posix(), path.read_bytes(), max_bytes=max_bytes):
            if not isinstance(one, Document):
                raise ConfigurationError(f"seed: {one.message}")
            documents.append(one)
    return documents
