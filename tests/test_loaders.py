import hashlib
import io
import json
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import docx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from reportlab.lib.pdfencrypt import StandardEncryption
from reportlab.pdfgen.canvas import Canvas

from app.domain import Document
from app.errors import TooLarge, UnreadableFile
from app.loaders import CLEANER_VERSION, SUFFIXES, iterate_jsonl, load_file, normalise, read_lines

MEBIBYTE = 2**20


def load(name: str, content: str | bytes, **options: object) -> Document:
    data = content.encode() if isinstance(content, str) else content
    [document] = load_file(name, data, max_bytes=MEBIBYTE, **options)  # type: ignore[arg-type]
    assert isinstance(document, Document)
    return document


def refusal(name: str, content: str | bytes, max_bytes: int = MEBIBYTE) -> str:
    data = content.encode() if isinstance(content, str) else content
    with pytest.raises((UnreadableFile, TooLarge)) as error:
        load_file(name, data, max_bytes=max_bytes)
    assert name in error.value.message
    assert "\n" not in error.value.message
    return error.value.message


def pdf(draw: Callable[[Canvas], object], password: str = "") -> bytes:
    buffer = io.BytesIO()
    encryption = StandardEncryption(password, canPrint=0) if password else None
    canvas = Canvas(buffer, encrypt=encryption)
    draw(canvas)
    canvas.showPage()
    canvas.save()
    return buffer.getvalue()


def word(*paragraphs: str, heading: str = "") -> bytes:
    document = docx.Document()
    if heading:
        document.add_heading(heading, 1)
    for paragraph in paragraphs:
        document.add_paragraph(paragraph)
    buffer = io.BytesIO()
    document.save(buffer)
    return buffer.getvalue()


def with_part(archive: bytes, part: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, content if name == part else old.read(name))
    return buffer.getvalue()


# --- Kinds of files --------------------------------------------------------------------------------------------------


def test_markdown_takes_its_title_address_and_metadata_from_front_matter():
    document = load(
        "post.md",
        "---\ntitle: Café culture\nlink: https://example.com/cafe\ndate: 2024-06-01\ntags: [a, ｂ, 3]\ndraft: false\n"
        "author: {name: Ann}\nseries: null\n---\n# Another heading\n\nText.\n",
    )
    assert document == Document(
        "post.md",
        "Café culture",
        "# Another heading\n\nText.",
        "https://example.com/cafe",
        {"date": "2024-06-01", "tags": "a, b, 3", "draft": False},
    )


def test_windows_line_ends_do_not_hide_front_matter():
    assert load("post.md", "---\r\ntitle: Hello\r\n---\r\nText.\r\n").title == "Hello"


def test_prose_between_two_thematic_breaks_is_not_front_matter():
    assert load("post.md", "---\n\nFoo: bar: baz\n\n---\n").text.startswith("---\n\nFoo")
    assert load("post.md", "---\nJust a line\n---\n").text.startswith("---\nJust")


@pytest.mark.parametrize(
    ("name", "text", "title"),
    [
        ("notes/my-trip.md", "No heading here", "my-trip"),
        ("a.md", "```sh\n# comment\n```\n\n## Two\n\n# The **real** [one](https://e.com) `x` #\n", "The real one x"),
        ("a.txt", "# Heading\n\nText", "Heading"),
        ("a.md", "Under *lined*\n=====\n\nText", "Under lined"),
        ("a.html", "<title>From the\n head</title><p>Text</p>", "From the head"),
        ("a.html", "<title>Head</title><h1>Body</h1><p>Text</p>", "Body"),
    ],
)
def test_title_is_the_first_heading_then_the_html_title_then_the_name(name: str, text: str, title: str):
    assert load(name, text).title == title


def test_given_id_and_metadata_win_over_the_files_own():
    document = load("a.md", "---\nkind: note\nyear: 1999\n---\nText", document_id="x", metadata={"year": 2024})
    assert document.id == "x"
    assert document.metadata == {"kind": "note", "year": 2024}


@pytest.mark.parametrize("source", ["BBC", "javascript:alert(1)", "notes/a.md"])
def test_a_source_that_is_no_web_address_stays_metadata(source: str):
    document = load("a.md", f"---\nsource: {source}\n---\nText")
    assert (document.url, document.metadata) == ("", {"source": source})


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_is_decoded_by_its_byte_order_mark(encoding: str):
    assert load("a.txt", "Größe, naïve".encode(encoding)).text == "Größe, naïve"


def test_html_becomes_markdown_without_escapes_scripts_or_inline_pictures():
    document = load(
        "page.HTM",
        "<h1>Head</h1><p>a_b *c* <a href='https://e.com/z'>link</a><img src='data:image/png;base64,AA' alt='pic'></p>"
        "<script>no()</script><pre><code>x_1 = *y\n</code></pre>",
    )
    assert document.text == "# Head\n\na_b *c* [link](https://e.com/z)pic\n\n```\nx_1 = *y\n```"


def test_html_is_read_in_the_encoding_that_it_declares():
    page = '<meta charset="windows-1252"><p>café “quoted”</p>'.encode("windows-1252")
    assert load("a.html", page).text == "café “quoted”"


def test_pdf_gives_the_text_of_all_its_pages():
    def two_pages(canvas: Canvas) -> None:
        canvas.drawString(100, 700, "The first page speaks of cats.")
        canvas.showPage()
        canvas.drawString(100, 700, "The second page speaks of dogs.")

    document = load("pets.pdf", pdf(two_pages))
    assert document.title == "pets"
    assert document.text == "The first page speaks of cats.\n\n\nThe second page speaks of dogs."


def test_libraries_load_late_and_print_nothing(tmp_path: Path):
    odd = pdf(lambda canvas: canvas.drawString(100, 700, "Hello")).replace(b"/MediaBox", b"/MediaXox")
    (tmp_path / "odd.pdf").write_bytes(odd)
    (tmp_path / "nested.html").write_text("<div>" * 3000 + "deep")
    (tmp_path / "xml.html").write_text('<?xml version="1.0"?><p>Hello</p>')
    script = (
        "import sys, pathlib\n"
        "from app.loaders import load_file\n"
        "assert 'markitdown' not in sys.modules\n"
        "for path in pathlib.Path(sys.argv[1]).iterdir(): load_file(path.name, path.read_bytes(), max_bytes=10**6)"
    )
    finished = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=False)
    assert (finished.returncode, finished.stdout, finished.stderr) == (0, "", "")


def test_word_file_gives_its_headings_and_paragraphs():
    document = load("a.docx", word("Some snake_case text.", "More.", heading="Report"))
    assert document.title == "Report"
    assert document.text == "# Report\n\nSome snake_case text.\n\nMore."


# --- Refusals --------------------------------------------------------------------------------------------------------


def blank(canvas: Canvas) -> None:
    canvas.rect(10, 10, 100, 100)


@pytest.mark.parametrize(
    ("name", "content", "advice"),
    [
        ("a.md", b"", "is empty"),
        ("a.md", b" \n\t\n", "is empty"),
        ("a.md", b"---\ntitle: Only this\n---\n", "holds no text"),
        ("a.txt", b"\xef\xbb\xbf", "holds no text"),
        ("a.txt", b"--- *** ---", "holds no text"),
        ("a.txt", "ab\nnaïve".encode("latin-1"), "byte 0xEF in line 2 is not UTF-8; convert it"),
        ("a.md", b"\x89PNG\r\n\x00\x00", "is binary"),
        ("a.md", b"text\x00text", "NUL bytes"),
        ("a.txt", "hello".encode("utf-16-le"), "save it as UTF-8"),
        ("a.txt", b"\xff\xfea", "is damaged"),
        ("a.md", b"---\ntitle: a: b\n---\nText", "not valid YAML in line 2"),
        ("a.md", b"---\nok: 1\ntitle: [a\n---\nText", "not valid YAML in line 4"),
        ("a.md", b"---\ndate: 2024-13-45\n---\nText", "not valid YAML"),
        ("a.html", "<p>café</p>".encode("latin-1"), "not UTF-8"),
        ("a.html", b"<meta charset='nonsense'><p>caf\xe9</p>", "is damaged"),
        ("a.html", b"<script>only()</script>", "holds no text"),
        ("a.pdf", b"Hello", "is not a PDF"),
        ("a.pdf", b"%PDF-1.4\n" + b"garbage" * 100, "is damaged"),
        ("a.pdf", pdf(blank), "OCR"),
        ("a.pdf", pdf(lambda canvas: canvas.drawString(10, 10, "secret"), password="key"), "without a password"),
        ("a.docx", b"Hello", "is damaged"),
        ("a.docx", word("Hello")[:-100], "is damaged"),
        ("a.docx", with_part(word("Hello"), "word/document.xml", b"<not-xml"), "is damaged"),
        ("a.docx", with_part(word("Hello"), "word/document.xml", b" " * 21 * MEBIBYTE), "split it"),
        ("a.docx", with_part(word("Hello"), "docProps/thumbnail.jpeg", b"\0" * 201 * MEBIBYTE), "split it"),
        ("a.docx", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "save it as .docx"),
        ("a.docx", word(), "holds no text"),
        ("a.exe", b"MZ", "known are .md, .markdown, .txt"),
        ("README", b"Hello", "known are"),
        ("a.jsonl", b"\n\n", "is empty"),
    ],
)
def test_unreadable_file_says_in_one_line_what_to_do(name: str, content: bytes, advice: str):
    assert advice in refusal(name, content)


def zip_of(parts: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number in range(parts):
            archive.writestr(str(number), b"")
    return buffer.getvalue()


def test_a_word_file_of_very_many_parts_is_not_opened():
    assert "more than 10000 parts" in refusal("a.docx", zip_of(10_001), 2 * MEBIBYTE)


def test_what_is_packed_inside_a_word_file_stays_packed():
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("word/document.xml", b" " * 50 * MEBIBYTE)
    buffer = io.BytesIO(word("Only this is text."))
    with zipfile.ZipFile(buffer, "a") as archive:
        archive.writestr("word/embeddings/inner.zip", bomb.getvalue())
        archive.writestr("word/embeddings/inner.docx", bomb.getvalue())
    assert load("a.docx", buffer.getvalue()).text == "Only this is text."


def test_a_word_file_that_lies_about_its_size_is_not_unpacked():
    whole = with_part(word("Hello"), "word/document.xml", b" " * 30 * MEBIBYTE)
    claimed = whole.replace((30 * MEBIBYTE).to_bytes(4, "little"), (1000).to_bytes(4, "little"))
    assert claimed != whole
    assert "is damaged" in refusal("a.docx", claimed)


def test_entities_that_multiply_are_not_expanded():
    levels = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 12))
    bomb = f'<?xml version="1.0"?><!DOCTYPE d [<!ENTITY e0 "aaaaaaaaaa">{levels}]><d>&e11;</d>'
    assert "is damaged" in refusal("a.docx", with_part(word("Hello"), "word/document.xml", bomb.encode()))


def packed_pdf(dictionary: bytes, content: bytes) -> bytes:
    packed = zlib.compress(content)
    head = b"%PDF-1.4\n1 0 obj\n<< /Filter /FlateDecode /Length " + str(len(packed)).encode() + dictionary + b" >>"
    return head + b"\nstream\n" + packed + b"\nendstream\nendobj\n"


def test_a_pdf_that_unpacks_to_very_much_is_refused_but_not_for_its_pictures():
    spaces = b" " * 101 * MEBIBYTE
    assert "unpacks to more than 100 MiB: split it" in refusal("a.pdf", packed_pdf(b"", spaces))
    assert "is damaged" in refusal("a.pdf", packed_pdf(b" /Subtype /Image", spaces))
    assert "is damaged" in refusal("a.pdf", packed_pdf(b"", b" " * 1000))


@pytest.mark.parametrize("tag", ["div", "ul><li", "table><tr><td", "blockquote"])
def test_deeply_nested_html_is_read_or_refused_on_one_line(tag: str):
    page = f"<{tag}>" * 20_000 + "deep words"
    try:
        document = load("a.html", page)
    except UnreadableFile as error:
        assert "\n" not in error.message  # noqa: PT017
    else:
        assert "deep words" in document.text


def test_a_file_over_the_limit_is_too_large():
    assert refusal("a.md", b"x" * 3 * MEBIBYTE, 2 * MEBIBYTE) == "a.md: has 3.0 MiB, the limit is 2.0 MiB: split it"


def test_repeated_aliases_in_front_matter_do_not_blow_up():
    levels = "".join(f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 9)}]\n" for n in range(1, 30))
    document = load("a.md", f"---\nl0: &l0 [x, x]\n{levels}title: *l29\nlink: *l29\n---\nText")
    assert document.title == "a"
    assert document.metadata["l0"] == "x, x"


def test_a_hostile_name_stays_on_one_line():
    with pytest.raises(UnreadableFile) as error:
        load_file("evil\nname\udcff.exe", b"x", max_bytes=10)
    assert error.value.message.startswith("evil name.exe: unknown kind")


# --- JSON lines ------------------------------------------------------------------------------------------------------


def test_jsonl_holds_a_document_a_line():
    record = {"id": 7, "title": "T²", "text": "𝗕𝗼𝗹𝗱 text", "source": "https://e.com/1", "tags": ["a", "b"]}
    record |= {"year": 2020, "nested": {"x": 1}, "nothing": None, "site": "Ｅxample"}
    [document] = load_file("c.jsonl", json.dumps(record).encode(), metadata={"set": "test"}, max_bytes=MEBIBYTE)
    assert document == Document(
        "7", "T²", "Bold text", "https://e.com/1", {"tags": "a, b", "year": 2020, "site": "Example", "set": "test"}
    )


def test_jsonl_prefers_a_link_and_keeps_a_source_that_differs():
    record = {"id": "a", "text": "Text", "source": "https://e.com/raw", "link": "https://e.com/page"}
    [document] = load_file("c.jsonl", json.dumps(record).encode(), max_bytes=MEBIBYTE)
    assert isinstance(document, Document)
    assert (document.url, document.metadata) == ("https://e.com/page", {"source": "https://e.com/raw"})


def test_jsonl_without_a_title_takes_the_heading_or_none():
    lines = [b'{"id": "a", "text": "# Head\\n\\nText"}', b'{"id": "b", "title": "", "text": "Text"}']
    titles = [document.title for document in iterate_jsonl(lines) if isinstance(document, Document)]
    assert titles == ["Head", ""]


def test_bad_lines_are_named_and_do_not_spoil_the_others():
    lines = [
        b'\xef\xbb\xbf{"id": "first", "text": "Good"}\n',
        b"{broken\n",
        b"\n",
        b'{"text": "No id"}\n',
        b'{"id": "x", "text": "\\u200b"}\n',
        b'["id"]\n',
        b'{"id": "x", "text": "caf\xe9"}\n',
        b"[" * 100_000,
        b'{"id": "last", "text": "Good \\ud800 too", "weight": NaN}',
    ]
    first, *errors, last = iterate_jsonl(lines, name="c.jsonl")
    assert isinstance(first, Document)
    assert first.id == "first"
    assert last == Document("last", "", "Good  too")
    messages = [error.message for error in errors if isinstance(error, UnreadableFile)]
    assert messages[:5] == [
        "c.jsonl line 2: is not valid JSON: Expecting property name enclosed in double quotes at column 2",
        'c.jsonl line 4: has no "id": give each line one',
        'c.jsonl line 5: has no text in "text"',
        'c.jsonl line 6: is not a JSON object {"id": ..., "text": ...}',
        "c.jsonl line 7: byte 0xE9 in line 1 is not UTF-8; convert it, for example: iconv -f WINDOWS-1252 -t UTF-8",
    ]
    assert messages[5].startswith("c.jsonl line 8: is damaged")


def test_of_lines_with_the_same_id_the_first_is_kept():
    lines = [b'{"id": "a", "text": "First"}', b"", b'{"id": 7, "text": "Other"}', b'{"id": "a", "text": "Second"}']
    lines += [b'{"id": "7", "text": "Third"}', b'{"id": "b", "text": "Last"}']
    found = list(iterate_jsonl(lines, name="c.jsonl"))
    assert [one.text for one in found if isinstance(one, Document)] == ["First", "Other", "Last"]
    assert [one.message for one in found if isinstance(one, UnreadableFile)] == [
        "c.jsonl line 4: repeats the id 'a' of line 1, which is kept",
        "c.jsonl line 5: repeats the id '7' of line 3, which is kept",
    ]


def test_a_line_over_the_limit_is_not_read_to_its_end(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("app.loaders.MAX_LINE_BYTES", MEBIBYTE)
    long = json.dumps({"id": "long", "text": "x" * 3 * MEBIBYTE})
    file = io.BytesIO(b'{"id": "a", "text": "Before"}\n' + long.encode() + b'\n{"id": "b", "text": "After"}')
    lines = list(read_lines(file))
    assert [len(line) for line in lines] == [30, MEBIBYTE + 1, 28]
    before, error, after = iterate_jsonl(lines, name="c.jsonl")
    assert isinstance(before, Document)
    assert isinstance(after, Document)
    assert isinstance(error, UnreadableFile)
    assert error.message == "c.jsonl line 2: has more than 1 MiB: split its text"


def test_a_jsonl_file_takes_no_id_of_its_own():
    with pytest.raises(UnreadableFile, match="each line has its own id"):
        load_file("c.jsonl", b'{"id": "a", "text": "b"}', document_id="x", max_bytes=MEBIBYTE)


def test_jsonl_may_be_utf_16():
    [document] = load_file("c.jsonl", '{"id": "ü", "text": "Größe"}\n'.encode("utf-16"), max_bytes=MEBIBYTE)
    assert document == Document("ü", "", "Größe")


# --- Normalising -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("𝗠𝗟𝗢𝗽𝘀 ﬁne １２３", "MLOps fine 123"),
        ("a\r\nb\rc\x85d\u2028e", "a\nb\nc\nd\ne"),
        ("page one\fpage two", "page one\n\npage two"),
        ("zero\u200bwidth \ufeffmark so\xadft \x07bell\tkept", "zerowidth mark soft bell\tkept"),
        ("lone \ud800surrogate", "lone surrogate"),
        ("a  \nb\u00a0\n\n\n\n\n\nc \n", "a\nb\n\n\nc"),
        ("5² = 25, H₂O, 1½, Brand™, ¯\\_(ツ)_/¯", "5² = 25, H₂O, 1½, Brand™, ¯\\_(ツ)_/¯"),
        ("wait…", "wait..."),
        ("Use `ﬁ  ２` and ``a ` ２`` but ２", "Use `ﬁ  ２` and ``a ` ２`` but 2"),
        ("２\n```py\nx = '２'  \n\n\n\n\ny\n```\n２", "2\n```py\nx = '２'  \n\n\n\n\ny\n```\n2"),
        ("~~~\n２\n```\n~~~~\n２", "~~~\n２\n```\n~~~~\n2"),
        ("a lone ` tick\n\n２ and ` another", "a lone ` tick\n\n2 and ` another"),
        ("a lone ` tick\n```\n２ `\n```\n２", "a lone ` tick\n```\n２ `\n```\n2"),
        ("```\nnever closed ２", "```\nnever closed ２"),
    ],
)
def test_normalise_folds_prose_and_leaves_code(text: str, expected: str):
    assert normalise(text) == expected


FRAGMENTS = [
    "`",
    "``",
    "```",
    "~~~",
    "````",
    "\n",
    "\n\n",
    " ",
    "\t",
    "\u3000",
    "\r\n",
    "２",
    "ﬁ",
    "x",
    "\u200b",
    "\u0301",
]
FRAGMENTS += ["\uff40", "\u1fef", "\uff5e", "²", "\u00a8", "\u0385", "…", "\f", "\u2028", "\x1c", "가", "\u1161", "🫵"]
messy_text = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=3), max_size=40).map("".join)


@given(messy_text)
@example("\uff40\uff40\uff40\n２\n```")
@example("`\u200b`\u200b`\n２")
@example("\u3000```\n２\n\u3000```\n２")
def test_normalising_twice_changes_nothing_more(text: str):
    once = normalise(text)
    assert normalise(once) == once


CODE_CHARACTERS = st.characters(codec="utf-8", exclude_categories=("C", "Zl", "Zp"), exclude_characters="`~")


@given(st.text(CODE_CHARACTERS | st.just("\n")), st.sampled_from(["```", "~~~", "`````"]), st.text(CODE_CHARACTERS))
def test_code_is_kept_byte_for_byte(code: str, fence: str, prose: str):
    block = f"{fence}\n{code}\n{fence}"
    assert block in normalise(f"{prose}\n\n{block}\n\n{prose}")


def test_every_kind_of_file_is_listed():
    assert set(SUFFIXES) == {".md", ".markdown", ".txt", ".html", ".htm", ".pdf", ".docx", ".jsonl"}


def test_whoever_changes_how_text_is_cleaned_raises_the_version() -> None:
    """Collections that were cleaned in another way must be told apart; the digest changes together with the number."""
    marks = "\ufb01re 10\u00b2 1\u00bd \uff21\u3000b\u00ad\u200b \u2026 \u212b \u2122 a\u0301"
    marks += "\r\n\n\n\n\n`\ufb01`  \n\f\ttext \u2029 \ufe0f\u200d"
    text = f"{marks}\n```\n{marks}\n```\n\n    {marks}"
    digest = hashlib.sha256(normalise(text).encode()).hexdigest()[:8]
    assert (CLEANER_VERSION, digest) == (1, "96c0e5a9")
