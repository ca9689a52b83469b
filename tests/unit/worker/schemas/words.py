"""Short words for JSON schemas. Strings are bounded, unless `FREE`: a hot model does not end them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Schema = dict[str, Any]

BOOL: Schema = {"type": "boolean"}
NULL: Schema = {"type": "null"}
INT: Schema = {"type": "integer"}
NUMBER: Schema = {"type": "number"}
FREE: Schema = {"type": "string"}


def text(most: int = 12, least: int = 0, **keywords: Any) -> Schema:
    least_length = {"minLength": least} if least else {}
    return {"type": "string", **least_length, "maxLength": most, **keywords}


def matching(pattern: str, **keywords: Any) -> Schema:
    return {"type": "string", "pattern": pattern, **keywords}


def form(name: str) -> Schema:
    return {"type": "string", "format": name}


def integer(least: int, most: int, **keywords: Any) -> Schema:
    return {"type": "integer", "minimum": least, "maximum": most, **keywords}


def number(least: float, most: float, **keywords: Any) -> Schema:
    return {"type": "number", "minimum": least, "maximum": most, **keywords}


def one_of_words(words: str) -> Schema:
    return {"type": "string", "enum": words.split()}


def array(items: Schema | bool, most: int = 3, least: int = 0, **keywords: Any) -> Schema:
    least_length = {"minItems": least} if least else {}
    return {"type": "array", "items": items, **least_length, "maxItems": most, **keywords}


def either(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def nullable(schema: Schema) -> Schema:
    return either(schema, NULL)


def ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


def obj(properties: Mapping[str, Schema | bool], required: str | None = None, **keywords: Any) -> Schema:
    """A closed object; `required`: names, all by default."""
    names = list(properties) if required is None else required.split()
    return {
        "type": "object",
        "properties": dict(properties),
        "required": names,
        "additionalProperties": False,
        **keywords,
    }


def opened(properties: Mapping[str, Schema | bool], required: str = "", **keywords: Any) -> Schema:
    """An object that may have further properties."""
    schema = obj(properties, required, **keywords)
    del schema["additionalProperties"]
    return schema


def named(properties: Schema, least: int = 0, most: int = 3) -> Schema:
    """An object whose properties have any names, and one schema."""
    return {"type": "object", "additionalProperties": properties, "minProperties": least, "maxProperties": most}
