"""Which of the found passages are given: duplicates once, neighbours joined, no document alone."""

from hypothesis import given
from hypothesis import strategies as st

from app.domain import Passage
from app.selection import choose, join_neighbours, without_duplicates

TEXT = "The lock is held for as long as the write takes, and a reader that comes in between waits for it."


def passage(document_id: str, index: int, text: str = "", score: float = 0.5, *, gap: int = 2) -> Passage:
    text = text or f"Chunk number {index} of the document {document_id} says something of its own."
    start = 1000 * index
    return Passage(f"{document_id}#{index}", document_id, "", "", {}, text, score, start=start, end=start + 1000 - gap)


PASSAGES = st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 6)), unique=True, max_size=15).map(
    lambda places: [passage(document_id, index) for document_id, index in places]
)


def names(passages: list[Passage]) -> list[str]:
    return [one.chunk_id for one in passages]


def test_the_same_text_in_two_documents_is_given_once_and_names_both() -> None:
    kept = without_duplicates([passage("a", 0, TEXT), passage("b", 3, TEXT.upper() + "!"), passage("c", 1)])
    assert names(kept) == ["a#0", "c#1"]
    assert kept[0].also_in == ("b",)


def test_a_document_that_repeats_itself_is_not_named_twice() -> None:
    kept = without_duplicates(
        [passage("a", 0, TEXT), passage("a", 9, TEXT), passage("b", 0, TEXT), passage("b", 1, TEXT)]
    )
    assert names(kept) == ["a#0"]
    assert kept[0].also_in == ("b",)


def test_texts_that_only_resemble_each_other_both_stay() -> None:
    other = TEXT.replace("for as long as the write takes", "until the last reader has gone")
    assert len(without_duplicates([passage("a", 0, TEXT), passage("b", 0, other)])) == 2


def test_neighbours_are_one_passage_in_the_order_of_the_document() -> None:
    joined = join_neighbours([passage("a", 4, "behind", 0.9), passage("b", 0), passage("a", 3, "before", 0.7)])
    assert names(joined) == ["a#4", "b#0"]
    assert (joined[0].text, joined[0].score) == ("before\n\nbehind", 0.9)
    assert (joined[0].start, joined[0].end) == (3000, 4998)


def test_sentences_that_were_cut_apart_are_joined_by_what_stood_between_them() -> None:
    space, nothing = (join_neighbours([passage("a", 0, "One", gap=gap), passage("a", 1, "two")]) for gap in (1, 0))
    assert (space[0].text, nothing[0].text) == ("One two", "Onetwo")


def test_chunks_that_are_no_neighbours_stay_apart() -> None:
    found = [passage("a", 0), passage("a", 2), passage("b", 1)]
    assert join_neighbours(found) == found


def test_a_document_fills_half_of_the_places_while_others_are_left() -> None:
    # Every second chunk: none are neighbours.
    found = [passage("a", 2 * index) for index in range(6)] + [passage("b", 0), passage("c", 0)]
    assert names(choose(found, 5)) == ["a#0", "a#2", "a#4", "b#0", "c#0"]
    assert names(choose(found[:6], 5)) == ["a#0", "a#2", "a#4", "a#6", "a#8"]


@given(PASSAGES, st.integers(1, 10))
def test_the_best_comes_first_and_nothing_is_given_twice(found: list[Passage], limit: int) -> None:
    chosen = choose(found, limit)
    assert len(chosen) <= limit
    assert names(chosen)[:1] == names(found)[:1]
    texts = " ".join(one.text for one in chosen)
    assert all(texts.count(one.text) <= 1 for one in found)


@given(PASSAGES)
def test_nothing_that_was_found_is_lost(found: list[Passage]) -> None:
    texts = " ".join(one.text for one in choose(found, 50))
    assert all(one.text in texts for one in found)
