"""One run: the documents of a set into a service, its questions asked, and the report."""

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

from app.client import Client, Record, patiently, send_documents
from app.errors import AccessDenied, CleaveError, InvalidRequest, NotFound, RateLimited, Unavailable
from app.evaluation.measures import Measures, means, measure_answer, measure_rankings, percentiles
from app.evaluation.sets import EvaluationSet, Question

RANKING_LENGTH = 10
"""Documents that are scored; the deepest measure is nDCG@10."""
MAX_TOP_K = 50
"""The most passages that a service gives at once: several may be of one document."""

NO_ANSWER: Record = {"grounded": "failed", "sources": [], "cited": [], "degraded": [], "timings_ms": {}}
"""What stands in the report for an answer that did not come."""

Advance: TypeAlias = Callable[[int], None]
"""Is told how many more are done."""


@dataclass(slots=True)
class Asked:
    """What became of one question."""

    id: str
    text: str
    is_answerable: bool
    metrics: Measures = field(default_factory=dict)
    ranking: Sequence[str] = ()
    """Ids of the documents found, best first."""
    timings_ms: dict[str, float] = field(default_factory=dict)
    answer: Record | None = None
    """The text with what the service says of it, if it was asked for one."""


@dataclass(frozen=True, slots=True)
class Report:
    """What was measured, of what, with which settings."""

    name: str
    settings: Mapping[str, Any]
    asked: Sequence[Asked]
    warnings: Sequence[str]
    num_documents: int

    @property
    def metrics(self) -> Measures:
        """Average over the questions."""
        return means(one.metrics for one in self.asked)

    @property
    def latency_ms(self) -> dict[str, dict[str, float]]:
        """Give p50 and p95 per stage."""
        return percentiles(one.timings_ms for one in self.asked)

    @property
    def outcomes(self) -> dict[str, dict[str, int]]:
        """Count how answers came about, and what they had to do without."""
        answers = [one.answer for one in self.asked if one.answer]
        return {
            "grounded": dict(Counter(answer["grounded"] for answer in answers)),
            "degraded": dict(Counter(reason for answer in answers for reason in answer["degraded"])),
        }

    def to_json(self) -> Record:
        """Give everything under the names that scripts and a later comparison read."""
        num_answerable = sum(one.is_answerable for one in self.asked)
        return {
            "set": self.name,
            "metrics": self.metrics,
            "latency_ms": self.latency_ms,
            "settings": dict(self.settings),
            "counts": {
                "documents": self.num_documents,
                "questions": num_answerable,
                "unanswerable": len(self.asked) - num_answerable,
                "warnings": len(self.warnings),
            },
            "outcomes": self.outcomes,
            "warnings": list(self.warnings),
            "per_query": [asdict(one) for one in self.asked],
        }


async def ingest(client: Client, evaluation_set: EvaluationSet, advance: Advance) -> list[str]:
    """Fill the collection with exactly the set's documents; one that fails is named in the warnings returned.

    Raises:
        InvalidRequest: all of them failed.
    """
    warnings: list[str] = []
    with contextlib.suppress(NotFound):  # The first document creates the collection.
        for document_id in [one["id"] async for one in client.documents()]:
            if document_id not in evaluation_set.document_ids:
                await client.delete(document_id)
    async for receipts in send_documents(client, evaluation_set.documents()):
        failed = [receipt for receipt in receipts if receipt["status"] == "failed"]
        warnings += [f"document {one['document_id']} was not taken in: {one['error']}" for one in failed]
        advance(len(receipts))
    if len(warnings) == len(evaluation_set.document_ids):
        raise InvalidRequest(f"No document of the set could be taken in; {warnings[0]}")
    return warnings


async def search(client: Client, evaluation_set: EvaluationSet, advance: Advance) -> tuple[list[Asked], list[str]]:
    """Search for each answerable question and score the documents found. Raises when every search fails."""
    warnings: list[str] = []
    asked = []
    for question in evaluation_set.questions:
        one = Asked(question.id, question.text, is_answerable=True)
        try:
            one.ranking, one.timings_ms = await _search(client, question)
        except (Unavailable, AccessDenied, RateLimited):
            raise
        except CleaveError as error:
            warnings.append(f"question {question.id} failed, which counts as nothing found: {error.message}")
            if len(warnings) == len(evaluation_set.questions):
                raise
        asked.append(one)
        advance(1)
    measured = measure_rankings(evaluation_set.judgements, {one.id: one.ranking for one in asked})
    for one in asked:
        one.metrics = measured[one.id]
    return asked, warnings


async def answer(client: Client, evaluation_set: EvaluationSet, asked: list[Asked], advance: Advance) -> list[str]:
    """Ask for answers and score them; the unanswerable questions, asked here only, are added to `asked`."""
    warnings: list[str] = []
    asked += [Asked(one.id, one.text, is_answerable=False) for one in evaluation_set.unanswerable]
    for question, one in zip((*evaluation_set.questions, *evaluation_set.unanswerable), asked, strict=True):
        relevant = evaluation_set.judgements[question.id] if one.is_answerable else None
        try:
            text, rag = await _answer(client, question)
        except (Unavailable, AccessDenied, RateLimited):
            raise
        except CleaveError as error:
            warnings.append(f"question {question.id} got no answer, which counts as a wrong one: {error.message}")
            text, rag = "", NO_ANSWER
        one.metrics |= measure_answer(question, text, rag, relevant)
        one.timings_ms |= {f"answer.{stage}": duration for stage, duration in rag["timings_ms"].items()}
        one.answer = {"text": text, **{key: rag[key] for key in ("grounded", "degraded", "cited")}}
        advance(1)
    return warnings


async def _answer(client: Client, question: Question) -> tuple[str, Record]:
    completion = await patiently(lambda: client.chat(question.text, history=question.history, filters=question.filters))
    return completion["choices"][0]["message"]["content"], completion["rag"]


async def _search(client: Client, question: Question) -> tuple[list[str], dict[str, float]]:
    started = time.perf_counter()
    found = await patiently(
        lambda: client.search(question.text, history=question.history, top_k=MAX_TOP_K, filters=question.filters)
    )
    total_ms = round((time.perf_counter() - started) * 1000, 1)
    return documents_of(found)[:RANKING_LENGTH], {**found["timings_ms"], "total": total_ms}


def documents_of(found: Record) -> list[str]:
    """Rank the documents of a search, each by its best passage, also one that holds the same text as it."""
    return list(dict.fromkeys(id for source in found["data"] for id in (source["document_id"], *source["also_in"])))
