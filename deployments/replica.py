"""What a replica can find out of itself."""

from ray import serve


def max_replicas() -> int:
    """Tell how many replicas the deployment of this process may grow to, whatever the YAML made of it."""
    config = serve.get_replica_context()._deployment_config
    if config.autoscaling_config is not None:
        return int(config.autoscaling_config.max_replicas)
    return int(config.num_replicas or 1)
