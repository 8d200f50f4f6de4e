"""Ingestion and retrieval on real parts: the bundled encoder and Qdrant in memory."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from app.domain import Document, Passage, SearchQuery
from app.embedding import Embedder
from app.errors import ConfigurationError, DocumentNotFound, UnknownFilter
from app.ingestion import Ingestor, check_window, manifest
from app.retrieval import LocalRetriever
from app.settings import ChunkingSettings, EmbeddingSettings, RetrievalSettings
from app.store.server import open_server_store

PARAGRAPHS = [
    "The Reading Room outage lasted 52 minutes. Nobody was on call that day.",
    "A cache of keys and values grows with every token. It is freed when the answer ends.",
    "Manuals are cut at their headings. A table stays in one piece.",
]
DOCUMENTS = [
    Document("outage", "Post-mortem", PARAGRAPHS[0], "https://wiki.example/o", {"author": "Noor", "year": 2025}),
    Document("cache", "KV cache", PARAGRAPHS[1], metadata={"author": "Teodor", "draft": True}),
    Document("chunks", "Chunking", PARAGRAPHS[2], metadata={"author": "Marit", "year": 2024}),
]


@cache
def loaded_embedder() -> Embedder:
    return Embedder(EmbeddingSettings())


@pytest.fixture
def embedder() -> Embedder:
    """The encoder, loaded once; its lock is new, since each test has an event loop of its own."""
    found = loaded_embedder()
    found._lock = asyncio.Lock()
    return found
