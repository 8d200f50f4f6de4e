"""Load one tier after the other and record how the replicas follow, and what a question takes meanwhile.

python -m benchmarks.autoscale --json autoscale.json --picture docs/autoscale.svg
python -m benchmarks.autoscale --compare --json policies.json

It starts a service of its own with the bundled model on the CPU; the LLM tier may grow to two replicas, and every
delay is short, so that minutes show what takes an hour in production. `--compare` runs the LLM tier under many short
and under few long requests, once with the policy on the engine's load and once with Serve's own on request counts.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.service import served
from tests.qdrant_peer import qdrant_peer

QUESTION = "How long did the Reading Room outage on 14 October 2025 last?"
MODEL = "SmolLM2-135M-Instruct"
TIERS = ("Ingress", "Retriever", "LLM")
SAMPLE_S = 0.5
ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
}
ENGINE_LOAD = {"policy_function": "deployments.scaling:engine_load"}
QUICKLY = {"look_back_period_s": 4, "upscale_delay_s": 2, "downscale_delay_s": 12}


@dataclass
class Recording:
    """What was asked, how many replicas ran, and how long each answer took, in seconds since the start."""

    samples: list[dict[str, Any]] = field(default_factory=list)
    requests: list[dict[str, Any]] = field(default_factory=list)
    phases: list[dict[str, Any]] = field(default_factory=list)
    offered: Counter[str] = field(default_factory=Counter)
    started: float = field(default_factory=time.monotonic)

    def now(self) -> float:
        """Seconds since the start."""
        return round(time.monotonic() - self.started, 2)


Ask = Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]


async def question(client: httpx.AsyncClient) -> httpx.Response:
    """Ask the documents."""
    return await client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": QUESTION}]})


async def generation(client: httpx.AsyncClient) -> httpx.Response:
    """Ask the model alone for a text: work for the LLM tier, next to none for the others."""
    messages = [{"role": "user", "content": "Write a story about a lighthouse."}]
    return await client.post("/v1/chat/completions", json={"model": MODEL, "messages": messages, "max_tokens": 96})


async def long_generation(client: httpx.AsyncClient) -> httpx.Response:
    """Give the model much to read: few of these fill the KV cache."""
    text = f"{time.monotonic()} " + "The lamp of the lighthouse was lit again and the keeper wrote it down. " * 110
    messages = [{"role": "user", "content": f"{text}\nWhat did the keeper do?"}]
    return await client.post("/v1/chat/completions", json={"model": MODEL, "messages": messages, "max_tokens": 48})


async def search(client: httpx.AsyncClient) -> httpx.Response:
    """Search: work for the Retriever."""
    return await client.post("/v1/search", json={"query": f"{QUESTION} {time.monotonic()}", "top_k": 20})


async def slow_upload(client: httpx.AsyncClient) -> httpx.Response:
    """Send a body over seconds, as on a poor line: an open connection for an Ingress, nothing for the others."""

    async def body() -> AsyncIterator[bytes]:
        yield b'{"documents": [{"id": "note", "title": "Note", "text": "'
        for _ in range(20):
            await asyncio.sleep(0.5)
            yield b"A line. "
        yield b'"}]}'

    return await client.post("/v1/documents", content=body(), headers={"Content-Type": "application/json"})


async def sample(recording: Recording, dashboard: httpx.AsyncClient) -> None:
    """Note the running replicas of each tier twice a second."""
    while True:
        with contextlib.suppress(httpx.HTTPError, KeyError):
            found = (await dashboard.get("/api/serve/applications/")).json()["applications"]["cleave"]["deployments"]
            states = {tier: Counter(one["state"] for one in found[tier]["replicas"]) for tier in TIERS}
            recording.samples.append(
                {
                    "t": recording.now(),
                    "replicas": {tier: states[tier]["RUNNING"] for tier in TIERS},
                    "starting": {tier: states[tier]["STARTING"] for tier in TIERS},
                    "offered": dict(recording.offered),
                }
            )
        await asyncio.sleep(SAMPLE_S)


async def client_loop(recording: Recording, url: str, kind: str, ask: Ask, pause_s: float) -> None:
    """Ask again and again; each answer is noted."""
    recording.offered[kind] += 1
    try:
        async with httpx.AsyncClient(base_url=url, timeout=180, trust_env=False) as client:
            while True:
                started, status = recording.now(), 0
                with contextlib.suppress(httpx.HTTPError):  # Noted as status 0.
                    status = (await ask(client)).status_code
                took = round(recording.now() - started, 3)
                recording.requests.append({"kind": kind, "t": started, "took_s": took, "status": status})
                await asyncio.sleep(pause_s)
    finally:
        recording.offered[kind] -= 1


@contextlib.asynccontextmanager
async def load(
    recording: Recording, url: str, kind: str, ask: Ask, num_clients: int, pause_s: float = 0
) -> AsyncIterator[None]:
    """Keep so many clients busy."""
    began = recording.now()
    clients = [asyncio.create_task(client_loop(recording, url, kind, ask, pause_s)) for _ in range(num_clients)]
    try:
        yield
    finally:
        for client in clients:
            client.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        recording.phases.append({"kind": kind, "clients": num_clients, "from": began, "to": recording.now()})


async def record(
    addresses: tuple[str, str], bursts: list[tuple[str, Ask, int, float]], *, rest_s: float, shot: Path | None
) -> Recording:
    """Run the bursts one after the other, each followed by a rest, with one slow questioner all the time."""
    recording = Recording()
    url, dashboard_url = addresses
    async with httpx.AsyncClient(base_url=dashboard_url, timeout=10, trust_env=False) as dashboard:
        sampling = asyncio.create_task(sample(recording, dashboard))
        async with load(recording, url, "question", question, 1, pause_s=1):
            await asyncio.sleep(10)
            for kind, ask, num_clients, burst_s in bursts:
                print(f"{recording.now():5.0f} s  {num_clients} clients: {kind}", flush=True)
                async with load(recording, url, kind, ask, num_clients):
                    await asyncio.sleep(burst_s * 0.8)
                    if shot and kind == "generation":
                        await asyncio.to_thread(take_screenshot, dashboard_url, shot)
                    await asyncio.sleep(burst_s * 0.2)
                await asyncio.sleep(rest_s)
        sampling.cancel()
    return recording


def take_screenshot(dashboard: str, path: Path) -> None:
    """Photograph the dashboard's page of the application as it is now."""
    from playwright.sync_api import sync_playwright

    from tests.system_setup import find_browser

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(f"{dashboard}/#/serve/applications/cleave")
        page.get_by_text("Retriever").first.wait_for()
        page.screenshot(path=path)
        browser.close()


def summary(recording: Recording) -> dict[str, Any]:
    """Sum up per phase: most replicas during it, replicas at the end, and latencies."""
    phases = []
    for phase in [one for one in recording.phases if one["kind"] != "question"]:
        until = min((one["from"] for one in recording.phases if one["from"] > phase["to"]), default=float("inf"))
        seen = [one for one in recording.samples if phase["from"] <= one["t"] < until]
        took = [one["took_s"] for one in recording.requests if one["kind"] == phase["kind"]]
        asked = [one for one in recording.requests if one["kind"] == phase["kind"]]
        phases.append(
            {
                **phase,
                "most_replicas": {tier: max(one["replicas"][tier] for one in seen) for tier in TIERS},
                "replicas_at_the_end": seen[-1]["replicas"],
                "answers": len(took),
                "median_s": statistics.median(took) if took else None,
                "p95_s": statistics.quantiles(took, n=20)[-1] if len(took) > 1 else None,
                "statuses": dict(Counter(one["status"] for one in asked)),
            }
        )
    return {"phases": phases, "statuses": dict(Counter(one["status"] for one in recording.requests))}


def draw(recording: Recording, path: Path) -> None:
    """Draw offered load, replicas and the questioner's latency over time."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "cleave"
    from matplotlib import pyplot

    figure, (offered, replicas, latency) = pyplot.subplots(3, 1, sharex=True, figsize=(9, 7), layout="constrained")
    times = [one["t"] for one in recording.samples]
    for kind in sorted({phase["kind"] for phase in recording.phases} - {"question"}):
        offered.step(times, [one["offered"].get(kind, 0) for one in recording.samples], where="post", label=kind)
    offered.set_ylabel("clients")
    offered.legend(loc="upper right")
    for offset, tier in enumerate(TIERS):
        counts = [one["replicas"][tier] + 0.03 * offset for one in recording.samples]
        replicas.step(times, counts, where="post", label=tier)
    replicas.set_ylabel("running replicas")
    replicas.set_ylim(0, None)
    replicas.legend(loc="upper right")
    asked = [one for one in recording.requests if one["kind"] == "question"]
    latency.scatter([one["t"] for one in asked], [one["took_s"] for one in asked], s=8)
    latency.set_ylabel("seconds per question")
    latency.set_xlabel("seconds")
    figure.savefig(path, metadata={"Date": None})


def application(store_url: str, *, policy: dict[str, Any] | None, target: int, engine_options: Any = None) -> Any:
    """Describe the service: every tier may grow to two replicas."""
    llm_scaling: dict[str, Any] = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": target, **QUICKLY}
    if policy:
        llm_scaling["policy"] = policy
    grows = {"min_replicas": 1, "max_replicas": 2, **QUICKLY}
    return {
        "import_path": "deployments.application:three_tier",
        "args": {
            "seed": "examples/articles",
            "store": {"kind": "server", "url": store_url},
            "embedding": {"num_threads": 1},
            "llm": {
                "device": "cpu",
                "max_num_seqs": 4 if not engine_options else 16,
                "num_threads": 1,
                "engine_options": engine_options or {},
            },
        },
        "deployments": [
            {
                "name": "Ingress",
                "max_ongoing_requests": 64,
                "autoscaling_config": {**grows, "target_ongoing_requests": 24},
            },
            {
                "name": "Retriever",
                "max_ongoing_requests": 16,
                "autoscaling_config": {**grows, "target_ongoing_requests": 4},
            },
            {"name": "LLM", "max_ongoing_requests": 64, "autoscaling_config": llm_scaling},
        ],
    }


def store(url: str | None) -> contextlib.AbstractContextManager[str]:
    """Take the Qdrant server that is named, or start the in-memory one of the tests."""
    return contextlib.nullcontext(url) if url else qdrant_peer()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Record one run over all tiers."""
    bursts: list[tuple[str, Ask, int, float]] = [
        ("generation", generation, 12, 75),
        ("search", search, 10, 35),
        ("slow upload", slow_upload, 40, 35),
    ]
    with (
        store(options.qdrant) as store_url,
        served(application(store_url, policy=ENGINE_LOAD, target=40), ENVIRONMENT) as addresses,
    ):
        recording = asyncio.run(record(addresses, bursts, rest_s=50, shot=options.screenshot))
    if options.picture:
        draw(recording, options.picture)
    found = summary(recording)
    return {**found, "samples": recording.samples, "requests": recording.requests}


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Record both policies under both kinds of load."""
    found = {}
    # Twelve thousand tokens: room for some six of the long requests, while the engine takes sixteen at once.
    small_cache = {"num_gpu_blocks_override": 12_000 // 128, "block_size": 128}
    loads: list[tuple[str, Ask, int, int, Any]] = [
        ("many short", generation, 12, 3, None),
        ("few long", long_generation, 8, 11, small_cache),
    ]
    for name, ask, num_clients, target, engine_options in loads:
        for policy_name, policy in (("engine load", ENGINE_LOAD), ("request counts", None)):
            with store(options.qdrant) as store_url:
                described = application(store_url, policy=policy, target=target, engine_options=engine_options)
                with served(described, ENVIRONMENT) as addresses:
                    recording = asyncio.run(record(addresses, [(name, ask, num_clients, 75)], rest_s=20, shot=None))
            found[f"{name}, {policy_name}"] = summary(recording)["phases"][0]
            print(f"{name}, {policy_name}: {json.dumps(found[f'{name}, {policy_name}'])}", flush=True)
    return found


def main() -> None:
    """Run, and write what was recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--picture", type=Path, help="an SVG of the run")
    parser.add_argument("--screenshot", type=Path, help="a PNG of the Ray dashboard during the first burst")
    parser.add_argument("--qdrant", metavar="URL", help="a Qdrant server; without it one in memory is started")
    parser.add_argument("--compare", action="store_true")
    options = parser.parse_args()
    found = compare(options) if options.compare else measure(options)
    options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if not options.compare:
        print(json.dumps(found["phases"], indent=1))


if __name__ == "__main__":
    main()
