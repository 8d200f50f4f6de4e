"""How fast the encoder is beside sentence-transformers by itself: float32 in PyTorch, all defaults.

python -m benchmarks.encoder --json encoder.json

Both encode the chunks of the sample articles, and one short question, in turns within one process. A ratio is of two
runs that followed each other, and the median of these is given: it also holds on a busy machine.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from app.chunking import split
from app.embedding import Embedder, Vectors
from app.models import resolve_encoder
from app.settings import ChunkingSettings, EmbeddingSettings

ARTICLES = Path("examples/articles")
QUESTION = "How long did the Reading Room outage on 14 October 2025 last?"


def chunks(embedder: Embedder) -> list[str]:
    """Cut the sample articles into chunks of the default size."""
    limit = ChunkingSettings().max_tokens
    articles = [path.read_text(encoding="utf-8") for path in sorted(ARTICLES.glob("*.md"))]
    return [chunk.text for text in articles for chunk in split(text, embedder, max_tokens=limit)]


def seconds(encode: Callable[[], Any], times: int = 1) -> float:
    """Time one call, as the median of so many."""
    took = []
    for _ in range(times):
        started = time.perf_counter()
        encode()
        took.append(time.perf_counter() - started)
    return statistics.median(took)


def compare(
    name: str, ours: Callable[[], Any], default: Callable[[], Any], *, rounds: int, times: int
) -> dict[str, Any]:
    """Run both in turns, after one run each that is not counted."""
    ours(), default()
    pairs = [(seconds(ours, times), seconds(default, times)) for _ in range(rounds)]
    found = {
        "cleave_s": round(statistics.median(own for own, _ in pairs), 4),
        "sentence_transformers_s": round(statistics.median(other for _, other in pairs), 4),
        "times_as_fast": round(statistics.median(other / own for own, other in pairs), 2),
        "each_round": [round(other / own, 2) for own, other in pairs],
    }
    print(f"{name}: {json.dumps(found)}", flush=True)
    return found


def main() -> None:
    """Measure and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--chunks", type=int, default=128, help="of the sample articles at most")
    options = parser.parse_args()

    settings = EmbeddingSettings()
    embedder = Embedder(settings)
    model = SentenceTransformer(resolve_encoder(settings.model).source, device="cpu")
    torch.set_num_threads(settings.num_threads)
    texts = chunks(embedder)[: options.chunks]

    def ours() -> Vectors:
        return asyncio.run(embedder.embed_documents(texts))

    cosines = (ours() * model.encode(texts, normalize_embeddings=True)).sum(axis=1)
    found = {
        "model": settings.model,
        "num_threads": settings.num_threads,
        "num_chunks": len(texts),
        "cosine": {"mean": float(np.mean(cosines)), "lowest": float(np.min(cosines))},
        "documents": compare("documents", ours, lambda: model.encode(texts), rounds=options.rounds, times=1),
        "question": compare(
            "question",
            lambda: asyncio.run(embedder.embed_queries([QUESTION])),
            lambda: model.encode(QUESTION),
            rounds=options.rounds,
            times=10,
        ),
    }
    options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
