"""What is said of schemas before an engine sees them."""

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from app.errors import InvalidRequest, UnsupportedParameter
from app.json_schema import KEYWORDS, SCHEMA, check_grammar, check_schema
from tests.schemas import ENDLESS, INVALID, UNSUPPORTED, WELL_FORMED


def check(schema: Any) -> None:
    check_grammar(check_schema(schema))


@pytest.mark.parametrize("schema", WELL_FORMED.values(), ids=WELL_FORMED.keys())
def test_what_a_grammar_can_follow_is_taken(schema: dict[str, Any]) -> None:
    check(schema)
    assert json.loads(check_schema(schema)) == schema


@pytest.mark.parametrize("schema", INVALID.values(), ids=INVALID.keys())
def test_what_is_no_schema_is_refused_for_every_engine(schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_schema(schema)
    assert (caught.value.param, caught.value.code) == (SCHEMA, "invalid_value")
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("schema", ENDLESS.values(), ids=ENDLESS.keys())
def test_a_reference_that_leads_nowhere_is_refused(schema: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check(schema)
    assert (caught.value.param, caught.value.code) == (SCHEMA, "invalid_value")


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_what_a_grammar_would_not_follow_is_refused_by_name(what: str) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        check(UNSUPPORTED[what])
    assert caught.value.param == SCHEMA
    assert what in caught.value.message


def test_a_class_with_all_that_is_usual_is_taken() -> None:
    class Part(BaseModel):
        name: str = Field(max_length=20)
        parts: list["Part"] = []

    class Report(BaseModel):
        """A report."""

        title: str
        minutes: int | None = Field(None, ge=0)
        root: Part
        tags: list[str] = Field(max_length=3)

    check(Report.model_json_schema())


KEYS = st.sampled_from([*sorted(KEYWORDS), "not", "pattern", "a"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["string", "object", "#", "#/a", "x"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(KEYS, VALUES, max_size=5))
def test_any_mapping_is_taken_or_refused_in_words(schema: dict[str, Any]) -> None:
    with suppress(InvalidRequest):
        check(schema)
