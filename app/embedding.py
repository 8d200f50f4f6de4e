"""The encoder: texts to vectors, through sentence-transformers."""

import asyncio
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.models import identify, resolve_encoder
from app.settings import EmbeddingSettings

Vectors = NDArray[np.float32]


class Embedder:
    """A loaded encoder. Vectors are unit length, so their dot product is the cosine."""

    def __init__(self, settings: EmbeddingSettings) -> None:
        # Heavy: only the process that encodes pays for it.
        import torch
        from sentence_transformers import SentenceTransformer
        from tokenizers import Tokenizer

        torch.set_num_threads(settings.num_threads)
        found = resolve_encoder(settings.model)
        self._model: Any = SentenceTransformer(
            found.source, revision=found.revision, device="cpu", model_kwargs={"dtype": _dtype(settings)}
        )
        # A tokenizer of its own for counting: the model's is told to cut and pad, and may not be shared by threads.
        self._tokenizer = Tokenizer.from_str(self._model.tokenizer.backend_tokenizer.to_str())
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._batch_size = settings.batch_size
        # One forward pass at a time: two would share the same cores and both be late.
        self._lock = asyncio.Lock()
        self.model_name = settings.model
        self.revision = identify(found)
        self.tokenizer = hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()[:16]
        # Put before a question and before a text of a document.
        self.query_prompt = self.document_prompt = ""
        self.window: int = self._model.get_max_seq_length()
        self.dimension: int = self._model.get_embedding_dimension()

    async def embed(self, texts: Sequence[str]) -> Vectors:
        """Encode texts to an array of shape (len(texts), dimension)."""
        vectors = np.empty((len(texts), self.dimension), dtype=np.float32)
        # Texts of like length share a batch, which spares padding; a long job leaves room between its batches, so
        # that a question waits for one of them and not for a whole document.
        by_length = sorted(range(len(texts)), key=lambda position: len(texts[position]))
        for start in range(0, len(texts), self._batch_size):
            batch = by_length[start : start + self._batch_size]
            async with self._lock:
                vectors[batch] = await asyncio.to_thread(self._encode, [texts[position] for position in batch])
        return vectors

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Give the character offsets of each token, without special tokens and without a limit."""
        offsets: list[tuple[int, int]] = self._tokenizer.encode(text, add_special_tokens=False).offsets
        return offsets

    def num_tokens(self, text: str) -> int:
        """Count the tokens that the encoder would read, special tokens included."""
        return len(self._tokenizer.encode(text))

    def _encode(self, texts: list[str]) -> Vectors:
        encoded = self._model.encode(texts, batch_size=len(texts), show_progress_bar=False)
        # Made unit length here, not by the model: in bfloat16 the lengths would be 0.1% off.
        lengths = np.linalg.norm(encoded, axis=1, keepdims=True)
        vectors: Vectors = (encoded / lengths).astype(np.float32, copy=False)
        return vectors


def _dtype(settings: EmbeddingSettings) -> str:
    """Choose bfloat16 where the CPU computes in it: twice as fast, and the cosine to float32 is above 0.998."""
    import torch

    if settings.dtype != "auto":
        return settings.dtype
    return "bfloat16" if torch.cpu._is_avx512_bf16_supported() else "float32"
