"""The encoder: texts to vectors, through sentence-transformers."""

import asyncio
import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.acceleration import accelerate, native_dtype
from app.models import identify, resolve_encoder
from app.settings import EmbeddingSettings

Vectors = NDArray[np.float32]


class Embedder:
    """A loaded encoder. Vectors are unit length, so their dot product is the cosine."""

    def __init__(self, settings: EmbeddingSettings, turn: asyncio.Lock | None = None) -> None:
        # Heavy: only the process that encodes pays for it.
        import torch
        from sentence_transformers import SentenceTransformer
        from tokenizers import Tokenizer

        torch.set_num_threads(settings.num_threads)
        found = resolve_encoder(settings.model)
        self._model: Any = SentenceTransformer(
            found.source, revision=found.revision, device="cpu", model_kwargs={"dtype": "float32"}
        )
        dtype = native_dtype() if settings.dtype == "auto" else settings.dtype
        if not accelerate(self._model, dtype=dtype, num_threads=settings.num_threads):
            self._model.to(getattr(torch, dtype))
        # A tokenizer of its own for counting: the model's is told to cut and pad, and may not be shared by threads.
        self._tokenizer = Tokenizer.from_str(self._model.tokenizer.backend_tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._batch_size = settings.batch_size
        # One thread, so that a pass whose caller has gone still ends before the next one begins.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="encoder")
        # Held during a forward pass, also of other models: two at once would share the same cores and both be late.
        self._turn = turn or asyncio.Lock()
        self.model_name = settings.model
        self.revision = identify(found)
        self.tokenizer = hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()[:16]
        self.query_prefix = self._prefix(settings.query_prefix, "query")
        self.document_prefix = self._prefix(settings.document_prefix, "document", "passage", "corpus")
        self.window: int = self._model.get_max_seq_length()
        self.dimension: int = self._model.get_embedding_dimension()

    async def embed_queries(self, texts: Sequence[str]) -> Vectors:
        """Encode what is searched for to an array of shape (len(texts), dimension)."""
        return await self._embed(texts, self.query_prefix)

    async def embed_documents(self, texts: Sequence[str]) -> Vectors:
        """Encode what is found, chunks or sentences, to an array of shape (len(texts), dimension)."""
        return await self._embed(texts, self.document_prefix)

    async def _embed(self, texts: Sequence[str], prefix: str) -> Vectors:
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        # Texts of like length share a batch, which spares padding; a long job leaves room between its batches, so
        # that a question waits for one of them and not for a whole document.
        by_length = sorted(range(len(texts)), key=lambda position: len(texts[position]))
        for start in range(0, len(texts), self._batch_size):
            batch = by_length[start : start + self._batch_size]
            async with self._turn:
                run = asyncio.get_running_loop().run_in_executor
                vectors[batch] = await run(self._thread, self._encode, [texts[position] for position in batch], prefix)
        return vectors

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Give the character offsets of each token, without special tokens and without a limit."""
        offsets: list[tuple[int, int]] = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return offsets

    def num_tokens(self, text: str) -> int:
        """Count the tokens that the encoder would read of a document's text, prefix and special tokens included."""
        return len(self._tokenizer.encode(self.document_prefix + text))

    def _encode(self, texts: list[str], prefix: str) -> Vectors:
        encoded = self._model.encode(texts, prompt=prefix, batch_size=len(texts), show_progress_bar=False)
        # Made unit length here, since not every model does it and bfloat16 would be 0.1% off.
        lengths = np.linalg.norm(encoded, axis=1, keepdims=True)
        vectors: Vectors = (encoded / lengths).astype(np.float32, copy=False)
        return vectors

    def _prefix(self, setting: str | None, *names: str) -> str:
        """Take the setting, else the model's own prompt of the first of these names, else its default prompt."""
        if setting is not None:
            return setting
        prompts: dict[str, str] = self._model.prompts
        return next((prompts[name] for name in (*names, self._model.default_prompt_name) if prompts.get(name)), "")
