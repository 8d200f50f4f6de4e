"""Thousands of requests that the OpenAPI schema allows, or nearly allows: none may break the service."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.schemas import OpenApiSchema

from app.settings import LLMSettings, Settings, StoreSettings
from tests.conftest import ARTICLES, ServiceThread

pytestmark = pytest.mark.slow

NUM_CASES = 150
"""For each operation, beside the ones at the borders of the schema."""
TIMEOUT_S = 120
"""An index is rebuilt by a request that loads an encoder first."""
NO_HTTP = "Invalid HTTP request received."
"""uvicorn's own answer, before any application is asked."""


@pytest.fixture(scope="module")
def api() -> Iterator[OpenApiSchema]:
    """A service of its own, since documents and collections come and go."""
    service = ServiceThread(
        Settings(
            seed=ARTICLES,
            store=StoreSettings(kind="memory"),
            llm=LLMSettings(engine="extractive"),
            data_dir=Path("unused"),
        )
    )
    service.start()
    service.wait_until_built()
    yield schemathesis.openapi.from_url(f"{service.url}/openapi.json")
    service.stop()


@pytest.mark.parametrize("mode", GenerationMode)
def test_no_request_breaks_the_service(api: OpenApiSchema, mode: GenerationMode) -> None:
    for found in api.get_all_operations():
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and not (operation.body or list(operation.iter_parameters())):
            continue  # Nothing could be wrong.

        @given(operation.as_strategy(generation_mode=mode))
        @settings(max_examples=NUM_CASES, deadline=None, suppress_health_check=list(HealthCheck))
        def ask(case: schemathesis.Case) -> None:
            check(case.call(timeout=TIMEOUT_S))

        ask()


def check(response: schemathesis.Response) -> None:
    assert response.status_code < 500, response.text
    assert "Traceback" not in response.text
    if response.status_code >= 400 and response.text != NO_HTTP:
        error = json.loads(response.text)["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert "\n" not in error["message"]
