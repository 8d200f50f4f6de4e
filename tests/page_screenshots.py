"""Make the screenshots of docs/page: `python -m tests.page_screenshots`."""

import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, expect

from app.errors import LLMUnavailable
from tests.page_service import DROP, QUESTION, PageService, ask, open_browser

FOLDER = Path(__file__).parent.parent / "docs" / "page"
DESK = {"width": 1200, "height": 640}
PHONE = {"width": 390, "height": 760}
COLOURS = 128


def answer(page: Page, service: PageService) -> None:
    ask(page, QUESTION)
    page.click(".trace summary")
    page.hover(".marker")


def flagged(page: Page, service: PageService) -> None:
    service.llm.play("The outage lasted 52 minutes [1]. It began with a lightning strike in Aberdeen.")
    ask(page, QUESTION)
    page.click(".unsupported summary")
    page.hover("h1")


def degraded(page: Page, service: PageService) -> None:
    service.llm.play(LLMUnavailable("Away."))
    ask(page, "How many requests failed during the Reading Room outage?")


def refused(page: Page, service: PageService) -> None:
    ask(page, "Who won the 1998 football World Cup?")


def document(page: Page, service: PageService) -> None:
    ask(page, QUESTION)
    page.locator(".source-card.cited .title button").click()
    expect(page.locator(".cited-passage")).to_be_visible()


def filters(page: Page, service: PageService) -> None:
    page.click("#open-filters")
    page.get_by_label("Noor Hallivant").check()


def documents(page: Page, service: PageService) -> None:
    files = [
        {"name": "boiler.md", "text": "# Boiler\n\nThe spare key hangs behind the boiler."},
        {"name": "photo.md", "text": "\x89PNG\0\0"},
    ]
    page.evaluate(DROP, files)
    expect(page.locator(".upload.failed")).to_be_visible()
    expect(page.locator("#documents-total")).to_have_text("15 documents")


STATES: list[tuple[str, Callable[[Page, PageService], None], dict[str, Any]]] = [
    ("answer", answer, {"viewport": DESK}),
    ("answer-dark", answer, {"viewport": DESK, "color_scheme": "dark"}),
    ("answer-phone", answer, {"viewport": PHONE, "color_scheme": "dark"}),
    ("flagged", flagged, {"viewport": DESK}),
    ("degraded", degraded, {"viewport": DESK}),
    ("refused", refused, {"viewport": DESK}),
    ("document", document, {"viewport": DESK}),
    ("filters", filters, {"viewport": DESK}),
    ("documents", documents, {"viewport": DESK}),
]


def write_screenshots(browser: Browser, service: PageService) -> None:
    """Show each state in a page of its own."""
    for name, show, options in STATES:
        context = browser.new_context(reduced_motion="reduce", **options)
        page = context.new_page()
        page.goto(service.url)
        service.llm.quote()
        show(page, service)
        picture = Image.open(io.BytesIO(page.screenshot()))
        path = FOLDER / f"{name}.png"
        picture.convert("RGB").quantize(COLOURS).save(path, optimize=True)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
        context.close()


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        service = PageService(Path(folder))
        try:
            with open_browser() as browser:
                write_screenshots(browser, service)
        finally:
            service.stop()


if __name__ == "__main__":
    main()
