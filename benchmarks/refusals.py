"""Which questions are refused: sets with answerable and unanswerable questions, through retrieval in this process.

python -m benchmarks.refusals DIR... --json benchmarks/results/refusals.json

A DIR holds corpus.jsonl, queries.jsonl and queries_unanswerable.jsonl. Each set is also asked questions of the next
one, which are off topic there. Nothing is generated: a refusal comes before the model is asked. `--data-dir` keeps the
collections, so that the next run need not ingest again.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.answerability import assess
from app.catalog import LocalRetriever
from app.domain import Document, Message, Passage, SearchQuery
from app.grounding import rank_evidence
from app.loaders import iterate_jsonl
from app.planning import plan_query
from app.services import build_retriever
from app.settings import Settings, StoreSettings

DOCUMENTS_PER_CALL = 32
THRESHOLDS = [round(0.30 + 0.025 * step, 3) for step in range(25)]
KINDS = ("answerable", "unanswerable", "off_topic")


@dataclass(frozen=True, slots=True)
class Judged:
    """A question with its scores: the service's, and that of the best sentence alone, for comparison."""

    question: str
    kind: str
    score: float
    best_sentence: float
    reason: str


async def filled(folder: Path, data_dir: Path) -> LocalRetriever:
    """Ingest a corpus into a collection of its own."""
    settings = Settings(data_dir=data_dir, store=StoreSettings(collection=folder.name))
    retriever = await build_retriever(settings)
    with (folder / "corpus.jsonl").open("rb") as file:
        found = iterate_jsonl(file, name="corpus.jsonl", metadata={})
        documents = [one for one in found if isinstance(one, Document)]
    for start in range(0, len(documents), DOCUMENTS_PER_CALL):
        await retriever.ingest(documents[start : start + DOCUMENTS_PER_CALL])
        print(".", end="", flush=True)
    print(f" {folder.name}: {len(documents)} documents", flush=True)
    return retriever


def conversations(folder: Path, name: str, limit: int) -> list[list[Message]]:
    """Take evenly spaced questions, each with the turns before it."""
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    chosen = [json.loads(line) for line in lines[:: max(1, len(lines) // limit)][:limit]]
    return [
        [*(Message(turn["role"], turn["content"]) for turn in one.get("history") or ()), Message("user", one["text"])]
        for one in chosen
    ]


async def judge(retriever: LocalRetriever, messages: Sequence[Message], kind: str, settings: Settings) -> Judged:
    """Ask as the service does, where no model rewrites the question."""
    plan = plan_query(messages)
    query = SearchQuery(
        plan.question,
        settings.retrieval.top_k,
        num_scored=settings.answer.num_passages,
        context=plan.context,
        recognise_filters=settings.planning.recognise_filters,
    )
    return judged(plan.question, kind, (await retriever.search(query)).passages)


def judged(query: str, kind: str, passages: Sequence[Passage]) -> Judged:
    """Score what was found."""
    evidence = rank_evidence(query, passages)
    found = assess(query, passages)
    reason = "off_topic" if found.is_off_topic else "not_in_passages"
    return Judged(query, kind, found.score, evidence[0].score if evidence else -1.0, reason)


def at(threshold: float, scores: dict[str, list[float]]) -> dict[str, float]:
    """Share of answerable questions that are answered, of the others that are refused; and the mean of the two."""
    answered = statistics.fmean(score >= threshold for score in scores["answerable"])
    refused = statistics.fmean(score < threshold for score in scores["unanswerable"])
    found = {"threshold": threshold, "answered": answered, "refused": refused, "balanced": (answered + refused) / 2}
    if scores["off_topic"]:
        found["off_topic_refused"] = statistics.fmean(score < threshold for score in scores["off_topic"])
    return {name: round(value, 4) for name, value in found.items()}


def summary(results: Sequence[Judged], min_evidence: float) -> dict[str, Any]:
    """Sum one set up."""
    of_kind = {kind: [one for one in results if one.kind == kind] for kind in KINDS}
    scores = {kind: [one.score for one in found] for kind, found in of_kind.items()}
    sentences = {kind: [one.best_sentence for one in found] for kind, found in of_kind.items()}
    near = [one.reason == "not_in_passages" for one in of_kind["unanswerable"] if one.score < min_evidence]
    far = [one.reason == "off_topic" for one in of_kind["off_topic"] if one.score < min_evidence]
    return {
        "questions": {kind: len(found) for kind, found in of_kind.items()},
        "chosen": at(min_evidence, scores),
        "called_near_miss": round(statistics.fmean(near), 4) if near else None,
        "called_off_topic": round(statistics.fmean(far), 4) if far else None,
        "curve": [at(threshold, scores) for threshold in THRESHOLDS],
        "best_sentence_alone": [at(threshold, sentences) for threshold in (0.48, *THRESHOLDS)],
    }


async def measure(folders: Sequence[Path], data_dir: Path, limit: int) -> dict[str, Any]:
    """Measure each set by the default settings."""
    settings = Settings()
    report: dict[str, Any] = {"min_evidence": settings.answer.min_evidence, "sets": {}}
    for place, folder in enumerate(folders):
        asked = [(one, "answerable") for one in conversations(folder, "queries", limit)]
        asked += [(one, "unanswerable") for one in conversations(folder, "queries_unanswerable", limit)]
        other = folders[(place + 1) % len(folders)]
        if other != folder:
            asked += [(one, "off_topic") for one in conversations(other, "queries", min(limit, 100))]
        retriever = await filled(folder, data_dir)
        results = [await judge(retriever, messages, kind, settings) for messages, kind in asked]
        await retriever.close()
        report["sets"][folder.name] = found = summary(results, settings.answer.min_evidence)
        print(f"{folder.name:10} {found['chosen']}")
        for row in found["curve"]:
            print(f"{'':10} {row}", flush=True)
    return report


def main() -> None:
    """Run, print the curve of each set, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    parser.add_argument("--limit", type=int, default=1000, help="questions of each kind")
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        report = asyncio.run(measure(options.folders, options.data_dir or Path(scratch), options.limit))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
