"""Ask a running service the questions of an evaluation set, and count the answers that hold a gold answer.

cleave ingest DIR/corpus.jsonl
python benchmarks/answers.py DIR --limit 200 --json out.json
"""

import argparse
import asyncio
import json
import statistics
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx


def questions(folder: Path, limit: int) -> list[dict[str, Any]]:
    """Take evenly spaced questions that have a gold answer."""
    lines = (folder / "queries.jsonl").read_text(encoding="utf-8").splitlines()
    answerable = [query for query in map(json.loads, lines) if query.get("answer")]
    step = max(1, len(answerable) // limit)
    return answerable[::step][:limit]


async def ask(client: httpx.AsyncClient, question: str) -> dict[str, Any]:
    """Ask one question; the answer comes with the seconds it took."""
    started = time.perf_counter()
    body = {"messages": [{"role": "user", "content": question}]}
    response = await client.post("/v1/chat/completions", json=body)
    response.raise_for_status()
    return {**response.json(), "seconds": time.perf_counter() - started}


def holds_gold(answer: str, query: dict[str, Any]) -> bool:
    """Tell whether one of the gold answers stands in the answer, letter case aside."""
    return any(gold.casefold() in answer.casefold() for gold in query.get("answers", [query["answer"]]))


async def main() -> None:
    """Run, print a line per outcome, and write the details."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    queries = questions(options.folder, options.limit)
    slots = asyncio.Semaphore(options.concurrency)

    async def one(client: httpx.AsyncClient, query: dict[str, Any]) -> dict[str, Any]:
        async with slots:
            completion = await ask(client, query["text"])
        text = completion["choices"][0]["message"]["content"]
        return {
            "question": query["text"],
            "answer": text,
            "gold": query["answer"],
            "correct": holds_gold(text, query),
            "grounded": completion["rag"]["grounded"],
            "seconds": completion["seconds"],
            "timings_ms": completion["rag"]["timings_ms"],
        }

    async with httpx.AsyncClient(base_url=options.url, timeout=120, trust_env=False) as client:
        results = await asyncio.gather(*(one(client, query) for query in queries))
    correct = sum(result["correct"] for result in results)
    print(f"{correct} of {len(results)} answers hold a gold answer: {correct / len(results):.1%}")
    outcomes = Counter(result["grounded"] for result in results)
    for outcome, count in outcomes.most_common():
        right = sum(result["correct"] for result in results if result["grounded"] == outcome)
        print(f"  {outcome:10} {count:4}  of which correct {right:4} ({right / count:.1%})")
    print(f"seconds per answer: median {statistics.median(result['seconds'] for result in results):.2f}")
    print(f"words per answer: mean {statistics.mean(len(result['answer'].split()) for result in results):.1f}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    asyncio.run(main())
