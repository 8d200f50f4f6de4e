"""/openapi.json is complete, and its examples are what the service takes and gives."""

import json
import time
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from jsonschema import Draft202012Validator

from app.api.description import EXAMPLES, JSON
from tests.conftest import running, sample_settings

RECORDED: Mapping[str, Any] = json.loads(EXAMPLES.read_text(encoding="utf-8"))
"""In an order in which they can be done."""
DEADLINE_S = 180
LINE = RECORDED["GET /v1/files/{file_id}/content"]["200 application/jsonl"]


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Start one of its own, since examples delete too."""
    with (
        running(sample_settings(tmp_path_factory.mktemp("description"))) as running_service,
        httpx.Client(base_url=running_service.url, timeout=DEADLINE_S) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def described(service: httpx.Client) -> Any:
    return service.get("/openapi.json").json()


def operations(described: Any) -> dict[str, Any]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in described["paths"].items()
        for method, operation in methods.items()
    }


def resolved(described: Any, part: Any) -> Any:
    while "$ref" in part:
        found = described
        for key in part["$ref"].removeprefix("#/").split("/"):
            found = found[key]
        part = found
    return part


def closed(part: Any) -> Any:
    """Let objects have no fields but those that are described."""
    if isinstance(part, list):
        return [closed(one) for one in part]
    if not isinstance(part, dict):
        return part
    found = {key: closed(value) for key, value in part.items()}
    if found.get("type") == "object" and "properties" in found:
        found.setdefault("additionalProperties", False)
    return found


def check(described: Any, schema: Any, value: Any) -> None:
    components = closed({"schemas": described["components"]["schemas"]})
    Draft202012Validator({**closed(schema), "components": components}).validate(value)


def test_every_operation_says_what_it_takes_and_gives(described: Any) -> None:
    for name, operation in operations(described).items():
        assert operation["summary"], name
        assert operation["description"], name
        for body in operation.get("requestBody", {}).get("content", {}).values():
            assert resolved(described, body["schema"])["properties"], name
        successes = {status: one for status, one in operation["responses"].items() if status.startswith("2")}
        assert successes, name
        for status, response in successes.items():
            assert response["description"], name
            assert response.get("content") or status == "204", name
            for content in response.get("content", {}).values():
                schema = resolved(described, content["schema"])
                assert {"properties", "anyOf"} & set(schema) or schema == {"type": "string"}, name
        errors = operation["responses"].keys() - successes.keys()
        assert {"4XX", "5XX"} <= errors <= {"4XX", "5XX", "503"}, name
    assert not [name for name in described["components"]["schemas"] if "Validation" in name]


def test_every_use_of_json_has_an_example(described: Any) -> None:
    assert set(RECORDED) == set(operations(described))
    for name, operation in operations(described).items():
        for part in (operation.get("requestBody", {}), operation["responses"].get("200", {})):
            assert "example" in part.get("content", {}).get(JSON, {"example": ""}), name


def test_every_example_is_what_its_schema_says(described: Any) -> None:
    for operation in operations(described).values():
        for part in (operation.get("requestBody", {}), *operation["responses"].values()):
            for content in resolved(described, part).get("content", {}).values():
                if "example" in content:
                    check(described, content["schema"], content["example"])
                for example in content.get("examples", {}).values():
                    check(described, content["schema"], example["value"])


def test_every_example_is_what_the_service_does(service: httpx.Client, described: Any) -> None:
    found = operations(described)
    accepted = service.post(
        "/v1/documents", params={"background": True}, json=RECORDED["POST /v1/documents"]["request"]
    )
    assert accepted.status_code == 202
    sent = service.post("/v1/files", data={"purpose": "batch"}, files={"file": ("questions.jsonl", LINE)}).json()
    begun = {**RECORDED["POST /v1/batches"]["request"], "input_file_id": sent["id"]}
    batch = service.post("/v1/batches", json=begun).json()
    wait_for(service, f"/v1/batches/{batch['id']}", "status", "completed")
    ours = {"ingestion_id": accepted.json()["id"], "file_id": sent["id"], "batch_id": batch["id"]}
    wait_for(service, f"/v1/ingestions/{ours['ingestion_id']}", "status", "completed")
    for name in RECORDED:
        response = ask(service, name, found[name], ours)
        assert response.status_code in (200, 202), (name, response.text)
        described_answer = found[name]["responses"][str(response.status_code)]["content"]
        media_type = response.headers["content-type"].partition(";")[0]
        content = described_answer[media_type]
        if media_type == JSON:
            check(described, content["schema"], response.json())
            check(described, content["schema"], content["example"])
        if name == "POST /v1/batches":
            wait_for(service, f"/v1/batches/{response.json()['id']}", "status", "completed")
        if name == "POST /v1/reindex":
            wait_for(service, "/v1/reindex", "state", "built")


def ask(service: httpx.Client, name: str, operation: Any, ours: Mapping[str, str]) -> httpx.Response:
    """Send an example as it is described."""
    method, _, path = name.partition(" ")
    given: dict[str, dict[str, Any]] = {"path": {}, "query": {}}
    for parameter in operation.get("parameters", ()):
        if "example" in parameter:
            given[parameter["in"]][parameter["name"]] = ours.get(parameter["name"], parameter["example"])
    url = path.format_map({key: quote(value, safe="") for key, value in given["path"].items()})
    bodies = operation.get("requestBody", {}).get("content", {})
    if bodies and JSON not in bodies:
        return service.post(url, data={"purpose": "batch"}, files={"file": ("questions.jsonl", LINE)})
    body = bodies.get(JSON, {}).get("example")
    if body and "input_file_id" in body:
        body = {**body, "input_file_id": ours["file_id"]}
    return service.request(method, url, params=given["query"], json=body)


def wait_for(service: httpx.Client, path: str, key: str, value: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while (found := service.get(path).json())[key] != value:
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
