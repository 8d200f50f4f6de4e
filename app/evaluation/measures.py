"""The figures: what is measured of one ranking and of one answer, and the means over a set."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from app.chat import REFUSAL
from app.chunking import sentences
from app.citations import MARKER, without_markers
from app.domain import Passage
from app.evaluation.sets import MAX_RELEVANCE, Judgements, Question
from app.grounding import is_supported

Measures = dict[str, float]
"""Values of one question by the name of the measure; a measure that does not apply to it is missing."""
PERCENTILES = (50, 95)


def measure_rankings(judgements: Judgements, rankings: Mapping[str, Sequence[str]]) -> dict[str, Measures]:
    """Score the document ids that were found for each question, best first, by trec_eval."""
    from ir_measures import RR, R, Success, iter_calc, nDCG

    # Exponential gain: a document of relevance 4 is worth fifteen of relevance 1, not four.
    gains = {relevance: 2**relevance - 1 for relevance in range(MAX_RELEVANCE + 1)}
    names = {R @ 5: "recall@5", R @ 10: "recall@10", Success @ 5: "hit@5", RR @ 10: "mrr@10"}
    names[nDCG(gains=gains) @ 10] = "ndcg@10"
    # It orders by score and knows no ranks. Ranks have no ties, which it would break by document id.
    run = {id: {found: -float(rank) for rank, found in enumerate(ranking)} for id, ranking in rankings.items()}
    measured: dict[str, Measures] = {id: dict.fromkeys(names.values(), 0.0) for id in rankings}
    for metric in iter_calc(list(names), {id: dict(judgements[id]) for id in rankings}, run):
        measured[metric.query_id][names[metric.measure]] = metric.value
    return measured


def measure_answer(
    question: Question, text: str, rag: Mapping[str, Any], relevant: Mapping[str, int] | None
) -> Measures:
    """Score one answer with what the service says of it. `relevant` are its judgements; None: it must be refused."""
    is_refused = rag["grounded"] == "refused" or text.startswith(REFUSAL)
    measures = {"refused": float(is_refused)}
    if relevant is not None:
        measures = {"answered": float(bool(text) and not is_refused)}
        if question.gold_answers:
            measures |= _compare("" if is_refused else without_markers(text), question.gold_answers)
    return measures | _measure_citations(question, text, rag, relevant)


def _compare(said: str, gold_answers: Sequence[str]) -> Measures:
    return {
        "answer_contained": float(any(_contains(said, gold) for gold in gold_answers)),
        "token_f1": max(_token_f1(said, gold) for gold in gold_answers),
    }


def _measure_citations(
    question: Question, text: str, rag: Mapping[str, Any], relevant: Mapping[str, int] | None
) -> Measures:
    measures = {}
    sources = {source["n"]: source for source in rag["sources"]}
    cited = {sources[n]["document_id"] for n in rag["cited"]}
    if supported := [_is_supported(statement, question.text, sources, ns) for statement, ns in _cited_statements(text)]:
        measures["citation_precision"] = float(np.mean(supported))
    if cited and relevant is not None:
        measures["citation_relevance"] = sum(relevant.get(id, 0) > 0 for id in cited) / len(cited)
    if question.must_not_cite:
        measures["forbidden_citation"] = float(not question.must_not_cite.isdisjoint(cited))
    return measures


def means(measured: Iterable[Measures]) -> Measures:
    """Average each measure over the questions that have it; `balanced_accuracy` weighs both kinds of question alike."""
    values: dict[str, list[float]] = {}
    for measures in measured:
        for name, value in measures.items():
            values.setdefault(name, []).append(value)
    averages = {name: float(np.mean(found)) for name, found in values.items()}
    if "answered" in averages and "refused" in averages:
        averages["balanced_accuracy"] = (averages["answered"] + averages["refused"]) / 2
    return averages


def percentiles(timings_ms: Iterable[Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Give p50 and p95 of each stage, in milliseconds, over the questions that went through it."""
    stages: dict[str, list[float]] = {}
    for timings in timings_ms:
        for stage, duration in timings.items():
            stages.setdefault(stage, []).append(duration)
    return {
        stage: {f"p{one}": round(float(np.percentile(durations, one)), 1) for one in PERCENTILES}
        for stage, durations in stages.items()
    }


# --- One answer ------------------------------------------------------------------------------------------------------

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_PUNCTUATION = re.compile(r"[^\w\s]|_")
_MARKERS = re.compile(rf"(?:{MARKER.pattern}\s*)+")
_QUOTATION_MARKS = '\u201c\u201d" '


def _words(text: str) -> list[str]:
    """Normalise as SQuAD's own evaluation does: no case, punctuation and articles. Typographic quotes go too."""
    return _ARTICLES.sub(" ", _PUNCTUATION.sub("", text.lower())).split()


def _contains(text: str, gold: str) -> bool:
    wanted = _words(gold)
    return bool(wanted) and f" {' '.join(wanted)} " in f" {' '.join(_words(text))} "


def _token_f1(text: str, gold: str) -> float:
    said, wanted = _words(text), _words(gold)
    num_shared = (Counter(said) & Counter(wanted)).total()
    return 2 * num_shared / (len(said) + len(wanted)) if num_shared else 0.0


def _cited_statements(text: str) -> list[tuple[str, set[int]]]:
    """Give each sentence that stands before markers, with the sources that they name."""
    statements = []
    position = 0
    for markers in _MARKERS.finditer(text):
        before = sentences(text[position : markers.start()])
        numbers = {int(number) for number in re.findall(r"\d+", markers[0])}
        if before:
            statements.append((before[-1].strip(_QUOTATION_MARKS), numbers))
        position = markers.end()
    return statements


def _is_supported(statement: str, question: str, sources: Mapping[int, Mapping[str, Any]], cited: set[int]) -> bool:
    passages = [_passage(sources[n]) for n in cited if n in sources]
    return bool(passages) and is_supported(statement, question, passages)


def _passage(source: Mapping[str, Any]) -> Passage:
    return Passage(
        **{key: source[key] for key in ("chunk_id", "document_id", "title", "url", "metadata", "text", "score")}
    )
