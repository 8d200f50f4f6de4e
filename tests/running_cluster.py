"""A real Ray cluster of several nodes on this machine: a head without CPUs, CPU nodes, nodes with a logical GPU.

The test process is no part of it. It deploys as a user does, with `serve deploy`, and reads the dashboard's Serve API.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import yaml
from ray.cluster_utils import Cluster

from tests.running_service import ROOT, free_port, write_application

DEPLOY_TIMEOUT_S = 480
QUESTION = "How long did the Reading Room outage on 14 October 2025 last?"
ENVIRONMENT = {
    # The cluster of a test is reached from this machine alone.
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deployments.proxy:middlewares",
    # How soon Serve's autoscaler sees a change; by default 10 s.
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.2",
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.2",
    # How soon a node that is gone counts as dead; by default 15 s. One that is there and slow keeps Ray's 10 s a check.
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}


class RunningCluster:
    """A cluster with Serve; nodes come and go by `add` and `remove`."""

    def __init__(self, cluster: Cluster, dashboard: str, environment: Mapping[str, str]) -> None:
        self._cluster = cluster
        self.environment = environment
        self.dashboard = dashboard
        self.url = ""

    def add(self, **resources: float) -> Any:
        """Add a node and return it; `node.node_id` is its id."""
        with _environment(self.environment):
            return self._cluster.add_node(**resources)

    @property
    def address(self) -> str:
        """Where Ray's drivers reach it."""
        return str(self._cluster.address)

    def nodes(self) -> list[Any]:
        """All nodes but the head."""
        return list(self._cluster.worker_nodes)

    def remove(self, node: Any) -> None:
        """Kill a node's processes, as when its machine is lost."""
        self._cluster.remove_node(node, allow_graceful=False)

    def deploy(self, config: Path) -> None:
        """Run `serve deploy`."""
        self.url = f"http://127.0.0.1:{yaml.safe_load(config.read_text(encoding='utf-8'))['http_options']['port']}"
        program = Path(sys.executable).with_name("serve")
        done = subprocess.run(
            [str(program), "deploy", str(config), "--address", self.dashboard],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert done.returncode == 0, done.stderr

    def deployments(self) -> dict[str, Any]:
        """What the dashboard's Serve API says of each deployment."""
        found = self._serve_api()["applications"].get("cleave", {})
        return dict(found.get("deployments", {}))

    def status(self) -> str:
        """The application's status, by the same API."""
        return str(self._serve_api()["applications"].get("cleave", {}).get("status", "NOT_STARTED"))

    def replicas(self, deployment: str) -> dict[str, str]:
        """The running replicas of a deployment, by id, with the node that each runs on."""
        listed = self.deployments().get(deployment, {}).get("replicas", [])
        return {one["replica_id"]: one["node_id"] for one in listed if one["state"] == "RUNNING"}

    def wait_until_running(self) -> None:
        """Wait for all deployments to be up and for an Ingress to answer."""
        self.wait_until(lambda: self.status() == "RUNNING" and self.answers())

    def parts(self) -> dict[str, Any]:
        """What `/readyz?verbose` says of retriever and LLM."""
        found: dict[str, Any] = httpx.get(f"{self.url}/readyz?verbose", trust_env=False, timeout=60).json()["parts"]
        return found

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/livez", trust_env=False, timeout=30).status_code == 200
        except httpx.HTTPError:
            return False

    def wait_until(self, condition: Any, seconds: float = DEPLOY_TIMEOUT_S) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, (self.status(), self.deployments())
            time.sleep(0.2)

    def _serve_api(self) -> dict[str, Any]:
        response = httpx.get(f"{self.dashboard}/api/serve/applications/", trust_env=False, timeout=120)
        found: dict[str, Any] = response.raise_for_status().json()
        return found


def ask(url: str, **body: Any) -> tuple[int, dict[str, Any]]:
    """Ask the question that the sample articles answer; return the status and the body."""
    asked = {"messages": [{"role": "user", "content": QUESTION}], **body}
    response = httpx.post(f"{url}/v1/chat/completions", json=asked, trust_env=False, timeout=180)
    is_json = response.headers["content-type"].startswith("application/json")
    return response.status_code, response.json() if is_json else {"text": response.text}


class Load:
    """Clients that ask one question after the other until they are stopped."""

    def __init__(self, url: str, *, num_clients: int = 2, **body: Any) -> None:
        self.answers: list[tuple[int, dict[str, Any]]] = []
        self._url = url
        self._body = body
        self._stop = threading.Event()
        self._clients = [threading.Thread(target=self._ask) for _ in range(num_clients)]

    def __enter__(self) -> "Load":
        for client in self._clients:
            client.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for client in self._clients:
            client.join()

    def _ask(self) -> None:
        while not self._stop.is_set():
            self.answers.append(ask(self._url, **self._body))
            self._stop.wait(0.2)

    @property
    def last(self) -> dict[str, Any]:
        """The body of the last answer; empty before there is one."""
        return self.answers[-1][1] if self.answers else {}

    @property
    def statuses(self) -> Counter[int]:
        return Counter(status for status, _ in self.answers)

    @property
    def degraded(self) -> Counter[str]:
        return Counter(reason for _, body in self.answers for reason in body.get("rag", {}).get("degraded", ()))


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Let processes that are started inside see these variables."""
    previous = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(previous)


@contextlib.contextmanager
def running_cluster(*nodes: dict[str, float]) -> Iterator[RunningCluster]:
    """Start a head without CPUs, and the given nodes; stop all of it in the end."""
    port = free_port()
    # Apart from any other Ray of this machine. The path is short, since sockets stand in it.
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    environment = {**ENVIRONMENT, "RAY_TMPDIR": folder}
    with _environment(environment):
        cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": True, "dashboard_port": port},
        )
    found = RunningCluster(cluster, f"http://127.0.0.1:{port}", environment)
    try:
        for resources in nodes:
            found.add(**resources)
        yield found
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def write_cluster_config(folder: Path, topology: str, *, port: int | None = None, **application: Any) -> Path:
    """Write a Serve config for a cluster whose nodes share this machine, so that only the head has a proxy."""
    args = {
        "seed": str(ROOT / "examples" / "articles"),
        "llm": {"device": "gpu", "engine": "extractive"},
        **application.pop("args", {}),
    }
    described = {"import_path": f"deployments.application:{topology}", **application, "args": args}
    return write_application(folder, described, port=port, proxy_location="HeadOnly")
