"""A real service for tests: `cleave serve` in its own process, with Ray, vLLM and a folder of its own."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

ROOT = Path(__file__).parent.parent
START_TIMEOUT_S = 480
PREPARED_MODELS = ROOT / ".pytest_cache" / "models"


class RunningService:
    """One `cleave serve`; its output is in `output`."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, output: Path) -> None:
        self.process = process
        self.url = url
        self._output = output

    @property
    def output(self) -> str:
        return self._output.read_text(encoding="utf-8")

    def readiness(self) -> dict[str, Any]:
        with httpx.Client(trust_env=False, timeout=60) as client:
            found: dict[str, Any] = client.get(f"{self.url}/readyz?verbose").json()
            return found

    def descendants(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill(self) -> None:
        """Kill every process of the service with SIGKILL, as a power cut would."""
        everything = [psutil.Process(self.process.pid), *self.descendants()]
        for one in everything:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(everything, timeout=60)
        self.process.wait(60)

    def stop(self) -> int:
        """Stop it as Ctrl-C does; return its exit code."""
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(180)


def free_port() -> int:
    """Find a port that stays free until it is used: the system gives those below 32768 to nobody who asks for any."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)  # Ray's own are below, and above.
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def share_prepared_models(data_dir: Path) -> None:
    """Let a service take the prepared models from where others have left them: each preparation takes 20 s."""
    PREPARED_MODELS.mkdir(parents=True, exist_ok=True)
    data_dir.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        (data_dir / "models").symlink_to(PREPARED_MODELS)


def write_config(folder: Path, **args: Any) -> Path:
    """Write a Serve config of three tiers with its data under `folder`; `args` are settings."""
    return write_application(folder, {"import_path": "deployments.application:three_tier", "args": args})


def write_application(folder: Path, application: Mapping[str, Any], *, port: int | None = None, **options: Any) -> Path:
    """Write a Serve config of one application, with its data under `folder`; `options` stand beside it."""
    args = {"data_dir": str(folder / "data"), **application.get("args", {})}
    config = {
        **options,
        "http_options": {"host": "127.0.0.1", "port": port or free_port()},
        "applications": [{"name": "cleave", "route_prefix": "/", **application, "args": args}],
    }
    share_prepared_models(Path(args["data_dir"]))
    path = folder / "serve_config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def start(config: Path, output: Path, environment: Mapping[str, str] | None = None) -> RunningService:
    port = yaml.safe_load(config.read_text(encoding="utf-8"))["http_options"]["port"]
    program = Path(sys.executable).with_name("cleave")
    # A Ray of its own: without an address, Ray joins whichever cluster runs on this machine, and Serve one in it.
    environment = {**os.environ, "RAY_ADDRESS": "local", **(environment or {})}
    with output.open("wb") as file:
        process = subprocess.Popen(
            [str(program), "serve", str(config)], stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment
        )
    return RunningService(process, f"http://127.0.0.1:{port}", output)


@contextlib.contextmanager
def running(config: Path, environment: Mapping[str, str] | None = None) -> Iterator[RunningService]:
    """Start a service, wait until it says that it is ready, and stop it in the end."""
    service = start(config, config.with_name("output.txt"), environment)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while "Cleave is ready" not in service.output:
            assert service.process.poll() is None, service.output
            assert time.monotonic() < deadline, service.output
            time.sleep(0.2)
        yield service
    finally:
        if service.process.poll() is None:
            service.stop()
