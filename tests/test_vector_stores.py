"""Collections in the shape of OpenAI's vector stores."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.api.filters import AttributeFilter, to_filters
from app.errors import InvalidRequest

OUTAGE = "How long did the Reading Room outage on 14 October 2025 last?"


def eq(key: str, value: Any) -> dict[str, Any]:
    return {"type": "eq", "key": key, "value": value}


def translated(wanted: dict[str, Any]) -> Any:
    return to_filters(AttributeFilter.model_validate(wanted), param="filters")


@pytest.mark.parametrize(
    ("wanted", "filters"),
    [
        (eq("a", 1), {"a": [1]}),
        (eq("a", False), {"a": [False]}),
        ({"type": "in", "key": "a", "value": ["x", "y"]}, {"a": ["x", "y"]}),
        ({"type": "and", "filters": [eq("a", "x"), eq("b", 2)]}, {"a": ["x"], "b": [2]}),
        ({"type": "or", "filters": [eq("a", "x"), {"type": "in", "key": "a", "value": [2]}]}, {"a": ["x", 2]}),
        (
            {"type": "and", "filters": [eq("b", 1), {"type": "or", "filters": [eq("a", "x"), eq("a", "y")]}]},
            {"b": [1], "a": ["x", "y"]},
        ),
    ],
)
def test_what_the_stores_can_do_is_translated(wanted: dict[str, Any], filters: Any) -> None:
    assert translated(wanted) == filters


@pytest.mark.parametrize(
    ("wanted", "code", "param"),
    [
        ({"type": "ne", "key": "a", "value": 1}, "unsupported_parameter", "filters.type"),
        ({"type": "gt", "key": "a", "value": 1}, "unsupported_parameter", "filters.type"),
        (
            {"type": "and", "filters": [eq("a", 1), {"type": "nin", "key": "b", "value": [1]}]},
            "unsupported_parameter",
            "filters.filters.1.type",
        ),
        ({"type": "and", "filters": [eq("a", 1), eq("a", 2)]}, "unsupported_parameter", "filters"),
        ({"type": "or", "filters": [eq("a", 1), eq("b", 2)]}, "unsupported_parameter", "filters"),
        ({"type": "or", "filters": []}, "invalid_value", "filters.filters"),
        ({"type": "and"}, "invalid_value", "filters.filters"),
        ({"type": "eq", "key": "a"}, "invalid_value", "filters"),
        (eq("a", [1]), "invalid_value", "filters.value"),
        ({"type": "in", "key": "a", "value": 1}, "invalid_value", "filters.value"),
        ({"type": "in", "key": "a", "value": []}, "invalid_value", "filters.value"),
    ],
)
def test_the_rest_is_refused_by_name(wanted: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        translated(wanted)
    assert (caught.value.code, caught.value.param) == (code, param)


SCALARS = st.integers(0, 3) | st.sampled_from("xyz")
COMPARISONS = st.builds(eq, st.sampled_from("ab"), SCALARS) | st.builds(
    lambda key, values: {"type": "in", "key": key, "value": values},
    st.sampled_from("ab"),
    st.lists(SCALARS, min_size=1, max_size=3),
)
TREES = st.recursive(
    COMPARISONS,
    lambda inner: st.builds(
        lambda kind, parts: {"type": kind, "filters": parts},
        st.sampled_from(["and", "or"]),
        st.lists(inner, min_size=1, max_size=3),
    ),
    max_leaves=6,
)


def matches(wanted: dict[str, Any], held: dict[str, Any]) -> bool:
    if wanted["type"] in ("and", "or"):
        return (all if wanted["type"] == "and" else any)(matches(one, held) for one in wanted["filters"])
    values = wanted["value"] if wanted["type"] == "in" else [wanted["value"]]
    return held[wanted["key"]] in values


@given(TREES, st.fixed_dictionaries({"a": SCALARS, "b": SCALARS}))
def test_what_is_translated_means_the_same(wanted: dict[str, Any], held: dict[str, Any]) -> None:
    try:
        filters = translated(wanted)
    except InvalidRequest:
        return
    assert all(held[key] in values for key, values in filters.items()) == matches(wanted, held)


# --- Over HTTP -------------------------------------------------------------------------------------------------------


@pytest.fixture
def client(live_service: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{live_service}/v1/vector_stores", trust_env=False, timeout=60) as found:
        yield found


def search(client: httpx.Client, **body: Any) -> Any:
    response = client.post("/default/search", json={"query": OUTAGE, **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_a_search_has_openais_shape(client: httpx.Client) -> None:
    page = search(client, max_num_results=2)
    assert {key: page[key] for key in page.keys() - {"data"}} == {
        "object": "vector_store.search_results.page",
        "search_query": [OUTAGE],
        "has_more": False,
        "next_page": None,
    }
    assert len(page["data"]) == 2
    first = page["data"][0]
    assert set(first) == {"file_id", "filename", "score", "attributes", "content"}
    assert [part["type"] for part in first["content"]] == ["text"]


def test_a_filter_narrows_the_search(client: httpx.Client) -> None:
    wanted = {"type": "in", "key": "author", "value": ["Marit Oldershaw", "Nobody"]}
    assert {one["attributes"]["author"] for one in search(client, filters=wanted)["data"]} == {"Marit Oldershaw"}


def test_several_queries_find_what_any_of_them_finds(client: httpx.Client) -> None:
    alone = [search(client, query=query)["data"][0]["file_id"] for query in ("Reading Room outage", "KV cache size")]
    page = search(client, query=["Reading Room outage", "KV cache size"], max_num_results=4)
    assert set(alone) <= {one["file_id"] for one in page["data"]}
    scores = [one["score"] for one in page["data"]]
    assert (len(scores), scores) == (4, sorted(scores, reverse=True))


def test_a_query_is_rewritten_to_filters_when_asked(client: httpx.Client) -> None:
    query = "What did Noor Hallivant write about backups?"
    authors = [
        {one["attributes"]["author"] for one in search(client, query=query, rewrite_query=rewrite)["data"]}
        for rewrite in (True, False)
    ]
    assert authors[0] == {"Noor Hallivant"}
    assert len(authors[1]) > 1


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"query": " "}, "invalid_value", "query"),
        ({"query": []}, "invalid_value", "query"),
        ({"query": ["a"] * 9}, "invalid_value", "query"),
        ({"max_num_results": 51}, "invalid_value", "max_num_results"),
        ({"ranking_options": {"score_threshold": 0.5}}, "unsupported_parameter", "ranking_options.score_threshold"),
        ({"ranking_options": {"ranker": "none"}}, "unsupported_parameter", "ranking_options.ranker"),
        ({"filters": {"type": "like", "key": "a", "value": "b"}}, "invalid_value", "filters.type"),
        ({"filters": eq("autor", "Noor")}, "unknown_filter", "filters.autor"),
        ({"topk": 3}, "invalid_value", "topk"),
    ],
)
def test_a_wrong_search_says_which_part_is_wrong(
    client: httpx.Client, body: dict[str, Any], code: str, param: str
) -> None:
    response = client.post("/default/search", json={"query": OUTAGE, **body})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, code, param)


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_an_unknown_vector_store_is_named(client: httpx.Client, method: str) -> None:
    response = client.request(method, "/nothing" + ("/search" if method == "POST" else ""), json={"query": "a"})
    assert (response.status_code, response.json()["error"]["code"]) == (404, "collection_not_found")
