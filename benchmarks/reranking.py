"""What reranking costs: a budget of candidates read by a cross-encoder, against the embedding of one question.

The cross-encoder has the size of ms-marco-MiniLM-L6-v2 and weights of chance: the time is that of any such model, its
order means nothing. Run `python -m benchmarks.reranking`.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable
from pathlib import Path

from app.chunking import split
from app.domain import Passage
from app.embedding import Embedder
from app.loaders import load_file, walk
from app.models import resolve_encoder
from app.reranking import Reranker
from app.settings import EmbeddingSettings, RerankingSettings

ARTICLES = Path(__file__).parent.parent / "examples" / "articles"
QUESTION = "How long did the Reading Room outage on 14 October 2025 last?"


def make_cross_encoder(folder: Path) -> Path:
    """Write a model of 6 layers and 384 dimensions, as the bundled encoder, with a last layer that gives one score."""
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    encoder = resolve_encoder("all-MiniLM-L6-v2").source
    AutoTokenizer.from_pretrained(encoder).save_pretrained(folder)
    BertForSequenceClassification(BertConfig.from_pretrained(encoder, num_labels=1)).save_pretrained(folder)
    return folder


def cut_articles(embedder: Embedder) -> list[Passage]:
    """Cut the sample articles as the service does, into passages."""
    passages = []
    for relative, path in walk(ARTICLES):
        for document in load_file(relative.as_posix(), path.read_bytes(), max_bytes=2**20):
            for chunk in split(getattr(document, "text", ""), embedder, max_tokens=160):
                passages.append(Passage(f"{path}#{chunk.index}", str(path), "", "", {}, chunk.text, 0.0))
    return passages


async def milliseconds(work: Awaitable[object]) -> float:
    """Time one call."""
    started = time.perf_counter()
    await work
    return (time.perf_counter() - started) * 1000


async def measure(candidates: list[int], repetitions: int) -> None:
    """Print the medians, from rounds in which all that is compared takes its turn."""
    embedder = Embedder(EmbeddingSettings())
    passages = cut_articles(embedder)
    with tempfile.TemporaryDirectory() as folder:
        model = str(make_cross_encoder(Path(folder)))
        settings = RerankingSettings(model=model, num_candidates=max(candidates), timeout_s=600)
        reranker = Reranker(settings, asyncio.Lock())
    if (await reranker.rerank(QUESTION, passages))[1]:
        raise SystemExit("The cross-encoder failed; the log above says why.")
    embedding: list[float] = []
    reranking: dict[int, list[float]] = {number: [] for number in candidates}
    for repetition in range(repetitions + 1):
        embedding.append(await milliseconds(embedder.embed_queries([QUESTION])))
        for number, times in reranking.items():
            start = repetition * number % (len(passages) - number)
            times.append(await milliseconds(reranker.rerank(QUESTION, passages[start : start + number])))
    # The first round warms up.
    question = statistics.median(embedding[1:])
    print(f"{len(passages)} passages; embedding one question: {question:.1f} ms")
    for number, times in reranking.items():
        median = statistics.median(times[1:])
        print(f"reranking {number:3} candidates: {median:7.1f} ms, {median / question:5.1f} times as long")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--candidates", type=int, nargs="+", default=[10, 20, 30, 50])
    parser.add_argument("--repetitions", type=int, default=11)
    options = parser.parse_args()
    asyncio.run(measure(options.candidates, options.repetitions))
