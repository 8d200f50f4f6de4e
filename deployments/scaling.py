"""How many replicas the LLM tier needs: a Serve autoscaling policy on what saturates an engine.

Serve imports this module into its controller, so it imports nothing of the service.
"""

import math
from typing import Any

from ray.serve.config import AutoscalingContext

NUM_PARTS_AT_ONCE = 2
"""Parts of batches that one replica works on at once: while one comes to its end, the other keeps the engine busy."""
TARGET_LOAD = 0.7
"""Of what an engine computes at once: above it a burst would wait for a replica that takes long to start."""


def engine_load(ctx: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Ask for as many replicas as keep each engine's load at `TARGET_LOAD`.

    A replica's load is its requests, running and waiting in the engine, over what the engine runs at once, or the
    share of its KV cache in use, whichever is larger: few long requests fill an engine like many short ones. Requests
    that still wait in front of the tier count as running ones. An engine that cannot tell what it holds at once is
    scaled on counts, by `target_ongoing_requests`.
    """
    metrics = ctx.aggregated_metrics
    capacities = metrics.get("max_num_seqs", {})
    if not any(capacities.values()):
        return float(ctx.total_num_requests) / ctx.config.get_target_ongoing_requests(), {}
    running, usage = metrics.get("num_running", {}), metrics.get("kv_cache_usage", {})
    load = sum(
        max(running.get(replica, 0.0) / capacity, usage.get(replica, 0.0))
        for replica, capacity in capacities.items()
        if capacity
    )
    load += ctx.total_queued_requests / max(capacities.values())
    return math.ceil(load / TARGET_LOAD), {}


def batch_backlog(ctx: AutoscalingContext) -> tuple[float, dict[str, Any]]:
    """Ask for as many replicas as the parts of all batches keep busy, `max_ongoing_requests` of them each.

    Every replica tells the same number, since all read one folder.
    """
    num_parts = max(ctx.aggregated_metrics.get("num_parts", {}).values(), default=0.0)
    return math.ceil(num_parts / NUM_PARTS_AT_ONCE), {}
