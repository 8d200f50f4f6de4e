"""The tier that answers batches, scaled by itself, and its queue: Celery, through Ray Serve's task consumer.

Celery's queue of files loses what a killed process had taken, and one in Redis gives it again only after an hour. So an
entry of the queue says no more than that there is work; what there is to do, and what is done, is on disk.
"""

import asyncio
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from ray import serve
from ray.serve import Deployment
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import CeleryAdapterConfig, TaskProcessorAdapter, TaskProcessorConfig
from ray.serve.task_consumer import instantiate_adapter_from_config, task_consumer, task_handler

from app.batch_worker import BatchWorker
from app.services import build_services, spare_from_collection
from app.settings import Settings
from app.telemetry import configure_logging, logger
from deployments.handles import LLMHandle, RetrieverHandle
from deployments.scaling import NUM_PARTS_AT_ONCE

QUEUE, TASK = "cleave-batches", "work"
MAX_CONNECT_S = 2.0
MAX_PUT_S = 5.0
"""A client that begins a batch waits for it."""


class CeleryQueue:
    """An `app.batch_queue.Queue` that other processes take from."""

    def __init__(self, settings: Settings) -> None:
        self._adapter: TaskProcessorAdapter = instantiate_adapter_from_config(_task_config(settings))

    async def put(self, batch_id: str) -> None:
        """Add an entry. While the queue cannot be reached, that is left to whoever looks for lost ones."""
        try:
            async with asyncio.timeout(MAX_PUT_S):
                await asyncio.to_thread(
                    self._adapter.enqueue_task_sync, TASK, args=[batch_id], retry=False, ignore_result=True
                )
        except Exception as error:
            # Whatever the broker's client raised, the remedy is one.
            reason = f"{type(error).__name__}: {error}"
            logger.warning("the queue of batches cannot be reached", extra={"batch_id": batch_id, "why": reason})


class _Batches:
    """Takes entries of the queue and does what they ask for, with retriever and LLM of the other tiers."""

    def __init__(self, settings: Settings, retriever: DeploymentHandle[Any], llm: DeploymentHandle[Any]) -> None:
        configure_logging(settings.logging)
        # Serve constructs replicas within their event loop; entries come in threads of Celery's.
        self._loop = asyncio.get_running_loop()
        self._opening = self._loop.create_task(self._open(settings, retriever, llm))
        self._working: set[Future[None]] = set()

    async def _open(
        self, settings: Settings, retriever: DeploymentHandle[Any], llm: DeploymentHandle[Any]
    ) -> BatchWorker:
        services = await build_services(
            settings,
            retriever=RetrieverHandle(retriever),
            llm=LLMHandle(llm, expected_start_s=settings.answer.llm_start_s),
            queue=CeleryQueue(settings),
            ingests=False,
        )
        worker = BatchWorker(services)
        worker.start()
        spare_from_collection()
        return worker

    @task_handler(name=TASK)  # type: ignore[untyped-decorator]  # Ray is not typed.
    def work(self, batch_id: str) -> None:
        """Do what an entry asks for. What fails is found again by whoever has nothing to do."""
        working = asyncio.run_coroutine_threadsafe(self._work(batch_id), self._loop)
        self._working.add(working)
        try:
            working.result()
        finally:
            self._working.discard(working)

    async def _work(self, batch_id: str) -> None:
        await (await self._opening).work(batch_id)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Tell Serve how many parts there are to work on."""
        return {"num_parts": await (await self._opening).num_parts()}

    async def check_health(self) -> None:
        """Fail when entries are no longer taken; Serve then replaces the replica."""
        if self._opening.done():
            self._opening.result()
        thread = self._adapter._worker_thread  # type: ignore[attr-defined]  # The task consumer sets it.
        if not thread.is_alive():
            raise RuntimeError("Celery's consumer has ended")


def batches_deployment(settings: Settings) -> Deployment:
    """Make the deployment, which Serve ties to its queue when it is made."""
    consumer: Any = task_consumer(task_processor_config=_task_config(settings))(_Batches)

    class Batches(consumer):  # type: ignore[misc]
        """A consumer that leaves its work to others when Serve stops it, in place of ending it first."""

        async def __del__(self) -> None:  # Serve awaits it.
            for working in list(self._working):
                working.cancel()
            if self._opening.done() and not self._opening.exception():
                await self._opening.result().close()
            super().__del__()

    return serve.deployment(
        name="Batches",
        max_ongoing_requests=NUM_PARTS_AT_ONCE,
        autoscaling_config={
            "min_replicas": 1,
            "max_replicas": 1,
            # Nothing is asked of it through Serve: the policy decides.
            "target_ongoing_requests": 1,
            "policy": {"policy_function": "deployments.scaling:batch_backlog"},
        },
        health_check_period_s=5,
        graceful_shutdown_timeout_s=15,
    )(Batches)


def _task_config(settings: Settings) -> TaskProcessorConfig:
    broker_url = settings.batch.broker_url
    options: dict[str, Any] | None = None
    if broker_url is None:
        folder = ((settings.batch.folder or settings.data_dir) / "queue").resolve()
        entries, control = (_made(folder / name) for name in ("entries", "control"))
        broker_url = "filesystem://"
        options = {"data_folder_in": entries, "data_folder_out": entries, "control_folder": control}
    elif broker_url.startswith("redis"):
        # One that is away is not waited for: threads that do so would be missing elsewhere.
        options = {"socket_connect_timeout": MAX_CONNECT_S, "max_retries": 0}
    return TaskProcessorConfig(
        queue_name=QUEUE,
        adapter_config=CeleryAdapterConfig(
            broker_url=broker_url,
            # There are no results. Celery asks for them all the same, and must not wait for Redis with that.
            backend_url="cache+memory://",
            broker_transport_options=options,
            app_custom_config={
                # Logs and standard output stay the service's.
                "worker_hijack_root_logger": False,
                "worker_redirect_stdouts": False,
                # What one replica has taken, the others cannot take.
                "worker_prefetch_multiplier": 1,
                "broker_connection_retry_on_startup": True,
            },
            task_custom_config={"ignore_result": True},
        ),
        max_retries=0,
    )


def _made(folder: Path) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)
