"""Thousands of requests that the API's description allows, or nearly allows: none may break the service or its word."""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from schemathesis.specs.openapi.schemas import OpenApiSchema

from app.keys import create_key, keys_path
from tests.conftest import running, sample_settings

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

NUM_CASES = int(os.environ.get("NUM_FUZZING_CASES", "4"))
"""For each of 28 operations, of right and of wrong requests, in a service with keys and in one without."""
TIMEOUT_S = 120
"""A request for another index loads an encoder."""
CONFORMANCE = [status_code_conformance, content_type_conformance, response_schema_conformance]
"""Each answer is one that the description tells of."""


@dataclass(frozen=True, slots=True)
class Fuzzed:
    schema: OpenApiSchema
    headers: Mapping[str, str]


@pytest.fixture(scope="module", params=["without keys", "with a key"])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzed]:
    """Start one of its own, since documents and collections come and go."""
    configured = sample_settings(tmp_path_factory.mktemp("fuzzing"))
    headers = {}
    if request.param == "with a key":
        _, secret = create_key(keys_path(configured), "fuzzer", is_admin=True)
        headers = {"Authorization": f"Bearer {secret}"}
    with running(configured) as running_service:
        yield Fuzzed(schemathesis.openapi.from_url(f"{running_service.url}/openapi.json"), headers)


@pytest.mark.parametrize("mode", GenerationMode)
def test_no_request_breaks_the_service(service: Fuzzed, mode: GenerationMode) -> None:
    for found in service.schema.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and not (operation.body or list(operation.iter_parameters())):
            continue  # Nothing could be wrong.

        @given(operation.as_strategy(generation_mode=mode))
        @settings(max_examples=NUM_CASES, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
        def ask(case: schemathesis.Case) -> None:
            response = case.call(timeout=TIMEOUT_S, headers=dict(service.headers))
            check(response)
            case.validate_response(response, checks=CONFORMANCE)

        ask()


def check(response: schemathesis.Response) -> None:
    assert "Traceback" not in response.text
    if response.status_code >= 400:
        error = json.loads(response.text)["error"]
        # An engine that quotes cannot answer without documents, and says so.
        assert response.status_code < 500 or error["code"] == "llm_unavailable", response.text
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert "\n" not in error["message"]
