"""What a replica can find out of itself, and when it ends itself."""

import os

from ray import serve

from app.errors import LLMUnavailable
from app.llm import LLM
from app.telemetry import logger


def max_replicas() -> int:
    """Tell how many replicas the deployment of this process may grow to, whatever the YAML made of it."""
    config = serve.get_replica_context()._deployment_config
    if config.autoscaling_config is not None:
        return int(config.autoscaling_config.max_replicas)
    return int(config.num_replicas or 1)


async def end_when_dead(llm: LLM) -> None:
    """End this process when its engine is dead: Serve replaces a dead replica at once, a sick one only slowly."""
    try:
        await llm.info()
    except LLMUnavailable:
        logger.exception("the engine is dead; this replica ends so that a new one starts")
        os._exit(1)
