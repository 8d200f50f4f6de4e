"""Why a replica finds no node, in words; and which deployments a changed setting restarts."""

import time
from typing import Any

import pytest
from ray.serve._private.build_app import build_app
from ray.serve.generated.serve_pb2 import DeploymentConfig

from app.doctor import check_placement
from app.placement import explain_waiting, waiting_replicas
from app.settings import Settings
from deployments import application

GPU_REPLICA = {"CPU": 0.4, "GPU": 1.0}


def test_a_need_that_no_node_meets_is_named_with_what_there_is() -> None:
    why = explain_waiting("LLM", GPU_REPLICA, [{"CPU": 8.0, "memory": 1e9}, {"CPU": 2.0}], waited_s=0)
    assert why
    assert why.startswith("LLM asks for 0.4 CPU, 1 GPU per replica, and no node has as much. Nodes: 8 CPU, 0 GPU; 2 ")


def test_other_resources_are_named_only_where_they_are_asked_for() -> None:
    why = explain_waiting("LLM", {**GPU_REPLICA, "accelerator_type:L4": 0.001}, [{"CPU": 8.0, "GPU": 1.0}], waited_s=0)
    assert why
    assert "Nodes: 8 CPU, 1 GPU, 0 accelerator_type:L4." in why


def test_a_full_node_is_named_only_after_a_while() -> None:
    node = {"CPU": 8.0, "GPU": 1.0}
    assert explain_waiting("LLM", GPU_REPLICA, [node], waited_s=1) is None
    assert "are full, or kept for the LLM" in (explain_waiting("LLM", GPU_REPLICA, [node], waited_s=30) or "")


def replica(state: str, *, node_id: str | None = None) -> dict[str, Any]:
    return {"state": state, "node_id": node_id, "start_time_s": time.time()}


@pytest.mark.parametrize(
    ("replicas", "is_waiting"),
    [
        ([replica("STARTING")], True),
        ([replica("RUNNING", node_id="a"), replica("STARTING")], True),
        ([replica("STARTING", node_id="a")], False),
        ([replica("RUNNING", node_id="a")], False),
        ([], False),
    ],
)
def test_only_replicas_without_a_node_wait(replicas: list[dict[str, Any]], is_waiting: bool) -> None:
    applications = {"cleave": {"deployments": {"LLM": {"replicas": replicas, "required_resources": GPU_REPLICA}}}}
    assert bool(waiting_replicas(applications, [{"CPU": 1.0}])) == is_waiting


def test_the_doctor_says_which_replicas_wait() -> None:
    assert check_placement("http://x", None).status == "ok"
    assert check_placement("http://x", []).status == "ok"
    found = check_placement("http://x", ["LLM asks for 1 GPU.", "Retriever asks for 64 CPU."])
    assert found.status == "failed"
    assert "LLM asks" in found.detail
    assert "Retriever asks" in found.detail


# --- Versions --------------------------------------------------------------------------------------------------------


def versions(topology: str, **changed: Any) -> dict[str, str]:
    """The version of each deployment, as Serve's controller receives it."""
    llm = {"engine": "extractive", "device": "gpu", **changed.pop("llm", {})}
    built = build_app(getattr(application, topology)(Settings.model_validate({"llm": llm, **changed})), name="cleave")
    found = {}
    for deployment in built.deployments:
        # What the task that builds the application does: one version for all.
        deployment._deployment_config.version = "common"
        proto = DeploymentConfig.FromString(deployment._deployment_config.to_proto_bytes())
        found[deployment.name] = proto.version
    return found


CHANGES: list[tuple[dict[str, Any], set[str]]] = [
    ({}, set()),
    ({"llm": {"max_num_seqs": 7}}, {"LLM"}),
    ({"llm": {"engine_options": {"quantization": "fp8"}}}, {"LLM"}),
    ({"answer": {"max_tokens": 7}}, {"Ingress", "Batches"}),
    ({"retrieval": {"top_k": 7}}, {"Ingress", "Retriever", "Batches"}),
    ({"chunking": {"max_tokens": 77}}, {"Retriever"}),
    ({"reranking": {"num_candidates": 7}}, {"Retriever"}),
    ({"access": {"allow_without_keys": True}}, {"Ingress", "Batches"}),
    ({"batch": {"num_concurrent": 7}}, {"Ingress", "Batches"}),
    ({"store": {"url": "http://elsewhere:6333"}}, {"Retriever"}),
    ({"store": {"collection": "another"}}, {"Ingress", "Retriever", "Batches"}),
    ({"data_dir": "/elsewhere"}, {"Ingress", "Retriever", "Batches", "LLM"}),
    ({"logging": {"format": "text"}}, {"Ingress", "Retriever", "Batches", "LLM"}),
]


@pytest.mark.parametrize(("change", "restarted"), CHANGES)
def test_a_changed_setting_restarts_only_what_reads_it(change: dict[str, Any], restarted: set[str]) -> None:
    before, after = versions("three_tier"), versions("three_tier", **change)
    assert {name for name in before if before[name] != after[name]} == restarted
    assert "common" not in before.values()


def test_another_model_leaves_the_business_side_of_two_tier_as_it_is() -> None:
    before, after = versions("two_tier"), versions("two_tier", llm={"max_num_seqs": 7})
    assert {name for name in before if before[name] != after[name]} == {"LLM"}


def test_the_config_differs_each_time_so_that_serve_goes_on_scaling_what_has_not_changed() -> None:
    """Serve forgets how deployments scale when it builds, and asks again only for those whose config differs."""
    first, second = (
        build_app(application.three_tier(Settings.model_validate({"llm": {"engine": "extractive"}})), name="cleave")
        for _ in range(2)
    )
    for one, other in zip(first.deployments, second.deployments, strict=True):
        assert one._deployment_config != other._deployment_config
