"""A question with the questions before it, as one dense and one sparse query.

A follow-up ("How much is it?") needs the words of earlier turns, and pasting them in front drowns its own: so they are
added with a small weight, which halves with each turn back. On MTRAG's 213 questions with a history this raises
recall@5 from .742 to .831 and nDCG@10 from .732 to .816 (RRF of dense and BM25; 95% intervals of the gains .056 to
.125 and .055 to .114), in each of its four domains. It costs at most .032 and .019 where the earlier questions are
from another conversation, and .007 and .009 on SQuAD after three questions about other articles.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from app import sparse
from app.embedding import Vectors

CONTEXT_WEIGHT = 0.3
"""Of the question before, where the question itself has 1; for both queries. 0.2 to 0.5 gain alike on follow-ups; the
larger, the more a change of topic costs."""
DECAY = 0.5
"""Per turn back."""


def encode_query(question: str, context: Sequence[str], vectors: Vectors) -> tuple[Vectors, Mapping[int, float]]:
    """Blend a question with the earlier ones, newest first.

    `vectors` are those of the question and of `context`, in this order, shape (1 + len(context), dimension). Gives a
    vector of unit length and the weight of each term.
    """
    weights = [1.0, *(CONTEXT_WEIGHT * DECAY**turns for turns in range(len(context)))]
    dense = np.average(vectors, axis=0, weights=weights)
    terms: dict[int, float] = {}
    for weight, text in zip(weights, (question, *context), strict=True):
        for term, count in sparse.encode_query(text).items():
            terms[term] = max(terms.get(term, 0.0), weight * count)
    return (dense / np.linalg.norm(dense)).astype(np.float32), terms
