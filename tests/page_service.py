"""What the chat page is tested with: the real service, whose model plays a part when asked to, and a real browser."""

import asyncio
import os
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, Request, expect, sync_playwright

from app.domain import Delta, GenerationRequest, ModelInfo
from app.errors import CleaveError
from app.llm import LLM
from app.llm.extractive import ExtractiveEngine
from app.settings import AnswerSettings, APISettings, EmbeddingSettings
from tests.conftest import ServiceThread, sample_settings
from tests.scripted_llm import ScriptedLLM
from tests.system_setup import find_browser

# A busy machine encodes slowly; what is waited for is a condition, not a time.
expect.set_options(timeout=60_000)

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
]
MAX_FILE_BYTES = 2_000_000
QUESTION = "How long did the Reading Room outage on 14 October 2025 last?"

DROP = """(files) => {
  const transfer = new DataTransfer();
  for (const { name, text, size } of files) transfer.items.add(new File([text ?? "a ".repeat(size / 2)], name));
  for (const type of ["dragenter", "dragover", "drop"]) {
    document.body.dispatchEvent(new DragEvent(type, { dataTransfer: transfer, bubbles: true, cancelable: true }));
  }
}"""

NEEDS_BROWSER = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="no Chromium: run `python -m tests.system_setup` as root"),
]


class PlayedLLM:
    """Quotes from the passages, as the engine without a model does, or plays what it is given."""

    def __init__(self) -> None:
        self._current: LLM = ExtractiveEngine()

    def play(self, *script: str | CleaveError | asyncio.Event) -> ScriptedLLM:
        """Answer the following questions so."""
        self._current = scripted = ScriptedLLM(*script)
        return scripted

    def quote(self) -> None:
        """Quote again."""
        self._current = ExtractiveEngine()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        async with aclosing(self._current.generate(request)) as deltas:
            async for delta in deltas:
                yield delta

    async def info(self) -> ModelInfo:
        return ModelInfo(id="played", engine="played", context_window=2048)

    async def close(self) -> None:
        pass


class PageService:
    """A running service with the sample articles. Its text is streamed at once and checked at the end (`flag`)."""

    def __init__(self, data_dir: Path, embedding: EmbeddingSettings | None = None, key: str = "") -> None:
        settings = sample_settings(
            data_dir,
            answer=AnswerSettings(grounding="flag"),
            api=APISettings(max_file_bytes=MAX_FILE_BYTES),
            embedding=embedding or EmbeddingSettings(),
        )
        self.llm = PlayedLLM()
        self._thread = ServiceThread(settings, self.llm)
        self._thread.start()
        self._thread.wait_until_built()
        self.url = self._thread.url
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.client = httpx.Client(base_url=self.url, headers=headers, trust_env=False, timeout=180)
        self._seeded = self._document_ids()

    def let(self, event: asyncio.Event) -> None:
        """Set an event that a script waits for."""
        self._thread.call_soon(event.set)

    def cut_connections(self) -> None:
        """Break every connection off, as a failing network does."""
        self._thread.cut_connections()

    def restore(self) -> None:
        """Undo what a test has added, and end what it has left running: the next one would wait for it, or find it."""
        for one in self.client.get("/v1/ingestions", params={"limit": 100}).json()["data"]:
            self.client.post(f"/v1/ingestions/{one['id']}/cancel")
            self.client.get(f"/v1/ingestions/{one['id']}/events")  # Ends with the ingestion.
        for document_id in self._document_ids() - self._seeded:
            self.client.delete(f"/v1/documents/{quote(document_id, safe='')}")

    def stop(self) -> None:
        self.client.close()
        self._thread.stop()

    def _document_ids(self) -> set[str]:
        page = self.client.get("/v1/documents", params={"limit": 1000}).json()
        return {one["id"] for one in page["data"]}


@contextmanager
def open_browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=ARGUMENTS, env=dict(os.environ))
        yield browser
        browser.close()


def send(page: Page, question: str) -> None:
    """Ask without waiting for the answer."""
    page.fill("#question", question)
    page.keyboard.press("Enter")


def ask(page: Page, question: str) -> None:
    send(page, question)
    wait_for_end(page)


def wait_for_end(page: Page) -> None:
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("[aria-busy]")).to_have_count(0)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageService]:
    service = PageService(tmp_path_factory.mktemp("page"))
    yield service
    service.stop()


@pytest.fixture
def service(running: PageService) -> Iterator[PageService]:
    running.llm.quote()
    yield running
    running.restore()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as found:
        yield found


@pytest.fixture
def context(browser: Browser, service: PageService) -> Iterator[BrowserContext]:
    """A browser of its own, closed before the service is restored: what it still sends would come too late."""
    found = browser.new_context(viewport={"width": 1280, "height": 800})
    found.set_default_timeout(60_000)
    yield found
    found.close()


@pytest.fixture
def page(context: BrowserContext, service: PageService) -> Iterator[Page]:
    """The page. Whatever a test does, it asks no other server, and the console stays free of errors."""
    opened = context.new_page()
    complaints: list[str] = []
    asked: list[str] = []

    def listen(message: ConsoleMessage) -> None:
        # What the server refuses, the browser reports too: "Failed to load resource".
        if message.type == "error" and "Failed to load resource" not in message.text:
            complaints.append(message.text)

    def note(request: Request) -> None:
        asked.append(request.url)

    opened.on("console", listen)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("request", note)
    opened.goto(service.url)
    yield opened
    assert not complaints
    assert asked
    assert not [url for url in asked if not url.startswith(f"{service.url}/")]


@pytest.fixture
def add(service: PageService) -> Any:
    """Add documents."""

    def add(*documents: dict[str, Any]) -> None:
        answer = service.client.post("/v1/documents", json={"documents": documents}).json()
        assert [one["status"] for one in answer["data"]] == ["created"] * len(documents)

    return add
