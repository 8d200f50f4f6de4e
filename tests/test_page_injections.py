"""Nothing that documents, file names or the model say becomes a part of the chat page but text and web links."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from playwright.sync_api import Page, expect

from tests.node_setup import find_package
from tests.page_service import (
    DROP,
    NEEDS_BROWSER,
    QUESTION,
    PageService,
    add,
    ask,
    browser,
    context,
    page,
    running,
    service,
)

pytestmark = NEEDS_BROWSER

VENDORED = Path(__file__).parent.parent / "app" / "web" / "vendor"

ATTACKS = [
    "<img src=x onerror=\"document.title='owned'\">",
    "<script>document.title='owned'</script>",
    "\"><svg onload=document.title='owned'>",
    "[click](javascript:document.title='owned')",
    "![x](https://evil.example/pixel.png)",
    "<iframe srcdoc=\"<script>parent.document.title='owned'</script>\"></iframe>",
    "<a href='javascript:1'>x</a><form action=https://evil.example><button>Send</button></form>",
    "[1]: javascript:document.title='owned'",
    "<style>body { display: none }</style>",
    "&lt;img src=x onerror=alert(1)&gt;",
]
WRITTEN = " ".join(ATTACKS)

FOREIGN = """() => [...document.querySelectorAll(
  ".turn :is(img, script, svg, iframe, style, form, object, embed, input, base, meta, link)," +
  "dialog :is(img, script, svg, iframe, style, object, embed)," +
  "a[href]:not([href^='http:'], [href^='https:'], [href^='#'])"
)].map((node) => node.outerHTML)"""


def assert_unharmed(page: Page) -> None:
    assert page.evaluate(FOREIGN) == []
    assert page.title() == "Cleave"
    expect(page.locator("h1")).to_be_visible()


def test_a_document_with_script_everywhere_stays_text(page: Page, add: Any) -> None:
    add(
        {
            "id": f"attack {ATTACKS[0]}",
            "title": f"Lighthouse {WRITTEN}",
            "text": f"# {ATTACKS[1]}\n\nThe password of the lighthouse keeper is herring. {WRITTEN}",
            "url": "javascript:document.title='owned'",
            "metadata": {"author": WRITTEN, "date": ATTACKS[0], ATTACKS[0]: ATTACKS[1]},
        }
    )
    ask(page, "What is the password of the lighthouse keeper?")
    expect(page.locator(".answer")).to_contain_text("herring")
    card = page.locator(".source-card", has_text="herring")
    expect(card.locator(".title")).to_contain_text(ATTACKS[1])
    page.locator(".marker").first.hover()
    assert_unharmed(page)
    page.click("#open-filters")
    expect(page.locator("#facets")).to_contain_text(ATTACKS[1])
    assert_unharmed(page)
    page.locator(".facet", has_text="author").locator("li", has_text="owned").get_by_role("checkbox").check()
    expect(page.locator(".chip")).to_contain_text("owned")
    assert_unharmed(page)
    page.keyboard.press("Escape")
    page.click("#open-documents")
    expect(page.locator(".document-row", has_text="Lighthouse")).to_contain_text(ATTACKS[0])
    assert_unharmed(page)


def test_a_model_that_writes_script_writes_text(page: Page, service: PageService) -> None:
    service.llm.play("\n\n".join(ATTACKS), f"\n\n{WRITTEN} [1]")
    ask(page, QUESTION)
    body = page.locator(".body")
    for attack in (*ATTACKS[:4], *ATTACKS[5:7], *ATTACKS[8:]):
        expect(body).to_contain_text(" ".join(attack.split()))
    expect(body.locator("a[href='https://evil.example/pixel.png']").first).to_have_text("x")
    expect(body.locator(".marker")).not_to_have_count(0)
    assert_unharmed(page)


def test_a_file_name_with_script_stays_text(page: Page) -> None:
    page.evaluate(DROP, [{"name": f"{ATTACKS[0]}.md", "text": "\x89PNG\0\0"}])
    expect(page.locator(".upload.failed .file")).to_have_text(f"{ATTACKS[0]}.md")
    assert_unharmed(page)


def test_a_question_with_script_stays_text(page: Page) -> None:
    ask(page, f"How long did the Reading Room outage last? {WRITTEN}")
    expect(page.locator(".asked")).to_contain_text(ATTACKS[0])
    assert_unharmed(page)


def test_the_policy_lets_no_text_become_html_or_script(page: Page) -> None:
    other = page.context.new_page()
    other.goto(page.url)
    write = "try { document.querySelector('main').innerHTML = '<b>x</b>'; 'written' } catch (error) { error.name }"
    assert other.evaluate(write) == "TypeError"
    load = """() => {
      const violation = new Promise((resolve) => addEventListener("securitypolicyviolation", resolve, { once: true }));
      document.body.append(Object.assign(document.createElement("img"), { src: "https://evil.example/pixel.png" }));
      return violation.then(({ effectiveDirective }) => effectiveDirective);
    }"""
    assert other.evaluate(load) == "img-src"


PIECES = st.sampled_from(
    [
        *ATTACKS,
        *"<>[]()!*_`~#|&\\\"'=:;-+. \n\t",
        *("\n\n", "\n- ", "\n1. ", "\n> ", "\n```\n", "[1]", "](", "https://a.example/", "<!--", "-->", "</p>", "<b>"),
        *("javascript:", "&#106;avascript:", "data:text/html,<script>", "onload=", "é"),
    ]
)
RENDER = """async (texts) => {
  const { renderMarkdown } = await import("/web/markdown.js");
  const found = [];
  for (const text of texts) {
    const box = document.createElement("div");
    box.append(...renderMarkdown(text));
    for (const node of box.querySelectorAll("*")) {
      const protocol = (name) => name === "href" ? new URL(node.href).protocol : "";
      const attributes = node.getAttributeNames().map((name) => `${name}=${protocol(name)}`);
      found.push([node.localName, attributes]);
    }
  }
  return found;
}"""
TAGS = set("p h3 ul ol li blockquote strong em del code pre hr br a div table thead tbody tr th td".split())
ATTRIBUTES = {
    "href=http:",
    "href=https:",
    "target=",
    "rel=",
    "class=",
    "start=",
    "tabindex=",
    "role=",
    "aria-label=",
    "scope=",
}


@given(texts=st.lists(st.lists(PIECES, max_size=30).map("".join), min_size=20, max_size=20))
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_markdown_makes_only_elements_of_markdown(page: Page, texts: list[str]) -> None:
    for tag, attributes in page.evaluate(RENDER, texts):
        assert tag in TAGS
        assert set(attributes) <= ATTRIBUTES


def test_markdown_is_read_as_its_writers_mean_it(page: Page) -> None:
    render = """async (text) => {
      const { renderMarkdown } = await import("/web/markdown.js");
      const box = document.createElement("div");
      box.append(...renderMarkdown(text, { cite: (n) => n === 1 ? document.createElement("sup") : null }));
      return box.innerHTML;
    }"""

    def rendered(text: str) -> str:
        return str(page.evaluate(render, text))

    assert rendered("**a** _b_ `c<d` ~~e~~ [1][7]") == (
        "<p><strong>a</strong> <em>b</em> <code>c&lt;d</code> <del>e</del><sup></sup>[7]</p>"
    )
    assert rendered("- a\n  - b\n- c") == "<ul><li>a<ul><li>b</li></ul></li><li>c</li></ul>"
    assert rendered("3. a\n4. b") == '<ol start="3"><li>a</li><li>b</li></ol>'
    assert rendered("```python\nx = [1]\n") == '<pre tabindex="0"><code>x = [1]</code></pre>'
    assert rendered("[see](docs/other.md)") == "<p>[see](docs/other.md)</p>"
    assert rendered("line\nbreak") == "<p>line<br>break</p>"
    assert '<th scope="col">a</th>' in rendered("| a | b |\n|---|--:|\n| 1 | 2 |")
    assert rendered("[1]: https://a.example\n\nx [1]") == "<p><sup></sup>: " + rendered("https://a.example")[3:] + (
        "<p>x<sup></sup></p>"
    )
    assert rendered("> " * 5_000 + "deep").startswith("<p>&gt; &gt; ")


def test_the_vendored_files_are_those_that_were_published() -> None:
    package = find_package("marked")
    if package is None:
        pytest.skip("no marked: run `python -m tests.node_setup`")
    for name, published in (("marked.esm.js", "lib/marked.esm.js"), ("LICENSE", "LICENSE")):
        assert (VENDORED / "marked" / name).read_bytes() == (package / published).read_bytes()
