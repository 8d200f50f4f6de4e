"""What Ray's dashboard tells over HTTP of a running cluster: what Serve holds, and which nodes there are."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from app.placement import Resources, waiting_replicas

TIMEOUT_S = 5.0


def dashboard_address() -> str:
    """Tell where Ray's own commands look for the dashboard."""
    return os.environ.get("RAY_DASHBOARD_ADDRESS", "http://127.0.0.1:8265")


def waiting_in_cluster(address: str) -> list[str] | None:
    """Say for each deployment with a replica that waits for a node why; None when the dashboard does not tell."""
    headers = {"Authorization": f"Bearer {token}"} if (token := _token()) else {}
    try:
        # A proxy from the environment must not come between this machine and the cluster.
        with httpx.Client(base_url=address, headers=headers, trust_env=False, timeout=TIMEOUT_S) as client:
            serve = client.get("/api/serve/applications/").raise_for_status().json()
            listed = client.get("/api/v0/nodes", params={"detail": "true"}).raise_for_status().json()
        return waiting_replicas(serve["applications"], _nodes(listed))
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError):
        return None


def _nodes(listed: Mapping[str, Any]) -> list[Resources]:
    nodes = listed["data"]["result"]["result"]
    return [node["resources_total"] for node in nodes if node["state"] == "ALIVE"]


def _token() -> str:
    """Find the token of the cluster where Ray itself looks for it."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")).expanduser()
    with suppress(OSError):
        return path.read_text(encoding="utf-8").strip()
    return ""
