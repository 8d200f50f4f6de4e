"""A question with the light weight of those before it."""

import numpy as np
import pytest

from app import sparse
from app.query_encoding import CONTEXT_WEIGHT, DECAY, encode_query

VECTORS = np.eye(4, dtype=np.float32)


def test_a_question_alone_is_what_its_encoders_make_of_it() -> None:
    dense, terms = encode_query("How large is the archive?", (), VECTORS[:1])
    assert dense.tolist() == VECTORS[0].tolist()
    assert terms == sparse.encode_query("How large is the archive?")


def test_earlier_questions_count_lightly_and_less_with_each_turn() -> None:
    dense, terms = encode_query("archive", ("encoder", "lighthouse", "archive encoder"), VECTORS)
    weights = np.array([1, CONTEXT_WEIGHT, CONTEXT_WEIGHT * DECAY, CONTEXT_WEIGHT * DECAY**2])
    assert dense == pytest.approx(weights / np.linalg.norm(weights))
    assert dense.dtype == np.float32
    expected = {
        term: weight
        for text, weight in zip(("archive", "encoder", "lighthouse"), weights, strict=False)
        for term in sparse.encode_query(text)
    }
    assert terms == pytest.approx(expected)


def test_a_question_of_stop_words_is_searched_for_by_what_was_said_before() -> None:
    _, terms = encode_query("and how is it?", ("lighthouse",), VECTORS[:2])
    assert set(terms) == set(sparse.encode_query("lighthouse"))
