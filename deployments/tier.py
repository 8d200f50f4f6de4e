"""The replicas of another deployment, as Serve's controller knows them."""

import asyncio
import contextvars
import time
from dataclasses import dataclass

import ray
from ray.serve.context import _get_global_client

from app.placement import waiting_replicas
from app.telemetry import logger

MAX_AGE_S = 1.0
"""How old an answer of the controller may be; asking takes it some milliseconds."""
PATIENCE_S = 1.0
"""A controller that is gone blocks whoever asks, while the replicas go on."""


@dataclass(frozen=True, slots=True)
class TierState:
    """How many replicas run, whether none may be what is wanted, and why one finds no node, if so."""

    num_running: int
    scales_to_zero: bool = False
    waits_because: str = ""


class Tier:
    """One deployment of an application."""

    def __init__(self, application: str, deployment: str) -> None:
        self._application = application
        self._deployment = deployment
        self._state = TierState(1)
        self._asked_at = -MAX_AGE_S
        self._asking: asyncio.Task[None] | None = None

    async def state(self) -> TierState:
        """Ask the controller, unless it was asked just now. While it does not answer, the last answer holds."""
        if self._asking is None and time.monotonic() - self._asked_at > MAX_AGE_S:
            # In a context of its own, and one at a time: it outlives the request that it began with.
            self._asking = asyncio.create_task(self._refresh(), context=contextvars.Context())
        if self._asking is not None:
            await asyncio.wait({self._asking}, timeout=PATIENCE_S)
        return self._state

    async def _refresh(self) -> None:
        try:
            self._state = await asyncio.to_thread(self._ask)
        except Exception:
            logger.warning("Serve's controller does not tell how many replicas run", exc_info=True)
        finally:
            self._asked_at = time.monotonic()
            self._asking = None

    def _ask(self) -> TierState:
        applications = _get_global_client().get_serve_details()["applications"]
        deployments = applications.get(self._application, {}).get("deployments", {})
        found = deployments.get(self._deployment, {})
        if not found:
            # While a changed config is being built nothing is listed, and everything goes on running.
            return self._state
        num_running = sum(replica["state"] == "RUNNING" for replica in found["replicas"])
        if num_running:
            return TierState(num_running)
        autoscaling = found["deployment_config"].get("autoscaling_config") or {}
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        waiting = waiting_replicas({self._application: {"deployments": {self._deployment: found}}}, nodes)
        return TierState(0, autoscaling.get("min_replicas") == 0, " ".join(waiting))
