"""Documents over HTTP: listed by filters, read by chunk, shown to people, deleted with receipts."""

import json
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.answers import document_path
from app.api.document_page import document_page
from app.api.documents import _read
from app.client import Client
from app.domain import Chunk, Document, StoredDocument
from app.errors import WriteConflict

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
SHELF = "shelf"
"""A collection of these tests' own."""


@pytest.fixture(scope="module")
def client(live_service: str) -> Iterator[httpx.Client]:
    documents = [
        {"id": f"log/{n}", "text": f"Entry {n} of the log.", "metadata": {"keeper": ("Ann", "Bo")[n % 2], "year": n}}
        for n in range(7)
    ]
    with httpx.Client(base_url=live_service, trust_env=False, timeout=60, params={"collection": SHELF}) as found:
        assert found.post("/v1/documents", json={"documents": documents}).status_code == 200
        yield found
        found.delete(f"/v1/collections/{SHELF}")


def add(client: httpx.Client, **document: Any) -> None:
    [receipt] = client.post("/v1/documents", json={"documents": [document]}).json()["data"]
    assert receipt["status"] == "created", receipt


def listed(client: httpx.Client, filters: Any = None, **params: Any) -> dict[str, Any]:
    asked = {} if filters is None else {"filters": json.dumps(filters)}
    response = client.get("/v1/documents", params={**asked, **params})
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


# --- Lists -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filters", "wanted"),
    [
        ({"keeper": "Ann"}, {0, 2, 4, 6}),
        ({"keeper": "Ann", "year": [2, 3, 4]}, {2, 4}),
        ({"year": 3.0}, {3}),
        ({"year": "3"}, set()),
        ({"keeper": "nobody"}, set()),
        ({}, set(range(7))),
    ],
)
def test_a_list_is_filtered_as_a_search_is(client: httpx.Client, filters: Any, wanted: set[int]) -> None:
    body = listed(client, filters)
    assert {one["id"] for one in body["data"]} == {f"log/{n}" for n in wanted}
    assert (body["total"], body["has_more"]) == (len(wanted), False)


def test_a_filtered_list_comes_in_pages(client: httpx.Client) -> None:
    seen: list[str] = []
    while True:
        after = {"after": seen[-1]} if seen else {}
        page = listed(client, {"keeper": "Ann"}, limit=3, **after)
        seen += [one["id"] for one in page["data"]]
        assert page["total"] == 4
        if not page["has_more"]:
            break
    assert sorted(seen) == [f"log/{n}" for n in (0, 2, 4, 6)]


@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_an_unknown_field_names_those_that_there_are(client: httpx.Client, method: str) -> None:
    response = client.request(method, "/v1/documents", params={"filters": '{"keper": "Ann"}'})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "unknown_filter", "filters.keper")
    assert "keeper, year" in error["message"]


def test_documents_are_deleted_by_a_filter_each_with_its_receipt(client: httpx.Client) -> None:
    for n in range(3):
        add(client, id=f"gone/{n}", text=f"Line {n}.", metadata={"keeper": "Cy"})
    first = client.delete("/v1/documents", params={"filters": '{"keeper": "Cy"}', "limit": 2}).json()
    assert (len(first["data"]), first["has_more"]) == (2, True)
    assert all(one["deleted"] and one["receipt"]["checks"]["filter"] == 1 for one in first["data"])
    rest = client.delete("/v1/documents", params={"filters": '{"keeper": "Cy"}'}).json()
    assert (len(rest["data"]), rest["has_more"]) == (1, False)
    assert {one["id"] for one in (*first["data"], *rest["data"])} == {f"gone/{n}" for n in range(3)}
    assert listed(client)["total"] == 7
    for params in ({}, {"filters": "{}"}):
        refused = client.delete("/v1/documents", params=params)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "filters")


# --- Chunks and pages ------------------------------------------------------------------------------------------------


def test_a_document_is_read_with_its_chunks_and_each_by_itself(client: httpx.Client) -> None:
    sections = [f"## Part {n}\n\n" + f"Sentence {n} tells of lamps and tides. " * 30 for n in range(4)]
    add(client, id="long one.md", title="Long", text="\n\n".join(sections))
    document = client.get("/v1/documents/long%20one.md").json()
    chunks = document["chunks"]
    assert len(chunks) == document["num_chunks"] > 3
    assert [one["index"] for one in chunks] == list(range(len(chunks)))
    for one in chunks:
        assert one["text"] == document["text"][one["start"] : one["end"]]
        assert one["id"] == f"long one.md#{one['index']}"
        alone = client.get("/v1/documents/long%20one.md", params={"chunk": one["index"]}).json()
        assert alone == {"object": "chunk", "document_id": "long one.md", "title": "Long", "url": "", **one}
    assert "Part 3" in chunks[-1]["heading"]
    missing = client.get("/v1/documents/long%20one.md", params={"chunk": len(chunks)})
    assert (missing.status_code, missing.json()["error"]["param"]) == (404, "chunk")
    assert client.get("/v1/documents/long%20one.md", params={"chunk": -1}).status_code == 400
    client.delete("/v1/documents/long%20one.md")


def test_a_browser_is_shown_a_page_with_an_anchor_for_each_chunk(client: httpx.Client) -> None:
    text = "# Lamps\n\n" + "The lamp is lit at dusk & <b>not</b> before. " * 40
    metadata = {"keeper": "<script>alert(1)</script>", "dusk": True}
    add(client, id="p/<i>.md", title="<Lamps>", text=text, url='https://x.example/?a="&b=<c>', metadata=metadata)
    address = f"/v1/documents/{quote('p/<i>.md')}"
    page = client.get(address, headers={"Accept": BROWSER})
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.headers["vary"] == "Accept"
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    read = Reader.read(page.text)
    document = client.get(address).json()
    assert read.texts["article"] == document["text"]
    assert read.chunks == {str(one["index"]): one["text"] for one in document["chunks"]}
    assert read.texts["h1"] == "<Lamps>"
    assert "<script>" not in page.text
    for style in read.links:
        assert client.get(style).status_code == 200
    assert 'href="https://x.example/?a=&quot;&amp;b=&lt;c&gt;"' in page.text
    assert client.get("/v1/documents/absent", headers={"Accept": BROWSER}).status_code == 404
    client.delete(address)


@pytest.mark.parametrize("accept", ["*/*", "application/json", "application/json, text/html;q=0.5", ""])
def test_programs_are_given_json(client: httpx.Client, accept: str) -> None:
    response = client.get("/v1/documents/log/1", headers={"Accept": accept})
    assert response.json()["id"] == "log/1"


class Reader(HTMLParser):
    """What a browser makes of a page: which elements there are, and the text in them."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: dict[str, str] = {}
        self.chunks: dict[str, str] = {}
        self.links: list[str] = []
        self._open: list[str] = []
        self._chunk: str | None = None

    @classmethod
    def read(cls, page: str) -> "Reader":
        reader = cls()
        reader.feed(page)
        reader.close()
        return reader

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._open.append(tag)
        assert not any(name.startswith("on") or name == "style" for name, _ in attributes)
        if tag == "link":
            self.links += [value or "" for name, value in attributes if name == "href"]
        if tag == "span":
            self._chunk = dict(attributes)["id"]

    def handle_endtag(self, tag: str) -> None:
        while self._open.pop() != tag:
            pass  # Those that have no end.
        if tag == "span":
            self._chunk = None

    def handle_data(self, data: str) -> None:
        for tag in ("article", "h1"):
            if tag in self._open:
                self.texts[tag] = self.texts.get(tag, "") + data
        if self._chunk is not None:
            self.chunks[self._chunk] = self.chunks.get(self._chunk, "") + data


ANYTHING = st.text(st.characters(exclude_categories=["Cs", "Cc"]) | st.sampled_from("<>&\"'$\n{}/"), max_size=60)
MARKUP = {
    "html",
    "head",
    "meta",
    "title",
    "link",
    "body",
    "main",
    "h1",
    "dl",
    "div",
    "dt",
    "dd",
    "article",
    "span",
    "a",
}


@given(ANYTHING, ANYTHING, ANYTHING, st.dictionaries(ANYTHING, ANYTHING, max_size=2), st.integers(0, 60))
def test_nothing_of_a_document_becomes_markup(
    text: str, title: str, url: str, metadata: dict[str, str], cut: int
) -> None:
    chunks = [Chunk(0, text[:cut], 0, min(cut, len(text)))]
    for address in (url, f"https://{url}"):
        stored = StoredDocument("id", title, address, metadata, 1, len(text), "", 1, 0.0, 0.0)
        read = Reader.read(document_page(stored, text, chunks))
        assert read.tags <= MARKUP
        assert read.texts.get("article", "") == text
        assert read.chunks.get("0", "") == text[:cut]


class Restless:
    """A retriever whose one document is another version whenever its chunks are asked for."""

    version = 0

    async def document(self, document_id: str, **_: Any) -> tuple[StoredDocument, str]:
        self.version += 1
        return StoredDocument(document_id, "", "", {}, 1, 1, "", self.version, 0.0, 0.0), "x"

    async def chunks(self, document_id: str, **_: Any) -> list[Chunk] | None:
        return None


async def test_a_document_that_never_stands_still_is_given_up() -> None:
    with pytest.raises(WriteConflict, match="'log' changes faster"):
        await _read(Restless(), "log", None, None)  # type: ignore[arg-type]


# --- Citations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document_id", ["found/a b.md", "../up.md", "a/./b#1?.md", "\u00fc/..", "100%.md"])
def test_every_citation_leads_to_its_chunk_also_in_another_collection(client: httpx.Client, document_id: str) -> None:
    add(client, id=document_id, text="The signal lamp of Quayhead was lit on 3 March 1911.", metadata={"keeper": "Di"})
    for collection in (SHELF, None):
        rag = {"filters": {"keeper": "Di"}} if collection else {}
        body = {
            "messages": [{"role": "user", "content": "When was the signal lamp of Quayhead lit?"}],
            "rag": {"collection": collection, **rag},
        }
        answer = client.post("/v1/chat/completions", json=body).json()
        annotations = answer["choices"][0]["message"]["annotations"]
        if collection is None:
            assert not annotations, "it is in the other collection"
            continue
        url = httpx.URL(annotations[0]["url_citation"]["url"])
        # As a browser asks, which drops the fragment and resolves dots.
        with httpx.Client(trust_env=False, timeout=60) as browser:
            page = browser.get(url, headers={"Accept": BROWSER})
        assert page.status_code == 200
        assert "3 March 1911" in Reader.read(page.text).chunks[url.fragment]
    assert client.delete(document_path(document_id)).status_code == 200


async def test_the_terminals_client_takes_no_step_out_of_an_id(live_service: str) -> None:
    ids = ["steps/a.md", "steps/x/../a.md", "steps/b c?.md#1"]
    documents = [Document(one, one, f"The text of {one}.") for one in ids]
    async with Client(live_service, collection="steps") as client:
        await client.add(documents)
        assert [(await client.document(one))["id"] for one in ids] == ids
        await client.delete(ids[1])
        assert [one["id"] async for one in client.documents()] == [ids[0], ids[2]]
        await client.drop_collection("steps")


@given(st.lists(st.sampled_from([".", "..", "a", "", "%2e", "b c"]), min_size=1, max_size=4).map("/".join))
def test_a_path_has_no_step_that_a_browser_would_take(document_id: str) -> None:
    path = document_path(document_id).removeprefix("/v1/documents/")
    if document_id not in (".", ".."):
        assert {".", ".."}.isdisjoint(path.split("/"))
