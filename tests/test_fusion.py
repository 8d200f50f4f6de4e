"""Fusion of ranked lists: what it promises for any scores, and by example."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.fusion import fuse

SCORES = st.dictionaries(st.integers(0, 20), st.floats(0.01, 100), max_size=12)
WEIGHTS = st.floats(0.1, 10)


@given(SCORES, SCORES, WEIGHTS, WEIGHTS, st.integers(1, 12))
def test_everything_found_is_scored_between_0_and_1(
    first: dict[int, float], second: dict[int, float], a: float, b: float, length: int
) -> None:
    fused = fuse([first, second], [a, b], length=length)
    assert set(fused) == set(first) | set(second)
    assert all(0 <= score <= 1 + 1e-9 for score in fused.values())


@given(SCORES, SCORES, WEIGHTS, st.floats(0.01, 100), st.floats(0.01, 100))
def test_the_scale_of_a_list_does_not_matter(
    first: dict[int, float], second: dict[int, float], weight: float, scale: float, other: float
) -> None:
    scaled = [{key: score * factor for key, score in one.items()} for one, factor in ((first, scale), (second, other))]
    plain = fuse([first, second], [1, weight], length=50)
    assert fuse(scaled, [1, weight], length=50) == pytest.approx(plain)


@given(SCORES)
def test_one_list_keeps_its_order(scores: dict[int, float]) -> None:
    fused = fuse([scores, {}], [1, 1], length=50)
    assert sorted(fused, key=lambda key: (fused[key], key)) == sorted(scores, key=lambda key: (scores[key], key))


def test_what_is_good_in_both_lists_beats_the_best_of_one() -> None:
    fused = fuse([{"a": 0.9, "both": 0.8}, {"b": 20.0, "both": 18.0}], [1, 1], length=10)
    assert max(fused, key=lambda key: fused[key]) == "both"


def test_a_heavier_list_decides() -> None:
    lists = [{"a": 1.0, "b": 0.5}, {"b": 1.0, "a": 0.5}]
    assert fuse(lists, [3, 1], length=2)["a"] > fuse(lists, [3, 1], length=2)["b"]
    assert fuse(lists, [1, 3], length=2)["a"] < fuse(lists, [1, 3], length=2)["b"]


def test_a_full_list_says_nothing_of_what_it_left_out_but_that_it_is_no_better() -> None:
    full = fuse([{"a": 1.0, "b": 0.8}, {"c": 1.0}], [1, 1], length=2)
    short = fuse([{"a": 1.0, "b": 0.8}, {"c": 1.0}], [1, 1], length=3)
    assert full["c"] == pytest.approx(0.5 + 0.5 * 0.8)
    assert short["c"] == pytest.approx(0.5)


def test_scores_below_0_count_as_nothing_found() -> None:
    assert fuse([{"a": -0.2}, {"b": 2.0}], [1, 1], length=5) == {"a": 0.0, "b": 0.5}
