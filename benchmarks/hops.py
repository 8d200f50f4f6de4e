"""What the hops between tiers cost: the same requests to each topology, in Ray Serve's default and throughput mode.

python -m benchmarks.hops --json hops.json

The parts are as fast as they can be made, so that the hops are what is left: searches over the sample articles, and
answers of the extractive engine, which streams what retrieval found. Each topology is compared with the monolith of
the same run.
"""

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import Any

import httpx

from benchmarks.service import served

QUESTION = "How long did the Reading Room outage on 14 October 2025 last?"
TOPOLOGIES = ("monolith", "two_tier", "three_tier")
MODES = {
    "default": {},
    "throughput": {"RAY_SERVE_THROUGHPUT_OPTIMIZED": "1", "RAY_SERVE_ENABLE_HA_PROXY": "1"},
}
REQUESTS: dict[str, tuple[str, dict[str, Any]]] = {
    "search": ("/v1/search", {"query": QUESTION}),
    "answer": ("/v1/chat/completions", {"messages": [{"role": "user", "content": QUESTION}]}),
}
CONCURRENCIES = (1, 16)


async def times(url: str, path: str, body: dict[str, Any], *, concurrency: int, num_requests: int) -> dict[str, float]:
    """Send requests with so many clients; give the median in milliseconds and the requests per second."""
    took: list[float] = []
    remaining = iter(range(num_requests))

    async def client(http: httpx.AsyncClient) -> None:
        for _ in remaining:
            started = time.perf_counter()
            (await http.post(path, json=body)).raise_for_status()
            took.append(time.perf_counter() - started)

    async with httpx.AsyncClient(base_url=url, timeout=60, trust_env=False) as http:
        for _ in range(concurrency * 2):
            (await http.post(path, json=body)).raise_for_status()
        started = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(concurrency)))
        elapsed = time.perf_counter() - started
    return {"median_ms": round(statistics.median(took) * 1000, 2), "per_second": round(num_requests / elapsed, 1)}


def measure(topology: str, environment: dict[str, str], num_requests: int) -> dict[str, Any]:
    """Start one topology and run all requests against it."""
    application = {
        "import_path": f"deployments.application:{topology}",
        "args": {"seed": "examples/articles", "llm": {"device": "cpu", "engine": "extractive"}},
    }
    with served(application, environment) as (url, _):
        return {
            f"{name}, {concurrency} at once": asyncio.run(
                times(url, path, body, concurrency=concurrency, num_requests=num_requests)
            )
            for name, (path, body) in REQUESTS.items()
            for concurrency in CONCURRENCIES
        }


def main() -> None:
    """Measure, write the figures, and print a table of them with the ratio to the monolith."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=200)
    options = parser.parse_args()
    found: dict[str, dict[str, Any]] = {}
    for mode, environment in MODES.items():
        for topology in TOPOLOGIES:
            found[f"{mode}, {topology}"] = measure(topology, environment, options.requests)
            print(f"{mode}, {topology}: {json.dumps(found[f'{mode}, {topology}'])}", flush=True)
    options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n| Request | Mode | " + " | ".join(TOPOLOGIES) + " |\n" + "|---" * 5 + "|")
    for request in found["default, monolith"]:
        for mode in MODES:
            base = found[f"{mode}, monolith"][request]["median_ms"]
            medians = [found[f"{mode}, {topology}"][request]["median_ms"] for topology in TOPOLOGIES]
            cells = [f"{median:.1f} ms ({median / base:.2f})" for median in medians]
            print(f"| {request} | {mode} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
