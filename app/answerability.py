"""Answerability: do the passages hold an answer to the question, or are they only about something like it?

The score is a short sum, so that a refusal can be explained. docs/grounding.md says where its weights come from, how
well it tells, and what was tried without gain.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from app.domain import Passage
from app.grounding import description_of, rank_evidence, stems_of

COVERAGE_WEIGHT = 0.2
"""Of the share of the question's content words that the best sentence holds, beside a cosine."""
LACKING_WEIGHT = 0.15
"""Of the share of the question's names and numbers that the best sentence lacks: near misses swap just these."""
MISSING_WEIGHT = 0.1
"""Of the share that no passage holds."""
MISSING_NUMBER_WEIGHT = 0.4
"""Of a number that no passage holds: a question for 2031 is not answered by what happened in 2025. Five times as many
unanswerable questions of SQuAD have one as answerable ones."""
ABOUT_WEIGHT = 0.3
"""Of the share of the question's words that name the passage's author and the like: no text repeats who wrote it, so
that the encoder finds a question which says so less near."""
OFF_TOPIC = 0.4
"""Below this cosine the passages are about something else; above it they come close and still lack the answer."""

_NAME = re.compile(r"(?<=[\w,;:)]\s)\w*[A-Z][\w-]+")
# Of two digits at least, as smaller ones are often written in words.
_NUMBER = re.compile(r"(?<!\w)\d[\d.,:]*\d")


@dataclass(frozen=True, slots=True)
class Answerability:
    """How well the passages answer. `score` is about -0.2 to 1.2, `relevance` a cosine."""

    score: float
    relevance: float
    missing: tuple[str, ...]
    """Names and numbers of the question that no passage holds."""

    @property
    def is_off_topic(self) -> bool:
        """Tell whether the passages are not even about the question."""
        return self.relevance < OFF_TOPIC


def assess(question: str, passages: Sequence[Passage]) -> Answerability:
    """Judge passages whose sentences are scored; without any sentence that adds to the question, nothing answers it."""
    evidence = rank_evidence(question, passages)
    if not evidence:
        return Answerability(-1.0, -1.0, ())
    best = evidence[0]
    sentence = f"{best.text} {description_of(passages[best.n - 1])}"
    asked = stems_of(question)
    about = stems_of(" ".join(map(str, passages[best.n - 1].metadata.values())))
    specifics = [one for one in _specifics(question) if not stems_of(one) <= about]
    lacking = [one for one in specifics if not _holds(sentence, one)]
    missing = [one for one in lacking if not any(_holds(_whole(passage), one) for passage in passages)]
    relevance = _relevance(passages)
    score = (
        relevance
        + COVERAGE_WEIGHT * len(asked & stems_of(sentence)) / max(len(asked), 1)
        + ABOUT_WEIGHT * len(asked & about) / max(len(asked), 1)
        - LACKING_WEIGHT * len(lacking) / max(len(specifics), 1)
        - MISSING_WEIGHT * len(missing) / max(len(specifics), 1)
        - MISSING_NUMBER_WEIGHT * any(map(_NUMBER.fullmatch, missing))
    )
    return Answerability(score, relevance, tuple(missing))


def _relevance(passages: Sequence[Passage]) -> float:
    """Average the best cosine of a sentence, which says it to the point, and of a passage, which has the context."""
    sentence = max(one.score for passage in passages for one in passage.sentences)
    similarities = [passage.similarity for passage in passages if passage.similarity is not None]
    return (sentence + max(similarities, default=sentence)) / 2


def _specifics(question: str) -> list[str]:
    """List what a near miss gets wrong: names, known by a capital inside a sentence, and numbers."""
    return list(dict.fromkeys(_NAME.findall(question) + _NUMBER.findall(question)))


def _holds(text: str, specific: str) -> bool:
    if _NUMBER.fullmatch(specific):
        return specific.replace(",", "") in _NUMBER.findall(text.replace(",", ""))
    return stems_of(specific) <= stems_of(text)


def _whole(passage: Passage) -> str:
    return f"{description_of(passage)} {passage.text}"
