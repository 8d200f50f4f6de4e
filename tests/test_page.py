"""The chat page in a real browser, against a real service."""

import os
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import ConsoleMessage, Page, sync_playwright

from tests.browser_setup import find_browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="no Chromium: run `python -m tests.browser_setup` as root"),
]

ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-quic",
]
ATTACK = "<img src=x onerror=\"document.title='owned'\"> The password of the lighthouse keeper is herring."


@pytest.fixture
def page(live_service: str) -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=ARGUMENTS, env=dict(os.environ))
        page = browser.new_page()
        complaints: list[str] = []

        def listen(message: ConsoleMessage) -> None:
            if message.type == "error":
                complaints.append(message.text)

        page.on("console", listen)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(live_service)
        yield page
        browser.close()
        assert not complaints


def ask(page: Page, question: str) -> None:
    page.fill("#question", question)
    page.click("#send")
    page.wait_for_selector(".answer .status:not(:empty)")
    page.wait_for_selector("#stop", state="hidden")


def test_an_answer_is_shown_with_its_sources(page: Page) -> None:
    ask(page, "How long did the Reading Room outage on 14 October 2025 last?")
    assert "52 minutes" in page.inner_text(".answer .body")
    page.click(".answer .marker[data-n='1']")
    assert "Post-mortem" in page.inner_text(".source-card[data-n='1']")


def test_a_question_that_the_documents_do_not_answer_is_shown_as_such(page: Page) -> None:
    ask(page, "Who won the 1998 football World Cup?")
    assert "do not hold" in page.inner_text(".answer")


def test_a_document_cannot_run_script_in_the_page(page: Page, live_service: str) -> None:
    document = {
        "id": "attack",
        "title": "<script>document.title='owned'</script>",
        "text": ATTACK,
        "url": "javascript:1",
    }
    added = httpx.post(f"{live_service}/v1/documents", json={"documents": [document]}, trust_env=False)
    assert added.json()["data"][0]["status"] == "created"
    try:
        ask(page, "What is the password of the lighthouse keeper?")
        assert "herring" in page.inner_text(".answer")
        assert page.title() != "owned"
        assert page.locator(".answer img, .answer script, .answer a[href^='javascript:']").count() == 0
    finally:
        httpx.delete(f"{live_service}/v1/documents/attack", trust_env=False)


def test_files_are_uploaded_and_reported_one_by_one(page: Page, tmp_path: Path) -> None:
    good, bad = tmp_path / "note.md", tmp_path / "photo.md"
    good.write_text("# Note\n\nThe spare key hangs behind the boiler.", encoding="utf-8")
    bad.write_bytes(b"\x89PNG\x00\x00")
    page.click("#open-documents")
    page.set_input_files("#file-input", [good, bad])
    page.wait_for_selector("#upload-results li.done")
    page.wait_for_selector("#upload-results li.failed")
    assert "note.md" in page.inner_text("#upload-results li.done")


def test_the_address_of_a_chunk_opens_its_document_there(page: Page, live_service: str) -> None:
    text = "\n\n".join(f"## Night {n}\n\n" + f"On night {n} the keeper wrote of lamps. " * 20 for n in range(30))
    document = {"id": "nights/of <b>.md", "title": "Nights", "text": text}
    with httpx.Client(base_url=live_service, trust_env=False, timeout=60) as client:
        client.post("/v1/documents", json={"documents": [document]})
        chunks = client.get("/v1/documents/nights/of%20%3Cb%3E.md").json()["chunks"]
        page.goto(f"{live_service}/v1/documents/nights/of%20%3Cb%3E.md#{len(chunks) - 3}")
        marked = page.locator("span:target")
        assert marked.text_content() == chunks[-3]["text"]
        colours = marked.evaluate("one => [one, document.body].map(each => getComputedStyle(each).backgroundColor)")
        assert colours[0] != colours[1]
        assert page.evaluate("window.scrollY") > 0
        client.delete("/v1/documents/nights/of%20%3Cb%3E.md")
