"""Start a service of its own for a benchmark: `cleave serve`, its files in a folder that is removed in the end."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 90


def free_port() -> int:
    """Find a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def served(application: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> Iterator[tuple[str, str]]:
    """Serve one application; give its address and the dashboard's once it is ready."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="cleave-benchmark-") as folder:
        args = {"data_dir": f"{folder}/data", **application.get("args", {})}
        config = {
            "proxy_location": "EveryNode",
            "logging_config": {"enable_access_log": False},
            "http_options": {"host": "127.0.0.1", "port": port},
            "applications": [{"name": "cleave", "route_prefix": "/", **application, "args": args}],
        }
        path = Path(folder, "serve_config.yaml")
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        output = Path(folder, "output.txt")
        with output.open("wb") as file:
            process = subprocess.Popen(
                [str(BIN / "cleave"), "serve", str(path)],
                cwd=ROOT,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
            )
        try:
            yield f"http://127.0.0.1:{port}", _wait(process, output)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(STOP_TIMEOUT_S)


def _wait(process: subprocess.Popen[bytes], output: Path) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while "Cleave is ready" not in output.read_text(encoding="utf-8"):
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"the service did not start:\n{output.read_text(encoding='utf-8')}")
        time.sleep(0.5)
    dashboard = re.search(r"dashboard +(\S+)", output.read_text(encoding="utf-8"))
    return dashboard[1] if dashboard else ""
