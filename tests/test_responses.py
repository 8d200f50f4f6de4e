"""OpenAI's responses over HTTP; what the official clients make of them is in test_clients.py."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

OUTAGE = "How long did the Reading Room outage on 14 October 2025 last?"
SEARCH = {"type": "file_search", "vector_store_ids": ["default"]}


@pytest.fixture
def client(live_service: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{live_service}/v1", trust_env=False, timeout=60) as found:
        yield found


def respond(client: httpx.Client, **body: Any) -> Any:
    response = client.post("/responses", json={"input": OUTAGE, **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_a_response_and_a_completion_say_the_same(client: httpx.Client) -> None:
    messages = [{"role": "user", "content": OUTAGE}]
    completion = client.post("/chat/completions", json={"messages": messages}).json()
    response = respond(client)
    [part] = response["output"][-1]["content"]
    message = completion["choices"][0]["message"]
    assert part["text"] == message["content"]
    assert [{"type": "url_citation", **one["url_citation"]} for one in message["annotations"]] == part["annotations"]
    changing = {"request_id", "timings_ms"}
    same = [{key: rag[key] for key in rag.keys() - changing} for rag in (response["rag"], completion["rag"])]
    assert same[0] == same[1]


def test_a_stream_ends_with_the_whole_response(client: httpx.Client) -> None:
    text = client.post("/responses", json={"input": OUTAGE, "stream": True}).text
    events = [dict(line.split(": ", 1) for line in event.split("\n")) for event in text.strip().split("\n\n")]
    found = [json.loads(event["data"]) for event in events]
    assert [event["event"] for event in events] == [one["type"] for one in found]
    last, whole = found[-1]["response"], respond(client)
    assert last["id"] == found[0]["response"]["id"]
    assert (found[0]["response"]["status"], found[0]["response"]["output"]) == ("in_progress", [])
    said = {"status", "model", "usage", "tools", "text", "store", "error", "incomplete_details", "instructions"}
    assert {key: last[key] for key in said} == {key: whole[key] for key in said}
    done = [one["item"] for one in found if one["type"] == "response.output_item.done"]
    assert done == last["output"]


def test_the_tool_says_where_and_what_to_search(client: httpx.Client) -> None:
    author = {"type": "eq", "key": "author", "value": "Marit Oldershaw"}
    tool = {**SEARCH, "filters": author, "max_num_results": 2}
    response = respond(client, tools=[tool], include=["file_search_call.results"], tool_choice="required")
    search = response["output"][0]
    assert {one["attributes"]["author"] for one in search["results"]} == {"Marit Oldershaw"}
    assert (len(search["results"]), response["tools"][0]["type"]) == (2, "file_search")
    assert respond(client)["output"][0]["results"] is None


def test_what_is_said_of_a_request_is_repeated_and_nothing_is_stored(client: httpx.Client) -> None:
    response = respond(client, instructions="Be brief.", metadata={"a": "b"}, store=True, user="me", temperature=0.5)
    assert (response["instructions"], response["metadata"], response["temperature"]) == ("Be brief.", {"a": "b"}, 0.5)
    assert (response["store"], response["previous_response_id"]) == (False, None)
    error = client.get(f"/responses/{response['id']}").json()["error"]
    assert (error["code"], error["param"]) == ("not_found", "response_id")


IMAGE = [{"role": "user", "content": [{"type": "input_image", "image_url": "data:,"}]}]


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"input": None}, "invalid_value", "input"),
        ({"input": []}, "invalid_value", "input"),
        ({"input": " "}, "invalid_value", "input"),
        ({"input": IMAGE}, "invalid_value", "input"),
        ({"input": [{"role": "user"}]}, "invalid_value", "input.0"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "unsupported_parameter", "input.0.type"),
        ({"input": [{"type": "function_call_output"}]}, "unsupported_parameter", "input.0.type"),
        ({"previous_response_id": "resp_1"}, "unsupported_parameter", "previous_response_id"),
        ({"conversation": "conv_1"}, "unsupported_parameter", "conversation"),
        ({"background": True}, "unsupported_parameter", "background"),
        ({"tools": [{"type": "web_search"}]}, "unsupported_parameter", "tools.0.type"),
        ({"tools": [{"type": "function", "name": "f"}]}, "unsupported_parameter", "tools.0.type"),
        ({"tools": [{"type": "file_search"}]}, "unsupported_parameter", "tools.0.vector_store_ids"),
        ({"tools": [SEARCH, SEARCH]}, "unsupported_parameter", "tools"),
        (
            {"tools": [{**SEARCH, "filters": {"type": "gt", "key": "a", "value": 1}}]},
            "unsupported_parameter",
            "tools.0.filters.type",
        ),
        ({"tools": [SEARCH], "model": "extractive"}, "unsupported_parameter", "tools"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "unsupported_parameter", "tool_choice"),
        ({"include": ["message.output_text.logprobs"]}, "unsupported_parameter", "include"),
        ({"rag": {"dialect": "markdown"}}, "unsupported_parameter", "rag.dialect"),
        ({"text": {"format": {"type": "json_schema"}}}, "invalid_value", "text.format"),
        (
            {"text": {"format": {"type": "json_schema", "name": "a", "schema": {"type": 3}}}},
            "invalid_value",
            "text.format.schema",
        ),
        ({"text": {"format": {"type": "json_object"}}}, "unsupported_parameter", "text.format"),
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"max_output_tokens": 0}, "invalid_value", "max_output_tokens"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_request_says_which_part_is_wrong(
    client: httpx.Client, body: dict[str, Any], code: str, param: str, stream: bool
) -> None:
    response = client.post("/responses", json={"input": OUTAGE, "stream": stream, **body})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["code"], error["param"], error["type"]) == (code, param, "invalid_request_error")


def test_a_wrong_model_is_not_found(client: httpx.Client) -> None:
    response = client.post("/responses", json={"input": OUTAGE, "model": "gpt-9"})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
