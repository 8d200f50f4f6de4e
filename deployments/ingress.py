"""The tier that clients talk to: API, query planning, grounding, streaming."""

from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle

from app.api import create_api
from app.batch_worker import BatchWorker
from app.config import check_single_owner
from app.services import build_services, spare_from_collection
from app.settings import Device, Settings
from app.telemetry import configure_logging
from deployments.batches import CeleryQueue
from deployments.handles import LLMHandle, RetrieverHandle
from deployments.replica import end_when_dead, max_replicas


@serve.deployment(
    name="Ingress",
    max_ongoing_requests=256,
    max_queued_requests=512,
    autoscaling_config={"min_replicas": 1, "max_replicas": 1, "target_ongoing_requests": 64},
    health_check_period_s=5,
    graceful_shutdown_timeout_s=60,
)
@serve.ingress()
class Ingress:
    """The HTTP API over parts that are remote when a handle is given, and built in this process when not."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it.
        self,
        settings: Settings,
        device: Device = "cpu",
        retriever: DeploymentHandle[Any] | None = None,
        llm: DeploymentHandle[Any] | None = None,
        batches: DeploymentHandle[Any] | None = None,
    ) -> None:
        configure_logging(settings.logging)
        if retriever is None:
            check_single_owner(settings, owner="Ingress", max_replicas=max_replicas())
        self._batch_worker: BatchWorker | None = None
        self._holds_engine = llm is None and settings.llm.engine == "vllm"
        self._services = await build_services(
            settings,
            device=device,
            retriever=RetrieverHandle(retriever) if retriever else None,
            llm=LLMHandle(llm, expected_start_s=settings.answer.llm_start_s) if llm else None,
            queue=CeleryQueue(settings) if batches else None,
        )
        if batches is None:
            self._batch_worker = BatchWorker(self._services)
            self._batch_worker.start()
        spare_from_collection()

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Hand the application to Serve, which calls this after the constructor."""
        return create_api(self._services)

    async def check_health(self) -> None:
        """Find out whether an engine of this process lives; others are checked where they are."""
        if self._holds_engine:
            await end_when_dead(self._services.llm)

    async def __del__(self) -> None:
        """Release the parts of this process when Serve stops the replica."""
        if hasattr(self, "_services"):
            if self._batch_worker:
                await self._batch_worker.close()
            await self._services.close()
