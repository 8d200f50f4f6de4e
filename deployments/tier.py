"""The replicas of another deployment, as Serve's controller knows them."""

import asyncio
import time
from collections import Counter
from dataclasses import dataclass

import ray
from ray.serve.context import _get_global_client

from app.placement import waiting_replicas

MAX_AGE_S = 1.0
"""How old an answer of the controller may be; asking takes it some milliseconds."""


@dataclass(frozen=True, slots=True)
class TierState:
    """How many replicas run, how many are on their way, and why one finds no place, if so."""

    num_running: int
    num_starting: int
    waits_because: str = ""


class Tier:
    """One deployment of an application."""

    def __init__(self, application: str, deployment: str) -> None:
        self._application = application
        self._deployment = deployment
        self._state = TierState(0, 0)
        self._asked_at = -MAX_AGE_S
        self._lock = asyncio.Lock()

    async def state(self) -> TierState:
        """Ask the controller, unless it was asked just now."""
        async with self._lock:
            if time.monotonic() - self._asked_at > MAX_AGE_S:
                self._state = await asyncio.to_thread(self._ask)
                self._asked_at = time.monotonic()
        return self._state

    def _ask(self) -> TierState:
        applications = _get_global_client().get_serve_details()["applications"]
        deployments = applications.get(self._application, {}).get("deployments", {})
        found = deployments.get(self._deployment, {})
        states = Counter(replica["state"] for replica in found.get("replicas", []))
        num_starting = states["STARTING"] + states["RECOVERING"]
        if states["RUNNING"] or not num_starting:
            return TierState(states["RUNNING"], num_starting)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        own = {self._application: {"deployments": {self._deployment: found}}}
        return TierState(0, num_starting, " ".join(waiting_replicas(own, nodes)))
