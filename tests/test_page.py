"""The chat page in a real browser, against a real service."""

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import BrowserContext, Locator, Page, expect

from app.chat import REFUSAL
from app.domain import Message
from app.errors import LLMUnavailable
from tests.node_setup import find_package
from tests.page_service import (
    DROP,
    MAX_FILE_BYTES,
    NEEDS_BROWSER,
    QUESTION,
    PageService,
    add,
    ask,
    browser,
    context,
    page,
    running,
    send,
    service,
    wait_for_end,
)
from tests.waiting import wait_until

pytestmark = NEEDS_BROWSER

ROOT = Path(__file__).parent.parent
FACT = "The Reading Room outage on 14 October 2025 lasted 52 minutes, from 14:06 to 14:58."
ELSEWHERE = "Who won the 1998 football World Cup?"
PHONE = {"width": 360, "height": 740}
NETWORK = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}


def summary(page: Page) -> Locator:
    return page.locator(".turn").last.locator(".status .summary")


def is_active(page: Page, selector: str) -> bool:
    return bool(page.evaluate("(selector) => document.activeElement.matches(selector)", selector))


def tab_to(page: Page, selector: str, *, key: str = "Tab") -> None:
    """Press the key until the focus is there, as somebody without a mouse does."""
    for _ in range(40):
        if is_active(page, selector):
            return
        page.keyboard.press(key)
    raise AssertionError(f"{key} does not lead to {selector}")


def no_sideways_scroll(page: Page) -> bool:
    return bool(page.evaluate("document.documentElement.scrollWidth <= innerWidth"))


# --- Asking ----------------------------------------------------------------------------------------------------------


def test_an_answer_is_shown_with_its_source(page: Page) -> None:
    ask(page, QUESTION)
    expect(page.locator(".body")).to_contain_text("52 minutes")
    expect(summary(page)).to_contain_text("Quoted from the sources")
    card = page.locator(".source-card.cited")
    expect(card).to_have_count(1)
    expect(card.locator("a")).to_have_attribute("href", re.compile("^https://wiki.lanternfish.example/"))
    expect(card).to_contain_text("Noor Hallivant")
    expect(page.locator("#announcer")).to_contain_text("52 minutes")
    expect(page.locator("#question")).to_be_focused()


def test_the_examples_are_answered_by_the_sample_documents(page: Page) -> None:
    expect(page.locator("#examples button")).to_have_count(3)
    page.locator("#examples button").last.click()
    wait_for_end(page)
    expect(page.locator(".asked")).to_contain_text("Noor Hallivant")
    expect(page.locator(".scope")).to_contain_text("Noor Hallivant")
    expect(page.locator(".source-card.cited")).not_to_have_count(0)
    expect(page.locator("#welcome")).to_be_hidden()


def test_an_answer_grows_while_it_streams(page: Page, service: PageService) -> None:
    half, rest = asyncio.Event(), asyncio.Event()
    service.llm.play("The outage ", half, "lasted **52** ", rest, "minutes. [1]")
    send(page, QUESTION)
    body = page.locator(".body")
    expect(body).to_have_text("The outage ")
    expect(page.locator(".answer")).to_have_attribute("aria-busy", "true")
    expect(page.locator("#stop")).to_be_visible()
    service.let(half)
    expect(body.locator("strong")).to_have_text("52")
    expect(page.locator("#stop")).to_be_visible()
    service.let(rest)
    wait_for_end(page)
    expect(body).to_have_text("The outage lasted 52 minutes.1")


def test_a_selection_survives_the_rest_of_the_answer(page: Page, service: PageService) -> None:
    rest = asyncio.Event()
    service.llm.play("The outage lasted", rest, " 52 minutes. [1]")
    send(page, QUESTION)
    expect(page.locator(".body")).to_have_text("The outage lasted")
    page.evaluate("getSelection().selectAllChildren(document.querySelector('.body p'))")
    service.let(rest)
    wait_for_end(page)
    assert page.evaluate("getSelection().toString()").startswith("The outage lasted")


def test_a_follow_up_is_asked_with_what_came_before(page: Page, service: PageService) -> None:
    script = service.llm.play("It lasted 52 minutes. [1]")
    ask(page, QUESTION)
    ask(page, "And how many requests failed?")
    expect(page.locator(".turn")).to_have_count(2)
    assert script.requests[-1].messages == (
        Message("user", QUESTION),
        Message("assistant", "It lasted 52 minutes. [1]"),
        Message("user", "And how many requests failed?"),
    )
    expect(page.locator(".turn .retry")).to_have_count(1)
    page.click("#new-conversation")
    expect(page.locator(".turn")).to_have_count(0)
    ask(page, QUESTION)
    assert script.requests[-1].messages == (Message("user", QUESTION),)


def test_a_stopped_answer_keeps_its_text_and_can_be_asked_again(page: Page, service: PageService) -> None:
    script = service.llm.play("The outage lasted", asyncio.Event(), " for ever.")
    send(page, QUESTION)
    expect(page.locator(".body")).to_have_text("The outage lasted")
    page.click("#stop")
    expect(summary(page)).to_have_text("Stopped. What is here was not checked.")
    expect(page.locator(".body")).to_have_text("The outage lasted")
    expect(page.locator("#question")).to_be_focused()
    service.llm.play("It lasted 52 minutes. [1]")
    page.click(".retry")
    expect(page.locator(".body")).to_have_text("It lasted 52 minutes.1")
    wait_until(script.closed.is_set)
    assert script.num_played == 1


def test_escape_stops_an_answer_before_it_begins(page: Page, service: PageService) -> None:
    script = service.llm.play(asyncio.Event(), "Never.")
    send(page, QUESTION)
    expect(summary(page)).to_contain_text("Searching")
    page.wait_for_function("performance.getEntriesByType('resource').length > 0")
    page.keyboard.press("Escape")
    expect(summary(page)).to_have_text("Stopped before an answer came.")
    expect(page.locator("#send")).to_be_visible()
    assert script.num_played == 0


def test_a_new_conversation_ends_the_answer_that_is_running(page: Page, service: PageService) -> None:
    service.llm.play("The outage", asyncio.Event(), "Never.")
    send(page, QUESTION)
    expect(page.locator(".body")).to_have_text("The outage")
    page.click("#new-conversation")
    expect(page.locator(".turn")).to_have_count(0)
    service.llm.quote()
    ask(page, QUESTION)
    expect(page.locator(".turn")).to_have_count(1)
    expect(summary(page)).to_contain_text("Quoted from the sources")


# --- Sources ---------------------------------------------------------------------------------------------------------


def test_a_marker_marks_the_cited_sentence_on_hover_and_on_focus(page: Page) -> None:
    ask(page, QUESTION)
    marker, cited = page.locator(".marker"), page.locator(".source-card mark")
    expect(cited).to_have_text(FACT)
    expect(cited).to_be_visible()
    expect(cited).not_to_have_class("lit")
    marker.hover()
    expect(cited).to_have_class("lit")
    page.hover("h1")
    expect(cited).to_have_class("")
    marker.focus()
    expect(cited).to_have_class("lit")
    page.focus("#question")
    expect(cited).to_have_class("")
    page.hover(".source-card .title")
    expect(cited).to_have_class("lit")
    expect(marker).to_have_class("marker lit")


def test_each_marker_marks_its_own_sentence(page: Page, service: PageService) -> None:
    service.llm.play("It was down for 52 minutes. [1] In all, 6,340 requests failed [1].")
    ask(page, QUESTION)
    first, second = page.locator(".marker").all()
    first.hover()
    expect(page.locator("mark.lit")).to_contain_text("52 minutes")
    second.hover()
    expect(page.locator("mark.lit")).to_contain_text("6,340 requests failed")
    expect(page.locator("mark.lit")).not_to_contain_text("52 minutes")


def test_an_answer_is_read_out_without_the_numbers_of_its_markers(page: Page, service: PageService) -> None:
    service.llm.play("It lasted until 14:58 [1].")
    ask(page, QUESTION)
    expect(page.locator(".body")).to_have_text("It lasted until 14:581.")
    expect(page.locator("#announcer")).to_contain_text("It lasted until 14:58. ")


def test_a_marker_moves_to_its_card_and_opens_what_is_folded(page: Page, service: PageService) -> None:
    service.llm.play("The outage lasted 52 minutes. [1]")
    ask(page, QUESTION)
    page.click(".marker")
    card = page.locator(".source-card[data-n='1']")
    expect(card).to_be_focused()
    expect(card.locator("mark")).to_have_class("lit")
    assert page.url.endswith("/")
    whole = card.locator(".toggle")
    expect(card).not_to_contain_text("archives of 38 museums", use_inner_text=True)
    whole.click()
    expect(whole).to_have_attribute("aria-expanded", "true")
    expect(card).to_contain_text("archives of 38 museums", use_inner_text=True)
    page.click(".retrieved summary")
    expect(page.locator(".retrieved .source-card").first).to_be_visible()


def test_the_nearest_sentence_is_found_by_its_rare_words(page: Page) -> None:
    nearest = """async ([statement, sentences]) => {
      const { nearest } = await import("/web/support.js");
      return nearest(statement, sentences);
    }"""
    sentences = ["The cache has 40 GB.", "The cache of the larger card took 13.7 GiB.", "Die Brücke wurde 1901 gebaut."]
    assert page.evaluate(nearest, ["The larger card's cache took 13.7 GiB", sentences]) == 1
    assert page.evaluate(nearest, ["The bridge was built in 1901", sentences[2:]]) is None
    assert page.evaluate(nearest, ["Die Brücken, gebaut 1901", sentences]) == 2
    assert page.evaluate(nearest, ["", sentences]) is None
    assert page.evaluate(nearest, ["anything", []]) is None


# --- Honest states ---------------------------------------------------------------------------------------------------


def test_a_question_that_the_documents_do_not_answer_is_shown_as_refused(page: Page) -> None:
    ask(page, ELSEWHERE)
    expect(page.locator(".body")).to_have_text(REFUSAL)
    expect(summary(page)).to_have_attribute("data-state", "refused")
    expect(page.locator(".refusal")).to_contain_text("Nothing that was found is about this.")
    expect(page.locator(".retrieved summary")).to_contain_text("Nearest passages, none holds an answer")
    expect(page.locator(".source-card.cited")).to_have_count(0)


def test_an_answer_without_the_model_is_shown_as_degraded(page: Page, service: PageService) -> None:
    service.llm.play(LLMUnavailable("The language model is away."))
    ask(page, QUESTION)
    expect(page.locator(".body")).to_contain_text("52 minutes")
    expect(summary(page)).to_contain_text("Quoted from the sources")
    expect(page.locator(".warning")).to_have_text("Degraded: The language model is not available.")


def test_sentences_without_support_are_listed(page: Page, service: PageService) -> None:
    service.llm.play("The outage lasted 52 minutes. [1] The moon is made of cheese. [1]")
    ask(page, QUESTION)
    expect(summary(page)).to_have_attribute("data-state", "flagged")
    page.click(".unsupported summary")
    expect(page.locator(".unsupported li")).to_have_text("The moon is made of cheese.")


def test_an_error_in_the_middle_is_shown_and_can_be_tried_again(page: Page, service: PageService) -> None:
    service.llm.play("The outage lasted", LLMUnavailable("The engine's process has ended."))
    ask(page, QUESTION)
    expect(page.locator(".body")).to_have_text("The outage lasted")
    expect(summary(page)).to_have_text("The answer is incomplete and was not checked.")
    expect(page.locator(".error")).to_contain_text("The engine's process has ended.")
    service.llm.quote()
    page.click(".error .retry")
    wait_for_end(page)
    expect(page.locator(".error")).to_have_count(0)
    expect(page.locator(".body")).to_contain_text("52 minutes")


def test_a_lost_connection_is_shown(page: Page, context: BrowserContext) -> None:
    context.set_offline(True)
    send(page, QUESTION)
    expect(page.locator(".error")).to_contain_text("The server cannot be reached.")
    context.set_offline(False)
    page.click(".error .retry")
    expect(page.locator(".body")).to_contain_text("52 minutes")


def test_a_connection_that_is_lost_in_the_middle_is_shown(page: Page, service: PageService) -> None:
    service.llm.play("The outage lasted", asyncio.Event(), " for ever.")
    send(page, QUESTION)
    expect(page.locator(".body")).to_have_text("The outage lasted")
    service.cut_connections()
    expect(page.locator(".error")).to_contain_text("The connection to the server was lost.")
    expect(page.locator(".body")).to_have_text("The outage lasted")
    expect(summary(page)).to_have_text("The answer is incomplete and was not checked.")
    service.llm.quote()
    page.click(".error .retry")
    wait_for_end(page)
    expect(page.locator(".body")).to_contain_text("52 minutes")


def test_the_stages_are_shown_with_their_times(page: Page) -> None:
    ask(page, QUESTION)
    expect(page.locator(".timings")).to_be_hidden()
    page.click(".trace summary")
    for stage in ("retrieve", "retrieve.embed", "retrieve.search", "first_token", "total"):
        expect(page.locator(f".timings [data-stage='{stage}'] .time")).to_have_text(re.compile(r"^[\d.]+ m?s$"))
    assert page.locator("[data-stage='total'] .bar-of-time").bounding_box()["width"] > 50  # type: ignore[index]


def test_every_reason_of_a_degraded_answer_has_words(page: Page) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    row = next(line for line in readme.splitlines() if line.startswith("| `degraded`"))
    worded = page.evaluate("import('/web/status.js').then(({ DEGRADED }) => Object.keys(DEGRADED))")
    assert set(worded) == set(re.findall(r"`(\w+)`", row)) - {"degraded"}


# --- Filters ---------------------------------------------------------------------------------------------------------


def test_a_chosen_author_narrows_the_search(page: Page) -> None:
    page.click("#open-filters")
    page.get_by_label("Teodor Vaskelin").check()
    page.get_by_role("button", name="Done").click()
    expect(page.locator("#chosen-filters")).to_have_text("author: Teodor Vaskelin")
    ask(page, "What did capping max_num_seqs do?")
    expect(page.locator(".scope")).to_have_text("Searched only documents with author Teodor Vaskelin.")
    bylines = page.locator(".source-card .small:first-of-type, .source-card .title + .small").all_text_contents()
    assert bylines
    assert all("Teodor Vaskelin" in byline for byline in bylines)
    page.click(".chip")
    expect(page.locator(".chip")).to_have_count(0)
    page.click("#open-filters")
    expect(page.get_by_label("Teodor Vaskelin")).not_to_be_checked()


def test_values_of_several_fields_are_offered_with_their_numbers(page: Page) -> None:
    page.click("#open-filters")
    author = page.locator(".facet", has_text="author")
    expect(author).to_have_attribute("open", "")
    expect(author.locator("li", has_text="Noor Hallivant")).to_contain_text("4")
    page.get_by_label("Noor Hallivant").check()
    page.get_by_label("Tail Latency Letters").check()
    page.keyboard.press("Escape")
    expect(page.locator(".chip")).to_have_count(2)
    ask(page, QUESTION)
    expect(page.locator(".body")).to_contain_text("No document matches the filters")
    expect(page.locator(".refusal")).to_have_text("No document matches the filters.")
    page.click("#open-filters")
    page.click("#clear-filters")
    expect(page.locator(".chip")).to_have_count(0)


def test_a_filter_that_the_question_names_is_told_and_can_be_lifted(page: Page) -> None:
    ask(page, "What did Teodor Vaskelin write about the Reading Room outage?")
    scope = page.locator(".scope")
    expect(scope).to_contain_text("Searched only documents with author Teodor Vaskelin, as the question names.")
    scope.get_by_role("button", name="Search all").click()
    wait_for_end(page)
    expect(scope).to_be_empty()
    ask(page, "What did Marit Oldershaw write about it?")
    expect(page.locator(".scope").last).to_contain_text("author Marit Oldershaw")
    ask(page, QUESTION)
    expect(page.locator(".scope button")).to_have_count(0)


# --- Documents -------------------------------------------------------------------------------------------------------


def test_files_are_dropped_with_progress_and_reported_one_by_one(page: Page, context: BrowserContext) -> None:
    lines = "\n".join(json.dumps({"id": f"dropped/{n}", "text": f"Locker {n} is {n * 7} cm wide."}) for n in range(40))
    network = context.new_cdp_session(page)
    # So slow that the large file is still on its way when it is cancelled, however slow the machine is.
    slow = {**NETWORK, "uploadThroughput": MAX_FILE_BYTES / 60}
    network.send("Network.emulateNetworkConditions", slow)
    page.evaluate(
        DROP,
        [
            {"name": "large.md", "size": MAX_FILE_BYTES},
            {"name": "lockers.jsonl", "text": lines},
            {"name": "photo.md", "text": "\x89PNG\0\0"},
            {"name": "too-large.md", "size": MAX_FILE_BYTES + 2},
        ],
    )
    expect(page.locator("#documents-dialog")).to_be_visible()
    expect(page.locator(".upload")).to_have_count(4)
    large, lockers, photo, too_large = page.locator(".upload").all()
    expect(large.locator(".outcome")).to_have_text(re.compile(r"sending, [1-9]\d?%"))
    assert 0 < large.locator("progress").evaluate("(bar) => bar.value") < 1
    expect(lockers.locator(".outcome")).to_have_text("waiting")
    page.get_by_role("button", name="Cancel large.md").click()
    expect(large.locator(".outcome")).to_have_text("cancelled")
    network.send("Network.emulateNetworkConditions", NETWORK)
    expect(lockers.locator(".outcome")).to_have_text("40 created")
    expect(photo).to_have_class("upload failed")
    expect(photo.locator(".outcome")).to_contain_text("photo.md: holds NUL bytes")
    expect(too_large).to_have_class("upload failed")
    expect(page.locator("#documents-total")).to_have_text("54 documents")
    expect(page.locator(".upload progress")).to_have_count(0)
    expect(page.locator("#announcer")).to_contain_text("too-large.md: failed")
    page.keyboard.press("Escape")
    ask(page, "How wide is locker 31?")
    expect(page.locator(".body")).to_contain_text("217 cm")


def test_an_upload_is_cancelled_while_it_waits_and_after_it_was_sent(
    page: Page, context: BrowserContext, service: PageService
) -> None:
    busy = {"documents": [{"id": f"busy/{n}", "text": "word " * 20_000} for n in range(20)]}
    service.client.post("/v1/documents", params={"background": True}, json=busy).raise_for_status()
    network = context.new_cdp_session(page)
    network.send("Network.emulateNetworkConditions", {**NETWORK, "latency": 600_000})
    page.evaluate(DROP, [{"name": "sent.md", "text": "Sent."}, {"name": "waiting.md", "text": "Waiting."}])
    expect(page.locator(".upload")).to_have_count(2)
    sent, waiting = page.locator(".upload").all()
    expect(sent.locator(".outcome")).to_have_text("reading and indexing")
    expect(waiting.locator(".outcome")).to_have_text("waiting")
    waiting.get_by_role("button", name="Cancel").click()
    expect(waiting.locator(".outcome")).to_have_text("cancelling")
    sent.get_by_role("button", name="Cancel").click()
    expect(page.locator("#file-input")).to_be_focused()
    # The server has it, though the browser does not know yet: only the server can end that.
    network.send("Network.emulateNetworkConditions", NETWORK)
    expect(sent.locator(".outcome")).to_have_text("cancelled")
    expect(waiting.locator(".outcome")).to_have_text("cancelled")
    expect(page.locator(".upload.failed")).to_have_count(0)
    ended = service.client.get("/v1/ingestions", params={"limit": 2}).json()["data"]
    assert [one["status"] for one in ended] == ["cancelled", "running"]


def test_files_are_chosen_too(page: Page, tmp_path: Path) -> None:
    note = tmp_path / "chosen.md"
    note.write_text("# Keys\n\nThe spare key hangs behind the boiler.", encoding="utf-8")
    page.click("#open-documents")
    page.set_input_files("#file-input", note)
    expect(page.locator(".upload .outcome")).to_have_text("created, 1 chunk")
    expect(page.locator(".document-row[data-id='chosen.md']")).to_be_visible()


def test_a_document_is_listed_and_deleted_after_asking(page: Page, add: Any) -> None:
    add({"id": "lighthouse", "title": "The lighthouse", "text": "The lighthouse keeper is Bram Odd."})
    page.click("#open-documents")
    row = page.locator(".document-row[data-id='lighthouse']")
    expect(row).to_contain_text("The lighthouse")
    row.get_by_role("button", name="Delete The lighthouse").click()
    expect(row.get_by_role("button", name="Keep")).to_be_focused()
    page.keyboard.press("Enter")
    expect(row.get_by_role("button", name="Delete The lighthouse")).to_be_focused()
    page.keyboard.press("Enter")
    row.get_by_role("button", name="Delete for good: The lighthouse").click()
    expect(row).to_have_count(0)
    expect(page.locator("#announcer")).to_have_text("Deleted The lighthouse.")
    assert not is_active(page, "body")


def test_a_long_list_comes_in_pages(page: Page, add: Any) -> None:
    add(*({"id": f"page-{n}", "title": f"Page {n}", "text": f"Text {n}."} for n in range(40)))
    page.click("#open-documents")
    expect(page.locator(".document-row")).to_have_count(50)
    page.evaluate("const more = document.getElementById('more-documents'); more.click(); more.click()")
    expect(page.locator("#more-documents")).to_be_hidden()
    names = page.locator(".document-row").evaluate_all("(rows) => rows.map((row) => row.dataset.id)")
    assert len(names) == len(set(names)) >= 54


def test_the_title_of_a_source_opens_the_document_at_its_passage(page: Page, add: Any) -> None:
    text = "🗼" + "\n\n".join(f"## Night {n}\n\n" + f"On night {n} the *keeper* wrote. " * 20 for n in range(30))
    add({"id": "nights/of <b>.md", "title": "Nights", "text": text, "url": "not an address"})
    ask(page, "What did the keeper write on night 27?")
    card = page.locator(".source-card.cited").first
    passage = card.locator(".passage").text_content()
    title = card.get_by_role("button", name="Nights")
    title.click()
    cited = page.get_by_role("dialog", name="Nights").locator(".cited-passage")
    expect(cited).to_have_text(str(passage))
    expect(cited).to_be_in_viewport()
    expect(page.locator("#reader-text")).to_contain_text("On night 3 the keeper wrote.")
    expect(page.locator("#reader-dialog a")).to_have_count(0)
    page.keyboard.press("Escape")
    expect(title).to_be_focused()


def test_a_document_that_is_gone_says_so(page: Page, add: Any, service: PageService) -> None:
    add({"id": "lighthouse", "title": "The lighthouse", "text": "The lighthouse keeper is Bram Odd."})
    page.click("#open-documents")
    title = page.get_by_role("button", name="The lighthouse", exact=True)
    title.click()
    expect(page.locator("#reader-text")).to_have_text("The lighthouse keeper is Bram Odd.")
    page.keyboard.press("Escape")
    service.client.delete("/v1/documents/lighthouse")
    title.click()
    expect(page.locator("#reader-text .error")).to_contain_text("lighthouse")
    expect(page.locator("#reader-text .error")).to_contain_text("HTTP 404")


# --- Whoever has no mouse, a small screen, a dark room ---------------------------------------------------------------


def test_everything_is_done_by_keyboard(page: Page) -> None:
    expect(page.locator("#question")).to_be_focused()
    page.keyboard.type(QUESTION)
    page.keyboard.press("Enter")
    wait_for_end(page)
    tab_to(page, ".marker", key="Shift+Tab")
    expect(page.locator("mark.lit")).to_have_text(FACT)
    page.keyboard.press("Enter")
    expect(page.locator(".source-card.cited")).to_be_focused()
    tab_to(page, ".toggle")
    page.keyboard.press("Enter")
    expect(page.locator(".passage.whole")).to_have_count(1)
    tab_to(page, "#open-filters")
    page.keyboard.press("Enter")
    expect(page.locator(".facet").first).to_be_visible()
    tab_to(page, ".facet input")
    page.keyboard.press("Space")
    expect(page.locator(".chip")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(page.locator("#open-filters")).to_be_focused()
    tab_to(page, ".chip", key="Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#question")).to_be_focused()
    tab_to(page, "#open-documents", key="Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#documents-dialog")).to_be_visible()
    tab_to(page, "#file-input")
    page.keyboard.press("Escape")
    expect(page.locator("#open-documents")).to_be_focused()
    tab_to(page, ".skip", key="Shift+Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#question")).to_be_focused()


def test_shift_and_enter_starts_a_new_line(page: Page) -> None:
    page.keyboard.type("One")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    expect(page.locator("#question")).to_have_value("One\ntwo")
    expect(page.locator(".turn")).to_have_count(0)


def test_a_phone_never_scrolls_sideways(page: Page, service: PageService) -> None:
    page.set_viewport_size(PHONE)  # type: ignore[arg-type]
    assert no_sideways_scroll(page)
    cells = " | ".join(f"column {n}" for n in range(12))
    table = f"| {cells} |\n|{'---|' * 12}\n| {cells} |"
    service.llm.play(f"A {'very' * 60}long word [1], `{'code' * 40}`\n\n```\n{'line ' * 60}\n```\n\n{table}")
    ask(page, QUESTION)
    expect(page.locator(".body table")).to_have_count(1)
    page.click(".trace summary")
    page.click(".retrieved summary")
    assert no_sideways_scroll(page)
    page.click("#open-documents")
    expect(page.locator(".document-row").first).to_be_visible()
    assert page.locator("#documents-dialog").evaluate("(dialog) => dialog.scrollWidth <= innerWidth")
    page.keyboard.press("Escape")
    page.click("#open-filters")
    expect(page.locator(".facet").first).to_be_visible()
    assert no_sideways_scroll(page)


@pytest.mark.parametrize("size", [PHONE, {"width": 640, "height": 400}, {"width": 320, "height": 256}])
def test_question_and_answer_stay_in_view_above_the_sources(page: Page, size: Any) -> None:
    page.set_viewport_size(size)
    ask(page, QUESTION)
    ask(page, ELSEWHERE)
    ask(page, "How many requests failed during the Reading Room outage?")
    expect(page.locator(".source-card.cited").last).to_be_visible()
    expect(page.locator(".body").last).to_be_in_viewport()
    expect(page.locator(".status").last).to_be_in_viewport()
    if size["height"] > 300:
        expect(page.locator(".asked").last).to_be_in_viewport(ratio=1)
    covering = "document.elementFromPoint(160, innerHeight / 3).closest('.bar')"
    assert page.evaluate(covering) is None


def test_a_long_answer_is_followed_until_the_reader_scrolls_away(page: Page, service: PageService) -> None:
    more, rest = asyncio.Event(), asyncio.Event()
    service.llm.play("A paragraph.\n\n" * 40, more, "Another paragraph.\n\n" * 40, rest, "The end.")
    send(page, QUESTION)
    expect(page.locator(".body p")).to_have_count(40)
    expect(page.locator(".status")).to_be_in_viewport()
    service.let(more)
    expect(page.locator(".body p")).to_have_count(80)
    expect(page.locator(".status")).to_be_in_viewport()
    page.evaluate("scrollTo(0, 0)")
    service.let(rest)
    wait_for_end(page)
    assert page.evaluate("scrollY") == 0


def test_each_paragraph_runs_in_its_own_direction(page: Page, service: PageService) -> None:
    service.llm.play("It lasted 52 minutes.\n\nזה נמשך 52 דקות.\n\n```\ncode\n```")
    ask(page, QUESTION)
    first_letters = """() => [...document.querySelectorAll(".body p, .body code")].map((block) => {
      const range = document.createRange();
      range.setStart(block.firstChild, 0);
      range.setEnd(block.firstChild, 1);
      const around = document.querySelector(".body").getBoundingClientRect();
      return range.getBoundingClientRect().left < around.left + around.width / 2;
    })"""
    assert page.evaluate(first_letters) == [True, False, True]


def test_the_page_follows_the_systems_colours(page: Page) -> None:
    background = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    page.emulate_media(color_scheme="dark")
    assert max(page.evaluate(background)) < 60
    page.emulate_media(color_scheme="light")
    assert min(page.evaluate(background)) > 200


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_axe_finds_nothing_in_the_main_states(page: Page, service: PageService, colours: Any) -> None:
    package = find_package("axe-core")
    if package is None:
        pytest.skip("no axe-core: run `python -m tests.node_setup`")
    axe = (package / "axe.min.js").read_text(encoding="utf-8")
    page.emulate_media(color_scheme=colours, reduced_motion="reduce")
    page.evaluate(axe)

    def check(state: str) -> None:
        found = page.evaluate("axe.run({ runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'best-practice'] })")
        assert found["passes"]
        broken = [(one["id"], [node["target"] for node in one["nodes"]]) for one in found["violations"]]
        assert (state, broken) == (state, [])

    check("welcome")
    ask(page, QUESTION)
    page.click(".trace summary")
    page.click(".retrieved summary")
    page.focus(".marker")
    check("answer")
    page.locator(".source-card .title button").first.click()
    expect(page.locator(".cited-passage")).to_be_visible()
    check("document")
    page.keyboard.press("Escape")
    service.llm.play(
        "# Title\n\nThe moon is cheese. [1]\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n```\ncode\n```\n\n> quote"
    )
    ask(page, QUESTION)
    page.click(".unsupported summary")
    check("flagged")
    service.llm.play(LLMUnavailable("Away."))
    ask(page, QUESTION)
    ask(page, ELSEWHERE)
    check("degraded and refused")
    page.click("#open-filters")
    page.get_by_label("Noor Hallivant").check()
    check("filters")
    page.keyboard.press("Escape")
    page.click("#open-documents")
    page.evaluate(DROP, [{"name": "photo.md", "text": "\x89PNG\0\0"}])
    expect(page.locator(".upload.failed")).to_be_visible()
    page.locator(".delete").first.click()
    check("documents")
