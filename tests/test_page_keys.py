"""The chat page of a service that answers only to keys."""

import re
from collections.abc import Iterator

import pytest
from playwright.sync_api import Locator, Page, expect

from app.keys import create_key, keys_path
from app.settings import EmbeddingSettings, Settings
from tests.page_service import (
    DROP,
    NEEDS_BROWSER,
    QUESTION,
    PageService,
    ask,
    browser,
    context,
    page,
    send,
    service,
    wait_for_end,
)
from tests.tiny_models import make_encoder
from tests.waiting import wait_until

pytestmark = NEEDS_BROWSER

KEYS: list[str] = []
NUM_REQUESTS = 3
"""Of the page, when it is opened: models, documents, facets."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PageService]:
    folder = tmp_path_factory.mktemp("keyed-page")
    path = keys_path(Settings(data_dir=folder))
    KEYS.append(create_key(path, "reader", read=["default"], write=["default"], dialect="markdown")[1])
    encoder = make_encoder(tmp_path_factory.mktemp("models") / "encoder")
    service = PageService(folder, EmbeddingSettings(model=str(encoder), dtype="float32"), KEYS[-1])
    yield service
    service.stop()


def dialog_of(page: Page) -> Locator:
    return page.get_by_role("dialog", name="Key")


def wait_for_refusals(page: Page, number: int) -> None:
    """Wait for all requests that are refused: one that is late would ask for the key again."""
    refused = "performance.getEntriesByType('resource').filter(({ responseStatus }) => responseStatus === 401).length"
    wait_until(lambda: page.evaluate(refused) == number)


def test_a_key_is_asked_for_and_kept_in_the_tab(page: Page) -> None:
    dialog = dialog_of(page)
    expect(dialog).to_contain_text("This service needs a key")
    wait_for_refusals(page, NUM_REQUESTS)
    expect(page.locator("#key")).to_be_focused()
    page.keyboard.type("a wrong one")
    page.keyboard.press("Enter")
    expect(dialog).to_contain_text("This key is not valid here")
    wait_for_refusals(page, 2 * NUM_REQUESTS)
    expect(page.locator("#key")).to_be_focused()
    page.keyboard.type(KEYS[0])
    page.keyboard.press("Enter")
    expect(dialog).to_be_hidden()
    expect(page.locator("#document-count")).to_have_text("14")
    ask(page, QUESTION)
    expect(page.locator(".source-card")).not_to_have_count(0)
    expect(page.locator(".turn hr")).to_have_count(0)  # What the list of sources of the key's dialect begins with.
    page.evaluate(DROP, [{"name": "keyed.md", "text": "The cellar door is green."}])
    expect(page.locator(".upload .outcome")).to_have_text("created, 1 chunk")
    page.get_by_role("button", name="keyed", exact=True).click()
    expect(page.locator("#reader-text")).to_have_text("The cellar door is green.")
    page.reload()
    ask(page, QUESTION)
    expect(page.locator(".source-card")).not_to_have_count(0)
    expect(dialog).to_be_hidden()
    assert page.evaluate("localStorage.length") == 0
    assert KEYS[0] not in page.content()


def test_without_a_key_the_page_says_what_is_missing(page: Page) -> None:
    wait_for_refusals(page, NUM_REQUESTS)
    dialog_of(page).get_by_role("button", name="Cancel").click()
    expect(dialog_of(page)).to_be_hidden()
    send(page, QUESTION)
    expect(dialog_of(page)).to_be_visible()
    page.keyboard.press("Escape")
    wait_for_end(page)
    expect(page.locator(".error")).to_contain_text("This service needs a key")
    expect(page.locator(".error")).to_contain_text(re.compile("HTTP 401"))
    page.click(".error .retry")
    expect(page.locator("#key")).to_be_focused()
    page.keyboard.type(KEYS[0])
    page.keyboard.press("Enter")
    expect(page.locator(".source-card")).not_to_have_count(0)
