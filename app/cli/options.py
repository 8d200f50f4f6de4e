"""Options that several verbs take, and how they are read."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from app.domain import Scalar
from app.errors import InvalidRequest

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_CONFIG = Path("serve_config.yaml")

URL = Annotated[str, typer.Option("--url", envvar="CLEAVE_URL", help="Where the service is.")]
AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
TopK = Annotated[int | None, typer.Option("--top-k", min=1, max=50, help="Passages to find.")]
Authors = Annotated[list[str] | None, typer.Option("--author", help="Only what this author wrote; repeatable.")]
FilterOptions = Annotated[
    list[str] | None,
    typer.Option("--filter", metavar="KEY=VALUE", help="Only documents with this field; repeatable."),
]


def read_filters(authors: Sequence[str] | None, options: Sequence[str] | None) -> dict[str, list[Scalar]]:
    """Read the filters; values of the same field are alternatives."""
    filters: dict[str, list[Scalar]] = {"author": list(authors)} if authors else {}
    for option in options or ():
        key, equals, value = option.partition("=")
        if not key or not equals:
            raise InvalidRequest(f"--filter: {option!r} is not KEY=VALUE. Write it like --filter platform=Medium.")
        filters.setdefault(key, []).extend(_readings(value))
    return filters


def _readings(value: str) -> list[Scalar]:
    """Read a value as a text and, where it looks like one, as a number or boolean: documents may hold either."""
    try:
        other = json.loads(value, parse_constant=str)
    except ValueError:
        return [value]
    return [value, other] if isinstance(other, bool | int | float) else [value]
