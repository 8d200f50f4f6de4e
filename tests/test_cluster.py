"""Several nodes: each tier lands where it belongs, and the service outlives the loss of a node."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.dashboard import waiting_in_cluster
from tests.running_cluster import Load, RunningCluster, ask, running_cluster, write_cluster_config
from tests.running_service import free_port

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1500)]

PROPER = {200, 429, 503, 504}


@pytest.fixture(scope="module")
def cluster() -> Iterator[RunningCluster]:
    with running_cluster({"num_cpus": 1}, {"num_cpus": 1}) as found:
        yield found


@pytest.fixture(scope="module")
def gpu_node(cluster: RunningCluster) -> Any:
    return cluster.add(num_cpus=1, num_gpus=1)


@pytest.fixture(scope="module")
def port() -> int:
    """Serve keeps its first port for as long as it runs."""
    return free_port()


@pytest.mark.parametrize("topology", ["monolith", "two_tier", "three_tier"])
def test_the_llm_takes_the_gpu_node_and_the_rest_stays_off_it(
    cluster: RunningCluster, gpu_node: Any, port: int, tmp_path: Path, topology: str
) -> None:
    cluster.deploy(write_cluster_config(tmp_path, topology, port=port))
    holds_the_llm = "Ingress" if topology == "monolith" else "LLM"
    cluster.wait_until(lambda: cluster.status() == "RUNNING" and holds_the_llm in cluster.deployments())
    cluster.wait_until_running()
    for deployment in cluster.deployments():
        nodes = set(cluster.replicas(deployment).values())
        assert (nodes == {gpu_node.node_id}) == (deployment == holds_the_llm), (deployment, nodes)
    status, completion = ask(cluster.url)
    assert status == 200
    assert "52 minutes" in completion["choices"][0]["message"]["content"]


def test_without_its_gpu_node_the_service_quotes_says_why_and_recovers(
    cluster: RunningCluster, gpu_node: Any, port: int, tmp_path: Path
) -> None:
    cluster.deploy(write_cluster_config(tmp_path, "three_tier", port=port))
    cluster.wait_until(lambda: set(cluster.deployments()) == {"Ingress", "Retriever", "Batches", "LLM"})
    cluster.wait_until_running()
    before = {name: cluster.replicas(name) for name in ("Ingress", "Retriever")}
    with Load(cluster.url) as load:
        cluster.remove(gpu_node)
        cluster.wait_until(lambda: "no node has as much" in cluster.parts()["llm"].get("error", ""))
        why = cluster.parts()["llm"]["error"]
        assert "LLM asks for 0.4 CPU, 1 GPU per replica" in why
        assert "Nodes: " in why
        waiting = waiting_in_cluster(cluster.dashboard)
        assert waiting
        assert waiting[0] in why
        cluster.add(num_cpus=1, num_gpus=1)
        cluster.wait_until(lambda: cluster.parts()["llm"]["status"] == "ok")
        cluster.wait_until(lambda: load.last.get("rag", {}).get("degraded") == [])
    assert set(load.statuses) == {200}
    degraded = {reason for _, completion in load.answers for reason in completion["rag"]["degraded"]}
    assert degraded == {"llm_unavailable"}
    assert {name: cluster.replicas(name) for name in before} == before


def test_after_the_loss_of_a_cpu_node_the_business_side_moves_to_another(cluster: RunningCluster) -> None:
    """Runs on what the test before left."""
    lost = set(cluster.replicas("Ingress").values()) | set(cluster.replicas("Retriever").values())
    if len(lost) == 2:  # Both CPU nodes are in use: bring one more, for both to move to.
        cluster.add(num_cpus=1)
    with Load(cluster.url) as load:
        for node in cluster.nodes():
            if node.node_id in lost:
                cluster.remove(node)
        cluster.wait_until(lambda: not (lost & set(cluster.replicas("Ingress").values())))
        cluster.wait_until(lambda: cluster.replicas("Ingress") and cluster.replicas("Retriever"))
        cluster.wait_until(lambda: "choices" in load.last)
    assert set(load.statuses) <= PROPER, load.statuses
    assert all("error" in body for status, body in load.answers if status != 200), load.answers


def test_a_tier_that_finds_no_node_is_named_before_anything_answers(
    cluster: RunningCluster, port: int, tmp_path: Path
) -> None:
    config = write_cluster_config(
        tmp_path,
        "three_tier",
        port=port,
        deployments=[{"name": "Retriever", "ray_actor_options": {"num_cpus": 64}}],
    )
    cluster.deploy(config)

    def named() -> bool:
        waiting = waiting_in_cluster(cluster.dashboard) or []
        return any("Retriever asks for 64 CPU" in why and "no node has as much" in why for why in waiting)

    cluster.wait_until(named)

    def refusal() -> dict[str, Any]:
        response = httpx.post(f"{cluster.url}/v1/search", json={"query": "x"}, trust_env=False, timeout=60)
        return response.json()["error"] if response.status_code == 503 else {}

    # The old replica may still be draining.
    cluster.wait_until(lambda: "Retriever asks for 64 CPU" in refusal().get("message", ""))
    assert refusal()["code"] == "retriever_unavailable"
