"""What plain methods find on an evaluation set: figures that `cleave eval` should beat.

BM25 is bm25s, dense is the bundled encoder over whole documents, which it cuts at its window, compared exactly; RRF
fuses both by reciprocal rank. Only the last message of a conversation is searched for, and filters are not applied.

python benchmarks/retrieval_baselines.py DIR --json out.json
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import bm25s
import numpy as np
import Stemmer
from sentence_transformers import SentenceTransformer

from app.domain import Document
from app.evaluation.measures import Measures, means, measure_rankings
from app.evaluation.run import RANKING_LENGTH
from app.evaluation.sets import EvaluationSet, read_set
from app.models import resolve_encoder

ENCODER = "all-MiniLM-L6-v2"
DEPTH = 50
"""Length of the two lists before they are fused."""
RRF_K = 60
"""Of the paper that introduced the method (Cormack et al., 2009)."""
MAX_CHARACTERS = 20_000
"""More than the encoder's 256 tokens ever span; spares it from reading books."""

Rankings = list[list[int]]
"""Positions of documents, best first, for each question."""


def bm25(documents: Sequence[str], questions: Sequence[str]) -> Rankings:
    """Rank by BM25, with English stop words and stemming."""

    def tokenize(texts: Sequence[str]) -> bm25s.tokenization.Tokenized:
        stemmer = Stemmer.Stemmer("english")
        return bm25s.tokenize(list(texts), stopwords="en", stemmer=stemmer, show_progress=False)

    index = bm25s.BM25(k1=1.2, b=0.75)
    index.index(tokenize(documents), show_progress=False)
    depth = min(DEPTH, len(documents))
    found, scores = index.retrieve(tokenize(questions), k=depth, show_progress=False)
    return [[int(one) for one in row[score > 0]] for row, score in zip(found, scores, strict=True)]


def dense(documents: Sequence[str], questions: Sequence[str]) -> Rankings:
    """Rank by the cosine of float32 vectors."""
    encoder = resolve_encoder(ENCODER)
    model = SentenceTransformer(encoder.source, revision=encoder.revision, device="cpu")
    held = model.encode([text[:MAX_CHARACTERS] for text in documents], normalize_embeddings=True)
    asked = model.encode(list(questions), normalize_embeddings=True)
    return [[int(one) for one in np.argsort(-scores, kind="stable")[:DEPTH]] for scores in asked @ held.T]


def reciprocal_rank_fusion(*rankings: Sequence[int]) -> list[int]:
    """Fuse the rankings of one question; of equal documents, the one of the first ranking comes first."""
    scores: dict[int, float] = {}
    for ranking in rankings:
        for rank, document in enumerate(ranking, start=1):
            scores[document] = scores.get(document, 0.0) + 1 / (RRF_K + rank)
    return sorted(scores, key=lambda document: -scores[document])


def searchable(document: Document) -> str:
    """Put the title before the text."""
    return f"{document.title} {document.text}".strip()


def plain_methods(evaluation_set: EvaluationSet) -> dict[str, Measures]:
    """Measure the three methods."""
    documents = list(evaluation_set.documents())
    texts = [searchable(document) for document in documents]
    questions = [question.text for question in evaluation_set.questions]
    found = {"BM25": bm25(texts, questions), "dense": dense(texts, questions)}
    pairs = zip(found["dense"], found["BM25"], strict=True)
    found["RRF"] = [reciprocal_rank_fusion(*pair) for pair in pairs]
    figures = {}
    for method, rankings in found.items():
        ids = [[documents[one].id for one in ranking[:RANKING_LENGTH]] for ranking in rankings]
        by_question = dict(zip((question.id for question in evaluation_set.questions), ids, strict=True))
        figures[method] = means(measure_rankings(evaluation_set.judgements, by_question).values())
    return figures


def main() -> None:
    """Print recall@5 and nDCG@10 of the three methods, and write all figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures = plain_methods(read_set(options.folder))
    for method in figures:
        print(f"{method:6} {figures[method]['recall@5']:.3f} / {figures[method]['ndcg@10']:.3f}")
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
