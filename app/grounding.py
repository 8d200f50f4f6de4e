"""Grounding: which sentences of an answer the passages support, and which of their sentences to quote instead.

Measured on SQuAD questions with the bundled 135M model (hybrid retrieval, three passages): the model's own text holds
the answer in 33% of cases; the quotes that `choose_quotes` takes, under two sentences on average, in 82%.
"""

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from app.citations import without_markers
from app.domain import Passage

LEXICAL_WEIGHT = 0.5
"""Weight of question-word coverage beside the cosine; 0.3 to 0.8 measured alike, 0 was 8 points worse."""
RANK_PENALTY = 0.05
"""Per place of the passage: a tie goes to the passage that retrieval put first."""
QUOTE_MARGIN = 0.2
"""A sentence this near to the best one is quoted too; wider margins only lengthened the answer."""
MAX_QUOTES = 3
MIN_COVERAGE = 0.8
"""Share of a sentence's new words that one passage sentence must hold to support it."""
MIN_COVERAGE_OF_PASSAGE = 0.6
"""The same against a whole passage, for models that draw sentences together."""

STOP_WORDS = frozenset(
    """
    a about after all also an and any are as at be been before being between both but by can could did do does during
    each for from had has have he her his how i if in into is it its many may more most much no not of on one only or
    other our out over she should so some such than that the their them then there these they this those through to
    under up use used using was we were what when where which while who whom whose why will with would you your
    """.split()
)
STEM_LENGTH = 6
"""Words are compared by their first letters: enough to match inflections without a stemmer per language."""

_WORD = re.compile(r"[^\W_]+(?:[.,]\d+)*")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_NAME = re.compile(r"(?<=\s)[A-Z][\w-]+")


@dataclass(frozen=True, slots=True)
class Evidence:
    """A passage sentence, scored for the question. `n` is its passage's number in the answer, from 1."""

    text: str
    n: int
    score: float


def rank_evidence(question: str, passages: Sequence[Passage]) -> list[Evidence]:
    """Order the sentences of the passages by how well they answer: cosine plus weighted coverage of question words.

    A question word weighs more the fewer candidate sentences hold it (the IDF of BM25, over the candidates).
    """
    asked = stems_of(question)
    candidates = [
        (n, place, sentence)
        for n, place, passage in _numbered(passages)
        for sentence in passage.sentences
        if stems_of(sentence.text) - asked  # A sentence that only repeats the question answers nothing.
    ]
    about = [stems_of(description_of(passage)) for passage in passages]
    stems = [stems_of(sentence.text) | about[place] for _, place, sentence in candidates]
    weights = {word: _idf(sum(word in held for held in stems), len(stems)) for word in asked}
    total = sum(weights.values()) or 1.0
    evidence = [
        Evidence(
            sentence.text,
            n,
            sentence.score
            + LEXICAL_WEIGHT * sum(weight for word, weight in weights.items() if word in held) / total
            - RANK_PENALTY * place,
        )
        for (n, place, sentence), held in zip(candidates, stems, strict=True)
    ]
    return sorted(evidence, key=lambda one: -one.score)


def choose_quotes(evidence: Sequence[Evidence]) -> list[Evidence]:
    """Take the best sentence and those close behind it, at most `MAX_QUOTES`; equal texts once."""
    chosen: list[Evidence] = []
    for one in evidence:
        if len(chosen) == MAX_QUOTES or one.score < evidence[0].score - QUOTE_MARGIN:
            break
        if all(one.text != other.text for other in chosen):
            chosen.append(one)
    return chosen


def quote(evidence: Evidence) -> str:
    """Write a sentence as a quotation with its marker; a marker of the source's own would name another passage."""
    return f"\u201c{without_markers(evidence.text)}\u201d [{evidence.n}]"


def supporting_evidence(sentence: str, question: str, evidence: Collection[Evidence]) -> Evidence | None:
    """Find the sentence that says what `sentence` says, or None.

    It must hold every number and name of `sentence` and most of the words that the question does not; a sentence
    that adds nothing to the question answers nothing and has no support.
    """
    new_words = stems_of(sentence) - stems_of(question)
    if not new_words:
        return None
    supporting = [one for one in evidence if _supports(one.text, sentence, question, new_words, MIN_COVERAGE)]
    return max(supporting, key=lambda one: len(new_words & stems_of(one.text)), default=None)


def is_supported(sentence: str, question: str, passages: Collection[Passage]) -> bool:
    """Tell whether some passage as a whole holds the numbers, the names and most of the new words of `sentence`."""
    new_words = stems_of(sentence) - stems_of(question)
    return not new_words or any(
        _supports(f"{passage.title} {passage.text}", sentence, question, new_words, MIN_COVERAGE_OF_PASSAGE)
        for passage in passages
    )


def _supports(source: str, sentence: str, question: str, new_words: set[str], min_coverage: float) -> bool:
    if not set(_NUMBER.findall(sentence)) <= set(_NUMBER.findall(source)) | set(_NUMBER.findall(question)):
        return False
    known = source.casefold() + " " + question.casefold()
    if any(name.casefold() not in known for name in _NAME.findall(sentence)):
        return False
    return len(new_words & stems_of(source)) >= min_coverage * len(new_words)


def _numbered(passages: Sequence[Passage]) -> list[tuple[int, int, Passage]]:
    return [(place + 1, place, passage) for place, passage in enumerate(passages)]


def description_of(passage: Passage) -> str:
    """Say what every sentence of a passage is also about: who wrote it, and under which title."""
    return " ".join([passage.title, *(str(value) for value in passage.metadata.values())])


def stems_of(text: str) -> set[str]:
    """Give the content words of a text, cut to what their inflections share."""
    words = (word.casefold() for word in _WORD.findall(text))
    return {word[:STEM_LENGTH] for word in words if word not in STOP_WORDS}


def _idf(num_holding: int, num_sentences: int) -> float:
    return math.log(1 + (num_sentences - num_holding + 0.5) / (num_holding + 0.5))
