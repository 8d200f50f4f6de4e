"""`cleave serve`: check what can be checked, run `serve run`, say how far it is, and stop all of it at Ctrl-C."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
from rich.console import Console

from app.config import Config, load_config
from app.dashboard import waiting_in_cluster
from app.errors import ConfigurationError
from app.keys import check_keys, keys_path, read_keys
from app.models import is_prepared
from app.settings import Device
from app.webhooks import read_secret

MIN_FREE_BYTES = 2**30
POLL_S = 0.5
DEVICES: tuple[Device, ...] = ("cpu", "gpu")
STOP_TIMEOUT_S = 60
PLACEMENT_PATIENCE_S = 20.0
PLACEMENT_POLL_S = 5.0
NO_DASHBOARD = "not running"
QUIET_ENVIRONMENT = {
    # Nothing is reported to anybody.
    "RAY_USAGE_STATS_ENABLED": "0",
    "VLLM_NO_USAGE_STATS": "1",
    # Ray's future behaviour for replicas without a GPU; it warns about the present one at each start.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "PYTHONUNBUFFERED": "1",
    # What Serve's proxy answers by itself has the shape of the API's errors.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "deployments.proxy:middlewares",
    # A Ray of its own. Otherwise `serve run` would join whichever one runs here, and replace what it serves.
    "RAY_ADDRESS": "local",
}
FATAL = re.compile(
    r"app\.errors\.ConfigurationError: (?P<message>.+)"
    r"|Deploying app .+ failed|DEPLOY_FAILED"
)
DASHBOARD = re.compile(r"dashboard at (?P<address>\S+)")
COLOUR = re.compile(r"\x1b\[[\d;]*m")


class Stopped(Exception):
    """The user asked to stop."""


def serve(config_path: Path) -> int:
    """Serve in the foreground until Ctrl-C; return the exit code."""
    console = Console(stderr=True, highlight=False)
    try:
        config = load_config(config_path)
        check_keys(config)
        read_secret(config.settings.batch)
        check_machine(config)
    except ConfigurationError as error:
        console.print(f"[red]cleave:[/red] {error.message}", soft_wrap=True)
        return 2
    log = config.settings.data_dir / "logs" / "serve.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    previous = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    service = _Service(config, log)
    try:
        ready = _wait_until_ready(service, config, console)
        if not ready:
            return 1
        console.print(_how_to_ask(config, service.dashboard(), log), soft_wrap=True)
        service.wait()
        console.print(f"[red]cleave:[/red] the service ended by itself; {log} says why.")
        return 1
    except Stopped:
        console.print("\nStopping ...")
        return 0
    finally:
        for number in previous:
            signal.signal(number, signal.SIG_IGN)
        service.stop()
        for number, handler in previous.items():
            signal.signal(number, handler)


def check_machine(config: Config) -> None:
    """Refuse what would fail minutes later: a port in use, a full disk, a folder that cannot be written."""
    with socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise ConfigurationError(
                f"http_options.port: {config.host}:{config.port} cannot be used ({error.strerror}). "
                "Stop the program that holds it, or set another port."
            ) from None
    data_dir = config.settings.data_dir
    try:
        data_dir.mkdir(parents=True, exist_ok=True)
        probe_file = data_dir / ".writable"
        probe_file.touch()
        probe_file.unlink()
    except OSError as error:
        raise ConfigurationError(
            f"data_dir: cannot write to {data_dir} ({error.strerror}). Name another folder."
        ) from None
    free = shutil.disk_usage(data_dir).free
    if free < MIN_FREE_BYTES:
        raise ConfigurationError(
            f"data_dir: only {free / 2**30:.1f} GiB are free under {data_dir.resolve()}. "
            f"Free at least {MIN_FREE_BYTES / 2**30:.0f} GiB, or name a folder on another disk."
        )


class _Service:
    """The `serve run` process and its log."""

    def __init__(self, config: Config, log: Path) -> None:
        self._log = log
        self._asked_at = 0.0
        self._waiting: list[str] = []
        program = Path(sys.executable).with_name("serve")
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [str(program), "run", str(config.path)],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env={**QUIET_ENVIRONMENT, **os.environ},
                # Ctrl-C reaches this program only, which then stops the other in order.
                start_new_session=True,
            )

    def failure(self) -> str | None:
        """Say in one line why the start failed, once it has."""
        for line in self._read_log().splitlines():
            if match := FATAL.search(line):
                return match["message"] or f"the deployment failed; {self._log} says why."
        if self._process.poll() is not None:
            return f"`serve run` ended with code {self._process.returncode}; {self._log} says why."
        return None

    def dashboard(self) -> str:
        """Find the address that Ray printed for its dashboard."""
        match = DASHBOARD.search(self._read_log())
        return match["address"] if match else NO_DASHBOARD

    def waiting(self) -> list[str]:
        """Ask the dashboard, now and then, which deployments wait for a node."""
        if time.monotonic() - self._asked_at > PLACEMENT_POLL_S and self.dashboard() != NO_DASHBOARD:
            self._asked_at = time.monotonic()
            self._waiting = waiting_in_cluster(self.dashboard()) or []
        return self._waiting

    def _read_log(self) -> str:
        return COLOUR.sub("", self._log.read_text(encoding="utf-8", errors="replace"))

    def wait(self) -> None:
        """Block until the process ends."""
        self._process.wait()

    def stop(self) -> None:
        """Let `serve run` shut its cluster down; what is left of its session after a while is killed."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S)
        with suppress(ProcessLookupError):  # Nothing is left: the normal case.
            os.killpg(self._process.pid, signal.SIGKILL)


def _wait_until_ready(service: _Service, config: Config, console: Console) -> bool:
    """Report each part as it comes up; return False when the start failed, having said why."""
    started = time.monotonic()
    said: set[str] = set()
    while True:
        if message := service.failure():
            console.print(f"[red]cleave:[/red] {message}", soft_wrap=True)
            return False
        readiness = _readiness(config)
        elapsed_s = time.monotonic() - started
        waiting = service.waiting() if elapsed_s > PLACEMENT_PATIENCE_S else []
        for text in [*_progress(config, readiness), *(f"waiting: {why}" for why in waiting)]:
            if text not in said:
                said.add(text)
                console.print(f"[dim]{elapsed_s:5.0f} s[/dim]  {text}", soft_wrap=True)
        if _is_ready(config, readiness):
            return True
        time.sleep(POLL_S)


def _is_ready(config: Config, readiness: dict[str, Any]) -> bool:
    """Tell whether nothing more will come: a tier scaled to zero waits for a request, another server for its owner."""
    is_cold = readiness.get("parts", {}).get("llm", {}).get("status") == "cold"
    is_elsewhere = readiness.get("status") == "degraded" and config.settings.llm.engine == "openai"
    return readiness.get("status") == "ready" or is_cold or is_elsewhere


def _progress(config: Config, readiness: dict[str, Any]) -> list[str]:
    """Say what has been reached."""
    reached = [f"starting Ray Serve with {config.path} (topology {config.topology}) ..."]
    llm = config.settings.llm
    devices = DEVICES if llm.device == "auto" else (llm.device,)
    prepared = all(is_prepared(llm.model_on(device), config.settings.data_dir) for device in devices)
    if llm.engine == "vllm" and not prepared:
        reached.append("preparing the bundled model, once on this machine (about half a minute) ...")
    if readiness:
        reached.append("API is up")
    parts = readiness.get("parts", {})
    if parts.get("retriever", {}).get("status") == "ok":
        held = parts["retriever"]
        # Where there are keys, how many documents they hold is not told to everyone.
        is_told = "num_documents" in held
        sizes = f": {held['num_documents']} documents, {held['num_chunks']} chunks" if is_told else ""
        reached.append(f"retriever is ready{sizes}")
    if parts.get("retriever", {}).get("code") == "collection_mismatch":
        reached.append(f"not ready: {parts['retriever']['error']}")
    if parts.get("llm", {}).get("status") == "ok":
        reached.append(f"language model is ready: {parts['llm']['id']}")
    if llm.engine == "openai" and "error" in parts.get("llm", {}):
        reached.append(f"answers are quotes for now: {parts['llm']['error']}")
    if parts.get("llm", {}).get("status") == "cold":
        reached.append("language model is scaled to zero: the first question starts it, and is answered in quotes")
    return reached


def _readiness(config: Config) -> dict[str, Any]:
    try:
        # A proxy from the environment must not come between this machine and itself.
        with httpx.Client(trust_env=False, timeout=5) as client:
            found: dict[str, Any] = client.get(f"{config.url}/readyz", params={"verbose": ""}).json()
            return found
    except (httpx.HTTPError, ValueError):
        return {}


def _how_to_ask(config: Config, dashboard: str, log: Path) -> str:
    url = config.url
    has_keys = bool(read_keys(keys_path(config.settings)))
    header = ' -H "Authorization: Bearer $CLEAVE_API_KEY"' if has_keys else ""
    hint = "\n  key        export CLEAVE_API_KEY=...   (one that `cleave keys create` showed)" if has_keys else ""
    return f"""
[bold green]Cleave is ready.[/bold green]{hint}
  ask        cleave ask "How long did the Reading Room outage last?"
             curl {url}/v1/chat/completions -H 'Content-Type: application/json'{header} \\
               -d '{{"messages": [{{"role": "user", "content": "How long did the Reading Room outage last?"}}]}}'
  chat page  {url}/
  API docs   {url}/docs
  dashboard  {dashboard}  (Ray: deployments, replicas, logs; its token: ray get-auth-token)
  change     edit {config.path}, then: RAY_AUTH_MODE=token serve deploy {config.path}
  log        {log}
Ctrl-C stops everything.
"""


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped
