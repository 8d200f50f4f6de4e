"""What several test files share: one real service in this process, without Ray and without a language model."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import uvicorn

from app.api import create_api
from app.api.http_protocol import LimitedProtocol
from app.batch_worker import BatchWorker
from app.llm import LLM
from app.services import build_services
from app.settings import LLMSettings, Settings, StoreSettings

# How fast this machine is at the moment decides no test.
hypothesis.settings.register_profile("cleave", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("cleave")

ROOT = Path(__file__).parent.parent
ARTICLES = ROOT / "examples" / "articles"


class ServiceThread(threading.Thread):
    """The API over real parts: the bundled encoder, Qdrant in memory, the engine that quotes."""

    def __init__(self, settings: Settings, llm: LLM | None = None) -> None:
        super().__init__(name="live-service", daemon=True)
        self._settings = settings
        self._llm = llm
        # Listening from the start: whoever connects early waits until the server accepts.
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._server: Future[uvicorn.Server] = Future()
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            if not self._server.done():
                self._server.set_exception(error)
            raise

    def wait_until_built(self) -> None:
        self._server.result()

    def stop(self) -> None:
        self._server.result().should_exit = True
        self.join()

    def call_soon(self, callback: Callable[[], object]) -> None:
        """Call something in the thread of the service."""
        self._loop.call_soon_threadsafe(callback)

    def cut_connections(self) -> None:
        """Break every connection off, as a failing network does."""
        connections = self._server.result().server_state.connections
        self.call_soon(lambda: [one.transport.abort() for one in tuple(connections)])

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        services = await build_services(self._settings, device="cpu", llm=self._llm)
        worker = BatchWorker(services)
        worker.start()
        server = uvicorn.Server(uvicorn.Config(create_api(services), http=LimitedProtocol, log_config=None))
        self._server.set_result(server)
        await server.serve(sockets=[self._socket])
        await worker.close()
        await services.close()


def sample_settings(data_dir: Path, **changes: Any) -> Settings:
    """Settings of a service over the sample articles that needs no disk for them and no language model."""
    defaults = {"seed": ARTICLES, "store": StoreSettings(kind="memory"), "llm": LLMSettings(engine="extractive")}
    return Settings(data_dir=data_dir, **{**defaults, **changes})


@contextmanager
def running(settings: Settings, llm: LLM | None = None) -> Iterator[ServiceThread]:
    """Serve in a thread for as long as the block lasts."""
    service = ServiceThread(settings, llm)
    service.start()
    service.wait_until_built()
    try:
        yield service
    finally:
        service.stop()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder that looks like a chat model; what is inside is not read before an engine loads it."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_text("{}", encoding="utf-8")
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def live_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve the sample articles at the URL that is given. Tests that add documents take ids of their own."""
    with running(sample_settings(tmp_path_factory.mktemp("live-service"))) as service:
        yield service.url
