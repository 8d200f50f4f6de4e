"""Each tier grows by its own signal and shrinks again; the LLM by what saturates its engine."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from deployments.scaling import engine_load
from tests.qdrant_peer import qdrant_peer
from tests.running_cluster import QUESTION, RunningCluster, running_cluster, write_cluster_config
from tests.tiny_models import make_model

DEPLOYMENT = DeploymentID("LLM", "cleave")


def context(*replicas: dict[str, float], queued: float = 0, requests: float = 0, target: float = 40) -> Any:
    """What Serve tells a policy: the metrics of each replica, and the requests that wait in front of the tier."""
    ids = [ReplicaID(str(n), DEPLOYMENT) for n in range(len(replicas))]
    names = {name for replica in replicas for name in replica}
    metrics = {
        name: {one: replica[name] for one, replica in zip(ids, replicas, strict=True) if name in replica}
        for name in names
    }
    return AutoscalingContext(
        deployment_id=DEPLOYMENT,
        deployment_name="LLM",
        app_name="cleave",
        current_num_replicas=len(replicas),
        target_num_replicas=len(replicas),
        running_replicas=ids,
        total_num_requests=requests,
        total_queued_requests=queued,
        aggregated_metrics=metrics,
        raw_metrics={},
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=9,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=None,
        config=AutoscalingConfig(min_replicas=0, max_replicas=9, target_ongoing_requests=target),
    )


def engine(num_running: float, usage: float = 0.0, max_num_seqs: float = 32) -> dict[str, float]:
    return {"num_running": num_running, "max_num_seqs": max_num_seqs, "kv_cache_usage": usage}


@pytest.mark.parametrize(
    ("replicas", "queued", "wanted"),
    [
        ([engine(0)], 0, 0),
        ([engine(1)], 0, 1),
        ([engine(22)], 0, 1),
        ([engine(23)], 0, 2),
        ([engine(64)], 0, 3),
        ([engine(64)], 32, 5),
        ([engine(3, usage=0.95)], 0, 2),
        ([engine(20), engine(20)], 0, 2),
        ([engine(4), engine(4)], 0, 1),
        ([engine(2, usage=0.8), engine(2, usage=0.9)], 0, 3),
    ],
)
def test_the_llm_tier_grows_by_requests_in_the_engine_and_by_its_cache(
    replicas: list[dict[str, float]], queued: float, wanted: int
) -> None:
    assert engine_load(context(*replicas, queued=queued))[0] == wanted


def test_an_engine_that_cannot_tell_its_load_is_scaled_on_counts() -> None:
    assert engine_load(context(engine(9, max_num_seqs=0), requests=9, target=4))[0] == pytest.approx(2.25)
    assert engine_load(context({}, requests=8, target=4))[0] == 2


# --- Live ------------------------------------------------------------------------------------------------------------

QUICKLY = {"look_back_period_s": 2, "upscale_delay_s": 0.5, "downscale_delay_s": 2}
ONE = {"Ingress": 1, "Retriever": 1, "LLM": 1}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningCluster]:
    """Every tier may grow to two; the retrievers share one store, and the engine computes two requests at once."""
    folder = tmp_path_factory.mktemp("scaling")
    model = make_model(folder / "alpha", says="alpha")
    grows = {"min_replicas": 1, "max_replicas": 2, **QUICKLY}
    policy = {"policy_function": "deployments.scaling:engine_load"}
    with qdrant_peer() as store, running_cluster({"num_cpus": 4}) as found:
        config = write_cluster_config(
            folder,
            "three_tier",
            args={
                "store": {"kind": "server", "url": store},
                "llm": {"device": "cpu", "model": str(model), "max_num_seqs": 2, "num_threads": 1},
            },
            deployments=[
                {
                    "name": "Ingress",
                    "max_ongoing_requests": 64,
                    "autoscaling_config": {**grows, "target_ongoing_requests": 12},
                },
                {
                    "name": "Retriever",
                    "max_ongoing_requests": 16,
                    "autoscaling_config": {**grows, "target_ongoing_requests": 3},
                },
                {"name": "LLM", "max_ongoing_requests": 64, "autoscaling_config": {**grows, "policy": policy}},
            ],
        )
        found.deploy(config)
        found.wait_until_running()
        found.wait_until(lambda: found.parts()["llm"]["status"] == "ok")
        yield found


def num_replicas(cluster: RunningCluster) -> dict[str, int]:
    return {name: len(cluster.replicas(name)) for name in ONE}


async def generation(client: httpx.AsyncClient, model: str) -> httpx.Response:
    messages = [{"role": "user", "content": "alpha"}]
    # Patient: whether an answer is made in time is not the question here.
    body = {"model": model, "messages": messages, "max_tokens": 800, "rag": {"timeout_s": 300}}
    return await client.post("/v1/chat/completions", json=body)


async def search(client: httpx.AsyncClient, _: str) -> httpx.Response:
    return await client.post("/v1/search", json={"query": QUESTION, "top_k": 20})


async def slow_upload(client: httpx.AsyncClient, _: str) -> httpx.Response:
    async def body() -> AsyncIterator[bytes]:
        yield b'{"documents": [{"id": "note", "title": "Note", "text": "'
        for _ in range(10):
            await asyncio.sleep(0.6)  # This is the load: a connection that stays open.
            yield b"A line. "
        yield b'"}]}'

    return await client.post("/v1/documents", content=body(), headers={"Content-Type": "application/json"})


@contextlib.asynccontextmanager
async def burst(cluster: RunningCluster, ask: Any, num_clients: int) -> AsyncIterator[list[int]]:
    """Keep so many clients asking; what is given collects the statuses."""
    statuses: list[int] = []

    async def client() -> None:
        async with httpx.AsyncClient(base_url=cluster.url, timeout=400, trust_env=False) as http:
            model = (await http.get("/v1/models")).json()["data"][-1]["id"]
            while True:
                statuses.append((await ask(http, model)).status_code)

    clients = [asyncio.create_task(client()) for _ in range(num_clients)]
    try:
        yield statuses
        for one in clients:
            assert not one.done(), one.exception()
    finally:
        for one in clients:
            one.cancel()
        await asyncio.gather(*clients, return_exceptions=True)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("tier", "ask", "num_clients"), [("LLM", generation, 4), ("Retriever", search, 8), ("Ingress", slow_upload, 20)]
)
async def test_a_burst_makes_its_tier_grow_and_shrink_and_leaves_the_others(
    cluster: RunningCluster, tier: str, ask: Any, num_clients: int
) -> None:
    await asyncio.to_thread(cluster.wait_until, lambda: num_replicas(cluster) == ONE)
    seen = []

    def has_grown() -> bool:
        seen.append(num_replicas(cluster))
        return seen[-1][tier] == 2

    async with burst(cluster, ask, num_clients) as statuses:
        await asyncio.to_thread(cluster.wait_until, has_grown)
        await asyncio.to_thread(cluster.wait_until, lambda: statuses)
    await asyncio.to_thread(cluster.wait_until, lambda: num_replicas(cluster) == ONE)
    assert set(statuses) == {200}
    others = set(ONE) - {tier}
    assert {count[other] for count in seen for other in others} == {1}
