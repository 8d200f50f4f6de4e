"""JSON Schemas of callers: what is wrong with one is said before an engine sees it.

`check_schema` holds for every engine. `check_grammar` names what an engine that turns a schema into a grammar would
ignore without a word, or not bring to an end.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from app.errors import InvalidRequest, UnsupportedParameter

FORMAT = "response_format"
SCHEMA = f"{FORMAT}.json_schema.schema"
"""Which field errors are about, as chat completions name it."""

MAX_BYTES = 2**15
MAX_DEPTH = 32
MAX_REASON = 200
"""Characters of a reason that quotes the schema."""
MAX_PROPERTIES = 256
"""Of all objects together: 300 optional ones take a quarter of a second to compile, 2,000 more than half a minute."""
MAX_ENUM_VALUES = 1_000
MAX_COUNT = 1_000
"""Of `minLength`, `maxItems` and the like."""

NESTED_MAPS = ("properties", "$defs", "definitions")
NESTED_LISTS = ("anyOf", "allOf", "prefixItems")
NESTED = ("items", "additionalProperties")
COUNTS = ("minLength", "maxLength", "minItems", "maxItems")
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
REMARKS = frozenset(
    "title description default examples $schema $id $comment deprecated readOnly writeOnly discriminator".split()
)
KEYWORDS = REMARKS.union(
    ("type", "enum", "const", "required", "format", "$ref"), NESTED_MAPS, NESTED_LISTS, NESTED, COUNTS, BOUNDS
)
FORMATS = frozenset("email date time date-time duration ipv4 ipv6 hostname uuid uri uri-reference json-pointer".split())
STANDS_ALONE = ("$ref", "anyOf", "allOf")
"""A grammar drops what stands beside them."""


def check_schema(schema: Mapping[str, Any]) -> str:
    """Give a schema as text. Raises `InvalidRequest` for one that is too large, or no JSON Schema."""
    from jsonschema import Draft202012Validator, SchemaError

    if _is_deep(schema):
        raise InvalidRequest(f"The schema nests more than {MAX_DEPTH} levels deep. Make it flatter.", param=SCHEMA)
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        num_bytes = len(text.encode())
    except ValueError:  # Lone surrogates, infinities.
        raise InvalidRequest("The schema holds what is no JSON text.", param=SCHEMA) from None
    if num_bytes > MAX_BYTES:
        raise InvalidRequest(f"The schema has {num_bytes} bytes; {MAX_BYTES} are taken at most.", param=SCHEMA)
    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        reason = " ".join(error.message.split())[:MAX_REASON].rstrip(".")
        raise InvalidRequest(f"The schema is no JSON Schema: {error.json_path}: {reason}.", param=SCHEMA) from None
    return text


def check_grammar(text: str) -> None:
    """Refuse a valid schema that a grammar could not follow to the letter, or not in reasonable time.

    Raises:
        UnsupportedParameter: with the keyword and where it stands.
        InvalidRequest: a `$ref` leads nowhere, or only back to itself.
    """
    root = json.loads(text)
    num_properties = 0
    for path, schema in _schemas(root):
        _check_keywords(path, schema)
        num_properties += len(schema.get("properties", ()))
        _check_leads_somewhere(path, schema, root)
    if num_properties > MAX_PROPERTIES:
        raise _unsupported("$", f"{num_properties} properties in all, of which {MAX_PROPERTIES} are taken at most")


def _is_deep(schema: Any) -> bool:
    level = [schema]
    for _ in range(MAX_DEPTH):
        values = (one.values() if isinstance(one, dict) else one for one in level)
        level = [inner for several in values for inner in several if isinstance(inner, (dict, list))]
    return bool(level)


def _schemas(root: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """List a schema and all that stand in it, with their paths; `true` and `false` are left out."""
    waiting = [("$", root)]
    while waiting:
        path, schema = waiting.pop()
        if not isinstance(schema, dict):
            continue
        yield path, schema
        for key in NESTED_MAPS:
            waiting += [(f"{path}.{key}.{name}", one) for name, one in schema.get(key, {}).items()]
        for key in NESTED_LISTS:
            waiting += [(f"{path}.{key}[{n}]", one) for n, one in enumerate(schema.get(key, ()))]
        waiting += [(f"{path}.{key}", schema[key]) for key in NESTED if key in schema]


def _check_keywords(path: str, schema: Mapping[str, Any]) -> None:
    for key in schema:
        if key not in KEYWORDS:
            raise _unsupported(path, f"the keyword {key!r}")
    if schema.get("format", "email") not in FORMATS:
        raise _unsupported(path, f"the format {schema['format']!r}")
    if len(schema.get("allOf", ())) > 1:
        raise _unsupported(path, "'allOf' with more than one schema")
    if len(schema.get("enum", ())) > MAX_ENUM_VALUES:
        raise _unsupported(path, f"'enum' with more than {MAX_ENUM_VALUES} values")
    for key in COUNTS:
        if schema.get(key, 0) > MAX_COUNT:
            raise _unsupported(path, f"{key!r} over {MAX_COUNT}")
    for key in STANDS_ALONE:
        beside = schema.keys() - REMARKS - {key, "$defs", "definitions"}
        if key in schema and beside:
            raise _unsupported(path, f"{min(beside)!r} beside {key!r}")


def _check_leads_somewhere(path: str, schema: Mapping[str, Any], root: Any) -> None:
    """Follow `$ref` and alternatives until there is an object, an array or a value to write."""
    seen: set[int] = set()

    def follow(one: Any, ways: tuple[int, ...]) -> None:
        if not isinstance(one, dict) or id(one) in seen:
            return
        if id(one) in ways or len(ways) > MAX_DEPTH:
            message = f"The schema's {path[:MAX_REASON]} leads back to itself, or nowhere within {MAX_DEPTH} steps."
            raise InvalidRequest(message, param=SCHEMA)
        inner = [*one.get("anyOf", ()), *one.get("allOf", ())]
        if "$ref" in one:
            inner.append(_resolve(one["$ref"], root))
        for further in inner:
            follow(further, (*ways, id(one)))
        seen.add(id(one))

    follow(schema, ())


def _resolve(reference: str, root: Any) -> Any:
    found = root
    place, separator, pointer = reference.partition("#")
    if place or not separator or (pointer and not pointer.startswith("/")):
        raise _unsupported("$", f"the reference {reference[:MAX_REASON]!r} to something outside of the schema")
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        found = found.get(key) if isinstance(found, dict) else None
    if not isinstance(found, (dict, bool)):
        raise InvalidRequest(f"The schema has nothing at {reference[:MAX_REASON]!r}.", param=SCHEMA)
    return found


def _unsupported(path: str, what: str) -> UnsupportedParameter:
    return UnsupportedParameter(
        f"The model cannot be held to this schema: {path[:MAX_REASON]} has {what}. Leave it out.", param=SCHEMA
    )
