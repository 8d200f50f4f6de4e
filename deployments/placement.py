"""Which nodes a deployment may run on: the LLM where a GPU is, the others where none is."""

from typing import Any

import ray
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from app.services import check_models
from app.settings import Device, Settings

TIER_LABEL = "tier"
"""Nodes started with `--labels tier=gpu` are kept for the LLM, also those that join later."""

NAMED_NODES = "cleave:gpu-nodes"
"""The key in the cluster's own store under which the GPU nodes are kept that replicas have been told to avoid."""


def choose_device(settings: Settings) -> Device:
    """Choose the device, and refuse here, before anything starts, a model that it could not load."""
    device: Device
    if settings.llm.device != "auto":
        device = settings.llm.device
    elif settings.llm.engine != "vllm":
        device = "cpu"  # The other engines compute elsewhere, or next to nothing.
    else:
        device = "gpu" if cluster_has_gpu() else "cpu"
    check_models(settings.llm, device)
    return device


def llm_options(device: Device, *, num_cpus: float) -> dict[str, Any]:
    """Give the `ray_actor_options` of the deployment that holds the LLM."""
    return {"num_cpus": num_cpus, "num_gpus": 1 if device == "gpu" else 0}


def business_options(device: Device, *, num_cpus: float) -> dict[str, Any]:
    """Give those of a deployment without the LLM: off the GPU nodes, as long as there are others."""
    options: dict[str, Any] = {"num_cpus": num_cpus}
    if device == "gpu":
        options["label_selector"] = {TIER_LABEL: "!gpu", **_not_on_gpu_nodes()}
    return options


def cluster_has_gpu() -> bool:
    """Tell whether some node has a GPU, physical or logical."""
    return bool(ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1)


def _not_on_gpu_nodes() -> dict[str, str]:
    """Name the GPU nodes that are up, which spares the label where nodes do not come and go.

    The list stays while one of them is up: another one would restart the deployment, only because a node has joined.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]] if ray.is_initialized() else []
    gpu_nodes = {node["NodeID"] for node in nodes if node["Resources"].get("GPU")}
    has_others = any(node["Resources"].get("CPU", 0) >= 1 for node in nodes if node["NodeID"] not in gpu_nodes)
    if not gpu_nodes or not has_others:
        return {}
    named = (_internal_kv_get(NAMED_NODES) or b"").decode()
    if not gpu_nodes & set(named.split(",")):
        named = ",".join(sorted(gpu_nodes))
        _internal_kv_put(NAMED_NODES, named)
    return {"ray.io/node-id": f"!in({named})"}
