"""Questions made from one's own documents: does a new index find them as well as the live one?

Nobody has to judge anything: a question is half of the words of one sentence, and the document that the sentence
stands in is to be found. Such questions are easier than people's, but an index that is broken, or whose encoder does
not know the language, loses on them.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from app.chunking import sentences
from app.significance import interval

MAX_QUESTIONS = 200
MIN_WORDS, MAX_WORDS = 8, 40
"""Of a sentence that a question is made from: enough to be recognised by, and no list or table."""
SEED = 1


@dataclass(frozen=True, slots=True)
class Comparison:
    """Mean reciprocal ranks of the known documents; the gain lies in [low, high] with 95% confidence."""

    num_questions: int
    live: float
    candidate: float
    low: float
    high: float

    @property
    def is_loss(self) -> bool:
        """The whole interval is below 0."""
        return self.high < 0


def make_question(document_id: str, text: str) -> str | None:
    """Take half of the words of one sentence, the same ones each time; None when no sentence suits."""
    chance = random.Random(f"{SEED} {document_id}")
    words = [one for one in map(str.split, sentences(text)) if MIN_WORDS <= len(one) <= MAX_WORDS]
    if not words:
        return None
    sentence = chance.choice(words)
    kept = sorted(chance.sample(range(len(sentence)), len(sentence) // 2))
    return " ".join(sentence[place] for place in kept)


def sample(document_ids: Sequence[str]) -> list[str]:
    """Choose the documents to make questions from, the same ones each time."""
    return random.Random(SEED).sample(sorted(document_ids), min(len(document_ids), MAX_QUESTIONS))


def reciprocal_rank(found: Sequence[str], wanted: str) -> float:
    """Give 1 / rank of a document among those found, 0 when it is not among them."""
    return 1 / (found.index(wanted) + 1) if wanted in found else 0.0


def compare(live: Sequence[float], candidate: Sequence[float]) -> Comparison:
    """Compare reciprocal ranks of the same questions by a paired bootstrap over the questions."""
    if not live:
        return Comparison(0, 0.0, 0.0, 0.0, 0.0)
    gains = [after - before for before, after in zip(live, candidate, strict=True)]
    # Of one question nothing can be said.
    low, high = interval(gains) if len(gains) > 1 else (min(gains[0], 0.0), max(gains[0], 0.0))
    return Comparison(len(gains), fmean(live), fmean(candidate), low, high)
