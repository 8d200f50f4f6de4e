"""JSON Schemas to try: good ones, and those that a caller may send by mistake or in bad faith."""

from typing import Any

WELL_FORMED: dict[str, dict[str, Any]] = {
    "object": {
        "type": "object",
        "properties": {"system": {"type": "string"}, "minutes": {"type": "integer"}},
        "required": ["system", "minutes"],
        "additionalProperties": False,
    },
    "anything": {},
    "enum": {"enum": ["yes", "no", None, 3]},
    "choice": {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}]},
    "recursive": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2}},
                "required": ["children"],
            }
        },
    },
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
}

INVALID: dict[str, dict[str, Any]] = {
    "a type that is a number": {"type": 3},
    "an unknown type": {"type": "text"},
    "properties in a list": {"type": "object", "properties": []},
    "a count below zero": {"type": "string", "maxLength": -1},
    "too large": {"enum": ["v" * 100] * 1000},
    "too deep": {"items": {}},
    "infinite": {"minimum": float("inf")},
    "no Unicode": {"properties": {"\ud800": {}}},
}
for _ in range(3_000):
    INVALID["too deep"] = {"items": INVALID["too deep"]}

ENDLESS: dict[str, dict[str, Any]] = {
    "itself": {"$ref": "#"},
    "each other": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    "an alternative that is itself": {"anyOf": [{"$ref": "#"}, {"type": "string"}]},
    "nothing": {"$ref": "#/$defs/none"},
    "a long way": {
        "$ref": "#/$defs/0",
        "$defs": {str(n): {"$ref": f"#/$defs/{n + 1}"} for n in range(500)} | {"500": {"type": "string"}},
    },
}

UNSUPPORTED: dict[str, dict[str, Any]] = {
    "'not'": {"not": {"type": "string"}},
    "'oneOf'": {"oneOf": [{"type": "string"}]},
    "'pattern'": {"type": "string", "pattern": "^((((a{1,100}){1,100}){1,100}){1,100})$"},
    "'multipleOf'": {"type": "integer", "multipleOf": 2},
    "'uniqueItems'": {"type": "array", "uniqueItems": True},
    "'if'": {"if": {"type": "string"}},
    "the format 'regex'": {"type": "string", "format": "regex"},
    "'minLength' over 1000": {"type": "string", "minLength": 1_000_000_000},
    "'maxItems' over 1000": {"type": "array", "items": {"maxItems": 100_000}},
    "more than one schema": {"allOf": [{"type": "string"}, {"minLength": 1}]},
    "beside '$ref'": {"$defs": {"a": {}}, "properties": {"x": {"$ref": "#/$defs/a", "minLength": 2}}},
    "2000 properties": {"properties": {f"p{n}": {} for n in range(2000)}},
    "outside of the schema": {"$ref": "https://example.com/schema"},
}
