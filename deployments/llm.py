"""The tier with the language model."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from ray import serve

from app.domain import Delta, GenerationRequest, ModelInfo
from app.errors import LLMUnavailable
from app.services import build_llm, spare_from_collection
from app.settings import Device, Settings
from app.telemetry import configure_logging
from deployments.replica import end_when_dead


@serve.deployment(
    name="LLM",
    # More than the engine runs at once, so that its own scheduler always has a next request to take.
    max_ongoing_requests=64,
    max_queued_requests=256,
    autoscaling_config={
        "min_replicas": 1,
        "max_replicas": 1,
        "target_ongoing_requests": 40,
        "policy": {"policy_function": "deployments.scaling:engine_load"},
    },
    health_check_period_s=2,
    health_check_timeout_s=10,
    graceful_shutdown_timeout_s=120,
)
class LLM:
    """An `app.llm.LLM` as a deployment."""

    async def __init__(self, settings: Settings, device: Device) -> None:  # type: ignore[misc]  # Serve awaits it.
        configure_logging(settings.logging)
        self._holds_engine = settings.llm.engine == "vllm"
        self._llm = await build_llm(settings, device)
        spare_from_collection()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """Stream a completion. A cancelled call closes the engine's stream, which frees its slot."""
        async with aclosing(self._llm.generate(request)) as deltas:
            async for delta in deltas:
                yield delta

    async def info(self) -> ModelInfo:
        """Say what is served."""
        return await self._llm.info()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Tell Serve what `deployments.scaling` decides on; nothing while the engine does not answer."""
        try:
            info = await self._llm.info()
        except LLMUnavailable:
            return {}
        return {
            "num_running": info.num_running,
            "max_num_seqs": info.max_num_seqs,
            "kv_cache_usage": info.kv_cache_usage,
        }

    async def check_health(self) -> None:
        """Find out whether an engine of this process lives; a new replica would not mend another server."""
        if self._holds_engine:
            await end_when_dead(self._llm)

    async def __del__(self) -> None:
        """Stop the engine when Serve stops the replica."""
        if hasattr(self, "_llm"):
            await self._llm.close()
