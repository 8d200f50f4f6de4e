"""Whether what the deployments ask for can be placed on the nodes of a cluster, and the words for it when not."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

Resources: TypeAlias = Mapping[str, float]
"""Amounts by Ray's names: CPU, GPU, memory (bytes), accelerator_type:L4, ..."""
SHOWN = ("CPU", "GPU")
PATIENCE_S = 5.0
"""A replica that could be placed is, in less."""


def explain_waiting(deployment: str, required: Resources, nodes: Sequence[Resources], *, waited_s: float) -> str | None:
    """Say in one line why a replica is not placed. `nodes` are the totals of each node that is up."""
    asked = f"{deployment} asks for {_listed(required)} per replica"
    if not any(all(node.get(name, 0) >= amount for name, amount in required.items()) for node in nodes):
        # Sorted, so that whoever asks gets the same words.
        offered = "; ".join(sorted((_listed(node, of=required) for node in nodes), reverse=True)) or "none"
        return (
            f"{asked}, and no node has as much. Nodes: {offered}. "
            "Add such a node (or wait, where nodes are added on demand), or lower what it asks."
        )
    if waited_s > PATIENCE_S:
        return (
            f"{asked}, and the nodes that have as much are full, or kept for the LLM. Add one, or lower what is asked."
        )
    return None


def waiting_replicas(applications: Mapping[str, Any], nodes: Sequence[Resources]) -> list[str]:
    """Say for each deployment with a replica that waits for a node why. `applications` is Serve's account of them."""
    problems = []
    for application in applications.values():
        for name, deployment in application.get("deployments", {}).items():
            waiting = [one for one in deployment["replicas"] if one["state"] == "STARTING" and not one.get("node_id")]
            if waiting:
                waited_s = time.time() - min(one["start_time_s"] for one in waiting)
                problems.append(explain_waiting(name, deployment["required_resources"], nodes, waited_s=waited_s))
    return [problem for problem in problems if problem]


def _listed(resources: Resources, *, of: Resources | None = None) -> str:
    names = [*SHOWN, *(name for name in of or resources if name not in SHOWN)]
    return ", ".join(f"{resources.get(name, 0):g} {name}" for name in names)
