"""The topologies, one builder each: the import paths that a Serve config names."""

from typing import Any

import ray
from ray.serve import Application

from app.services import check_models
from app.settings import Device, Settings
from deployments.ingress import Ingress
from deployments.llm import LLM
from deployments.retriever import Retriever


def monolith(settings: Settings) -> Application:
    """All in one process: a laptop, one GPU box, debugging."""
    device = _device(settings)
    return Ingress.options(ray_actor_options=_actor(device, num_cpus=0.8)).bind(settings, device)


def two_tier(settings: Settings) -> Application:
    """Business logic with retrieval on CPUs, the LLM apart."""
    device = _device(settings)
    ingress = Ingress.options(ray_actor_options={"num_cpus": 0.5})
    return ingress.bind(settings, device, llm=_llm(settings, device))


def three_tier(settings: Settings) -> Application:
    """API, retrieval and LLM each apart, each scaled by itself."""
    device = _device(settings)
    return Ingress.bind(settings, device, retriever=Retriever.bind(settings), llm=_llm(settings, device))


def _llm(settings: Settings, device: Device) -> Application:
    return LLM.options(ray_actor_options=_actor(device, num_cpus=0.4)).bind(settings, device)


def _actor(device: Device, *, num_cpus: float) -> dict[str, Any]:
    return {"num_cpus": num_cpus, "num_gpus": 1 if device == "gpu" else 0}


def _device(settings: Settings) -> Device:
    """Choose the device, and refuse here, before anything starts, a model that it could not load."""
    device: Device
    if settings.llm.device == "auto":
        has_gpu = ray.is_initialized() and ray.cluster_resources().get("GPU", 0) >= 1
        device = "gpu" if has_gpu else "cpu"
    else:
        device = settings.llm.device
    check_models(settings.llm, device)
    return device
