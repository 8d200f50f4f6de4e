"""What /openapi.json says of all routes: which need a key, which errors there are, and an example of each use.

The examples are a service's answers over the sample documents, by operation in `examples.json`.
"""

import json
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from app import errors
from app.api.authentication import is_open
from app.api.bodies import Error
from app.api.errors import error_body
from app.errors import CleaveError, ConfigurationError, UnreadableFile

JSON = "application/json"
EXAMPLES = Path(__file__).parent / "examples.json"
ERRORS = {"4XX": "Refused", "5XX": "Failed"}
NEVER_ANSWERED = (ConfigurationError, UnreadableFile)
"""What stops the start, and what is reported per file."""
MESSAGES = {CleaveError: "Internal error. The service's log has the details under request id 'a1b2c3'."}
"""Of the example of an error of which its class does not tell."""


class API(FastAPI):
    """An application with a description that is complete."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            responses={range_: {"$ref": f"#/components/responses/{name}"} for range_, name in ERRORS.items()}, **options
        )

    def openapi(self) -> dict[str, Any]:
        """Describe the routes."""
        if self.openapi_schema is None:
            self.openapi_schema = _completed(super().openapi())
        return self.openapi_schema


def _completed(described: dict[str, Any]) -> dict[str, Any]:
    components = described["components"]
    components["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "A key of `cleave keys create`."}
    }
    components["responses"] = {name: _errors(int(range_[0])) for range_, name in ERRORS.items()}
    schema = Error.model_json_schema(ref_template="#/components/schemas/{model}")
    components["schemas"] |= {**schema.pop("$defs"), "Error": schema}
    examples = json.loads(EXAMPLES.read_text(encoding="utf-8"))
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            if not is_open(path):
                operation["security"] = [{"key": []}]
            _finish(operation, examples.get(f"{method.upper()} {path}", {}))
    return described


def _finish(operation: dict[str, Any], examples: dict[str, Any]) -> None:
    for parameter in operation.get("parameters", ()):
        if parameter["name"] in examples.get("parameters", {}):
            parameter["example"] = examples["parameters"][parameter["name"]]
    if "request" in examples:
        operation["requestBody"]["content"][JSON]["example"] = examples["request"]
    for status, response in operation["responses"].items():
        for media_type, content in response.get("content", {}).items():
            key = status if media_type == JSON else f"{status} {media_type}"
            if key in examples:
                content["example"] = examples[key]
            if reference := content["schema"].get("$ref"):
                content["schema"] = {"$ref": reference}  # Beside it stands what the function returns: any object.


def _errors(hundreds: int) -> dict[str, Any]:
    """Describe a range of errors by their classes."""
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CleaveError)]
    answered = {kind.code: kind for kind in kinds if kind not in NEVER_ANSWERED and kind.status // 100 == hundreds}
    examples = {
        code: {"summary": f"{kind.status} {code}", "value": error_body(kind(MESSAGES.get(kind) or kind.__doc__ or ""))}
        for code, kind in sorted(answered.items(), key=lambda one: (one[1].status, one[0]))
    }
    whose = "The request is wrong, or not allowed (now)" if hundreds == 4 else "The service cannot answer (now)"
    return {
        "description": f"{whose}. With `Retry-After` where another try makes sense.",
        "headers": {"Retry-After": {"description": "seconds", "schema": {"type": "integer"}}},
        "content": {JSON: {"schema": {"$ref": "#/components/schemas/Error"}, "examples": examples}},
    }
