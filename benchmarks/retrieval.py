"""What each stage of retrieval gains on evaluation sets, beside the plain methods, and what it costs.

python -m benchmarks.retrieval DIR... --json benchmarks/results/retrieval.json

Each set is ingested once and searched through the API in this process. A stage is switched on after the other, from
one list alone to the default. Milliseconds are those of the default with five passages, as chat asks for them.
"""

import argparse
import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from app.client import Client
from app.evaluation.measures import means, measure_rankings, percentiles
from app.evaluation.run import MAX_TOP_K, RANKING_LENGTH, documents_of, ingest
from app.evaluation.service import in_process
from app.evaluation.sets import EvaluationSet, Question, read_set
from app.settings import Settings
from benchmarks.retrieval_baselines import plain_methods

TOP_K = 5
SHOWN = ("recall@5", "ndcg@10")


@dataclass(frozen=True, slots=True)
class Variant:
    """How questions are asked, beside the default."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    with_history: bool = True


PLAIN = {"recognise_filters": False}
VARIANTS = (
    Variant("chunks, BM25", {"ranking": "bm25", **PLAIN}, with_history=False),
    Variant("chunks, dense", {"ranking": "dense", **PLAIN}, with_history=False),
    Variant("both, fused by score", PLAIN, with_history=False),
    Variant("and the questions before", PLAIN),
    Variant("and authors in the question (the default)"),
)


async def search(client: Client, question: Question, variant: Variant, top_k: int) -> dict[str, Any]:
    """Search for one question."""
    if not variant.with_history:
        question = replace(question, history=())
    return await client.search(
        question.text, history=question.history, top_k=top_k, filters=question.filters, **variant.options
    )


async def measure(evaluation_set: EvaluationSet) -> dict[str, Any]:
    """Give the figures of every variant, and the milliseconds of each stage."""
    figures = {}
    async with in_process(Settings(), evaluation_set.name, with_llm=False, is_kept=False) as target:
        await ingest(target.client, evaluation_set, lambda _: None)
        for variant in VARIANTS:
            rankings = {}
            for question in evaluation_set.questions:
                found = await search(target.client, question, variant, MAX_TOP_K)
                rankings[question.id] = documents_of(found)[:RANKING_LENGTH]
            figures[variant.name] = means(measure_rankings(evaluation_set.judgements, rankings).values())
            print(line(variant.name, figures[variant.name]), flush=True)
        timings = [
            (await search(target.client, question, VARIANTS[-1], TOP_K))["timings_ms"]
            for question in evaluation_set.questions
        ]
    return {"stages": figures, "milliseconds": percentiles(timings)}


def line(name: str, figures: Mapping[str, float]) -> str:
    """Write one row."""
    return f"  {name:42} {' / '.join(f'{figures[one]:.3f}' for one in SHOWN)}"


async def run(folders: Sequence[Path]) -> dict[str, Any]:
    """Measure one set after the other."""
    results = {}
    for folder in folders:
        evaluation_set = read_set(folder)
        print(f"{evaluation_set.name}: recall@5 / nDCG@10", flush=True)
        plain = plain_methods(evaluation_set)
        for name, figures in plain.items():
            print(line(f"whole documents, {name}", figures), flush=True)
        results[evaluation_set.name] = {"plain": plain, **await measure(evaluation_set)}
        print(f"  milliseconds: {json.dumps(results[evaluation_set.name]['milliseconds'])}", flush=True)
    return results


def main() -> None:
    """Print the figures and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = asyncio.run(run(options.folders))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
