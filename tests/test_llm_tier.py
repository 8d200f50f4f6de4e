"""The LLM tier changes under load: another model, no replica at all. The rest of the service stays as it is."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.running_cluster import QUESTION, Load, RunningCluster, ask, running_cluster, write_cluster_config
from tests.running_service import free_port
from tests.tiny_models import make_model

pytestmark = [pytest.mark.slow, pytest.mark.ray, pytest.mark.timeout(1500)]

PORT = free_port()
NUM_TOKENS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("llm-tier")
    for word in ("alpha", "beta"):
        make_model(found / word, says=word)
    return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[RunningCluster]:
    with running_cluster({"num_cpus": 2}, {"num_cpus": 1, "num_gpus": 1}) as found:
        yield found


def write_config(folder: Path, model: str, *, answer: dict[str, Any] | None = None, **llm_deployment: Any) -> Path:
    """Serve the model that says `model` on a GPU; what it says is not checked, so that it is seen as it is."""
    return write_cluster_config(
        folder,
        "three_tier",
        port=PORT,
        args={
            "llm": {"device": "gpu", "model": str(folder / model)},
            "answer": {"grounding": "off", "max_tokens": NUM_TOKENS, **(answer or {})},
        },
        deployments=[{"name": "LLM", **llm_deployment}] if llm_deployment else [],
    )


def words(completion: dict[str, Any]) -> set[str]:
    return set(completion["choices"][0]["message"]["content"].split()) if "choices" in completion else set()


def business(cluster: RunningCluster) -> dict[str, set[str]]:
    return {name: set(cluster.replicas(name)) for name in ("Ingress", "Retriever")}


def says(cluster: RunningCluster, word: str) -> bool:
    status, completion = ask(cluster.url)
    return status == 200 and words(completion) == {word}


def test_with_one_gpu_a_swap_degrades_and_nothing_fails(cluster: RunningCluster, folder: Path) -> None:
    cluster.deploy(write_config(folder, "alpha"))
    cluster.wait_until(lambda: cluster.answers() and says(cluster, "alpha"))
    before, llm_before = business(cluster), set(cluster.replicas("LLM"))
    with Load(cluster.url, num_clients=4) as load:
        cluster.wait_until(lambda: len(load.answers) > 8)
        cluster.deploy(write_config(folder, "beta"))
        cluster.wait_until(lambda: words(load.last) == {"beta"})
    assert set(load.statuses) == {200}
    assert set(load.degraded) <= {"llm_unavailable"}
    for _, completion in load.answers:
        if not completion["rag"]["degraded"]:
            assert words(completion) in ({"alpha"}, {"beta"})
            assert completion["usage"]["completion_tokens"] == NUM_TOKENS
    assert business(cluster) == before
    assert not llm_before & set(cluster.replicas("LLM"))


def test_with_a_spare_gpu_a_swap_is_not_even_noticed(cluster: RunningCluster, folder: Path) -> None:
    spare = cluster.add(num_cpus=1, num_gpus=1)
    cluster.deploy(write_config(folder, "beta", max_surge_percent=100))
    cluster.wait_until(lambda: says(cluster, "beta"))
    before, llm_before = business(cluster), set(cluster.replicas("LLM"))
    with Load(cluster.url, num_clients=4) as load:
        cluster.deploy(write_config(folder, "alpha", max_surge_percent=100))
        cluster.wait_until(lambda: words(load.last) == {"alpha"})
        cluster.wait_until(lambda: not llm_before & set(cluster.replicas("LLM")))
    assert set(load.statuses) == {200}
    assert not load.degraded
    assert {frozenset(words(completion)) for _, completion in load.answers} == {
        frozenset({"alpha"}),
        frozenset({"beta"}),
    }
    assert business(cluster) == before
    assert set(cluster.replicas("LLM").values()) <= {node.node_id for node in cluster.nodes()}
    assert spare in cluster.nodes()


def test_a_change_of_the_business_side_leaves_the_llm_alone(cluster: RunningCluster, folder: Path) -> None:
    """Runs on what the test before left. A new Ingress starts before the old one ends."""
    llm, before = set(cluster.replicas("LLM")), business(cluster)
    with Load(cluster.url) as load:
        cluster.deploy(write_config(folder, "alpha", answer={"max_tokens": NUM_TOKENS // 2}, max_surge_percent=100))
        cluster.wait_until(lambda: load.last.get("usage", {}).get("completion_tokens") == NUM_TOKENS // 2)
    assert set(load.statuses) == {200}
    assert set(cluster.replicas("LLM")) == llm
    assert set(cluster.replicas("Retriever")) == before["Retriever"]


SCALED_TO_ZERO = {
    "autoscaling_config": {
        "min_replicas": 0,
        "max_replicas": 1,
        "look_back_period_s": 1,
        "downscale_delay_s": 1,
        "policy": {"policy_function": "deployments.scaling:engine_load"},
    }
}


def test_a_tier_scaled_to_zero_quotes_at_once_and_a_request_wakes_it(cluster: RunningCluster, folder: Path) -> None:
    cluster.deploy(write_config(folder, "alpha", **SCALED_TO_ZERO))
    cluster.wait_until_running()
    cluster.wait_until(lambda: cluster.deployments().get("LLM", {}).get("replicas") == [])
    cluster.wait_until(lambda: cluster.parts()["llm"]["status"] == "cold")
    for _ in range(20):  # A monitor is no request.
        assert cluster.parts()["llm"]["status"] == "cold"
    assert not cluster.deployments()["LLM"]["replicas"]

    status, completion = ask(cluster.url)
    assert status == 200
    assert completion["rag"]["degraded"] == ["llm_cold"]
    assert completion["rag"]["grounded"] == "quotes"
    assert "52 minutes" in completion["choices"][0]["message"]["content"]
    assert not cluster.replicas("LLM")

    # It runs for a second or two when nobody asks again; its start is long enough to be seen.
    cluster.wait_until(lambda: bool(cluster.deployments()["LLM"]["replicas"]))
    cluster.wait_until(lambda: says(cluster, "alpha"))
    cluster.wait_until(lambda: cluster.parts()["llm"]["status"] == "cold")


def test_by_configuration_a_cold_tier_answers_503_and_says_when_to_come_back(
    cluster: RunningCluster, folder: Path
) -> None:
    before = business(cluster)["Ingress"]
    cluster.deploy(write_config(folder, "alpha", answer={"without_llm": "error"}, **SCALED_TO_ZERO))
    cluster.wait_until(lambda: bool(cluster.replicas("Ingress")) and not before & business(cluster)["Ingress"])
    cluster.wait_until(lambda: cluster.parts()["llm"]["status"] == "cold")
    body = {"messages": [{"role": "user", "content": QUESTION}]}
    response = httpx.post(f"{cluster.url}/v1/chat/completions", json=body, trust_env=False, timeout=180)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "llm_cold"
    assert 1 <= int(response.headers["Retry-After"]) <= 60
    cluster.wait_until(lambda: says(cluster, "alpha"))
