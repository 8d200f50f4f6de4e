import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.citations import Citation, MarkerFilter, find_citations, without_markers


def filtered(pieces: list[str], num_presented: int) -> tuple[str, int]:
    markers = MarkerFilter(num_presented)
    text = "".join(markers.feed(piece) for piece in pieces) + markers.flush()
    return text, markers.num_removed


@pytest.mark.parametrize(
    ("text", "kept", "num_removed"),
    [
        ("One [1]. Two [2].", "One [1]. Two [2].", 0),
        ("One [3].", "One.", 1),
        ("One [0].", "One.", 1),
        ("One [1, 9].", "One [1].", 1),
        ("One [1,2].", "One [1][2].", 0),
        ("A list [a], an index x[i], an open [", "A list [a], an index x[i], an open [", 0),
        ("[9] first", " first", 1),
    ],
)
def test_markers_that_name_no_presented_source_are_removed_and_counted(text: str, kept: str, num_removed: int) -> None:
    assert filtered([text], 2) == (kept, num_removed)


@given(st.text(alphabet="a [1],29", max_size=40), st.lists(st.integers(0, 40), max_size=8))
def test_how_a_text_is_cut_into_pieces_does_not_matter(text: str, cuts: list[int]) -> None:
    ends = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    pieces = [text[start:end] for start, end in itertools.pairwise(ends)]
    assert filtered(pieces, 2) == filtered([text], 2)


def test_citations_carry_the_place_of_their_marker() -> None:
    text = "Paris [2]."
    assert find_citations(text) == [Citation(2, 6, 9)]
    assert text[6:9] == "[2]"


def test_markers_are_stripped_with_the_space_before_them() -> None:
    assert without_markers("Paris [2] is [1][3] big.") == "Paris is big."
