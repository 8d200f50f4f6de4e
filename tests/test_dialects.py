"""The same sources and citations, told in three ways."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from app.api.answers import Source
from app.api.dialects import annotations, footer, source_events
from app.citations import Citation
from app.domain import Passage

OUTAGE = "How long did the Reading Room outage on 14 October 2025 last?"
MARKDOWN = MarkdownIt()


def source(n: int, title: str = "Post-mortem", url: str = "https://wiki.example/o") -> Source:
    return Source(n, Passage(f"o.md#{n}", "o.md", title, url, {}, f"Passage {n}.", 0.5), url)


SOURCES = [source(n) for n in (1, 2, 3)]
CITATIONS = [Citation(2, 10, 13), Citation(2, 20, 23)]


def test_an_annotation_for_each_marker() -> None:
    found = annotations(SOURCES, CITATIONS)
    assert [(one["start_index"], one["end_index"], one["title"]) for one in found] == [
        (10, 13, "Post-mortem"),
        (20, 23, "Post-mortem"),
    ]


def test_an_event_for_each_source_up_to_the_last_that_is_cited() -> None:
    """Open WebUI counts sources as they come, by their ids: so `[2]` must be the second one."""
    found = source_events(SOURCES, CITATIONS)
    assert [one["type"] for one in found] == ["source", "source"]
    assert [one["data"]["metadata"][0]["source"] for one in found] == ["o.md#1", "o.md#2"]
    for one in found:
        data = one["data"]
        assert len(data["document"]) == len(data["metadata"]) == len(data["distances"]) == 1
        assert (data["source"]["name"], data["metadata"][0]["source_url"]) == ("Post-mortem", "https://wiki.example/o")


def test_a_list_of_the_cited_sources_with_their_numbers() -> None:
    assert footer(SOURCES, CITATIONS) == "\n\n---\n- **\\[2\\]** [Post-mortem](https://wiki.example/o)"


def test_nothing_is_told_where_nothing_is_cited() -> None:
    assert annotations(SOURCES, []) == source_events(SOURCES, []) == []
    assert footer(SOURCES, []) == ""


@given(st.text(max_size=30), st.text(max_size=30))
def test_no_title_and_no_address_writes_markdown_of_its_own(title: str, path: str) -> None:
    one = source(1, title, f"https://wiki.example/{path}")
    [rule, listed, *rest] = MARKDOWN.parse("Text." + footer([one], [Citation(1, 0, 3)]))[3:5]
    tokens = MARKDOWN.parse("Text." + footer([one], [Citation(1, 0, 3)]))
    assert (rule.type, listed.type, rest) == ("hr", "bullet_list_open", [])
    [item] = [token for token in tokens if token.type == "inline"][1:]
    kinds = [child.type for child in item.children or ()]
    assert kinds.count("link_open") == kinds.count("link_close") == 1
    assert set(kinds) <= {"strong_open", "strong_close", "text", "link_open", "link_close", "text_special"}


# --- Over HTTP -------------------------------------------------------------------------------------------------------


@pytest.fixture
def client(live_service: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=live_service, trust_env=False, timeout=60) as found:
        yield found


def asking(dialect: str, **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": OUTAGE}], "rag": {"dialect": dialect}, **options}


def chunks(client: httpx.Client, dialect: str) -> list[Any]:
    response = client.post("/v1/chat/completions", json=asking(dialect, stream=True))
    *lines, done = response.text.strip().split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def said(chunks: list[Any]) -> str:
    return "".join(one["choices"][0]["delta"].get("content", "") for one in chunks if "choices" in one)


def test_open_webui_gets_events_in_place_of_annotations(client: httpx.Client) -> None:
    plain, found = chunks(client, "annotations"), chunks(client, "openwebui")
    events = [one for one in found if "event" in one]
    assert [set(one) for one in events] == [{"event"}] * len(events)
    assert found[-3] == events[-1], "before the summary and the end"
    url = plain[-2]["choices"][0]["delta"]["annotations"][0]["url_citation"]["url"]
    assert events[0]["event"]["data"]["source"]["url"] == url
    assert not any("annotations" in one["choices"][0]["delta"] for one in found if "choices" in one)
    assert said(found) == said(plain)
    whole = client.post("/v1/chat/completions", json=asking("openwebui")).json()
    assert whole["choices"][0]["message"]["annotations"][0]["url_citation"]["url"] == url


def test_a_markdown_list_ends_a_stream_and_a_whole_answer_alike(client: httpx.Client) -> None:
    plain = said(chunks(client, "annotations"))
    whole = client.post("/v1/chat/completions", json=asking("markdown")).json()
    text = whole["choices"][0]["message"]["content"]
    assert said(chunks(client, "markdown")) == text
    assert text.startswith(f"{plain}\n\n---\n- **\\[1\\]** [Post-mortem of the Reading Room outage")
    for annotation in whole["choices"][0]["message"]["annotations"]:
        place = annotation["url_citation"]
        assert text[place["start_index"] : place["end_index"]] == "[1]"


@pytest.mark.parametrize("dialect", ["annotations", "openwebui", "markdown"])
def test_found_presented_and_cited_are_kept_apart(client: httpx.Client, dialect: str) -> None:
    rag = client.post("/v1/chat/completions", json=asking(dialect)).json()["rag"]
    assert [one["n"] for one in rag["sources"]] == [1, 2, 3, 4, 5]
    assert (rag["presented"], rag["cited"]) == ([1, 2, 3], [1])
