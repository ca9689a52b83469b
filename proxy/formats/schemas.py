"""What is read off the JSON schema of a function's parameters where a model writes them one by one. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

MAX_REFERENCES = 8
"""From one definition to the next."""
MAX_PARTS = 256
"""Of unions, so that definitions that refer to one another end."""
_DEFINITIONS = ("$defs", "definitions")
_OBJECT_WORDS = frozenset(
    ("properties", "required", "additionalProperties", "patternProperties", "unevaluatedProperties")
)
_OPEN_WORDS = _OBJECT_WORDS - {"properties", "required"}
_PART_WORDS = frozenset(("$ref", "allOf", "anyOf", "oneOf", "not", "if", "dependentSchemas"))
"""Other parts of the schema say more of the same object."""
_TYPES: Mapping[type, str] = {
    **{str: "string", bool: "boolean", int: "integer", float: "number"},
    **{list: "array", dict: "object", type(None): "null"},
}


def type_name(value: Any) -> str:
    """JSON schema's name of the type of a JSON value."""
    return _TYPES.get(type(value), "")


def resolved(schema: Any, root: Mapping[str, Any]) -> Any:
    """`schema`, or what it refers to in the definitions of `root`; itself where that is elsewhere, or nothing."""
    for _ in range(MAX_REFERENCES):
        if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
            return schema
        found = _definition(schema["$ref"], root)
        if found is None:
            return schema
        beside = {name: value for name, value in schema.items() if name != "$ref"}
        schema = {**found, **beside} if isinstance(found, Mapping) else beside
    return schema


def _definition(reference: str, root: Mapping[str, Any]) -> Any:
    hash_sign, _, rest = reference.partition("/")
    where, _, name = rest.partition("/")
    if hash_sign != "#" or where not in _DEFINITIONS:
        return None
    definitions = root.get(where)
    return definitions.get(name) if isinstance(definitions, Mapping) else None


def with_definitions(schema: Any, root: Mapping[str, Any]) -> Any:
    """`schema` as a document of its own, with the definitions of `root` that it may refer to."""
    if not isinstance(schema, Mapping):
        return schema
    return {**schema, **{name: root[name] for name in _DEFINITIONS if name in root}}


def foreign_references(schema: Any) -> Iterator[str]:
    """References that a part of a schema loses where it becomes a document of its own."""
    level = [schema]
    while level:
        each = level.pop()
        if isinstance(each, list):
            level += each
        elif isinstance(each, Mapping):
            level += each.values()
            reference = each.get("$ref")
            if isinstance(reference, str) and not reference.startswith(tuple(f"#/{name}/" for name in _DEFINITIONS)):
                yield reference


def types_of(schema: Any, root: Mapping[str, Any]) -> frozenset[str]:
    """The types that a schema names; empty if it leaves them open."""
    found: set[str] = set()
    waiting = [schema]
    for _ in range(MAX_PARTS):
        if not waiting:
            return frozenset(found)
        part = resolved(waiting.pop(), root)
        named = _named_types(part)
        if named:
            found |= named
            continue
        union = (part.get("anyOf") or part.get("oneOf")) if isinstance(part, Mapping) else None
        if not isinstance(union, list):
            return frozenset()
        waiting += union
    return frozenset()


def _named_types(schema: Any) -> set[str]:
    if not isinstance(schema, Mapping):
        return set()
    named = schema.get("type")
    if isinstance(named, str):
        return {named}
    if isinstance(named, list):
        return {each for each in named if isinstance(each, str)}
    if "const" in schema:
        return {type_name(schema["const"])}
    values = schema.get("enum")
    return {type_name(value) for value in values} if isinstance(values, list) else set()


def closed(schema: Any) -> Any:
    """`schema` with no other properties than those listed, wherever an object lists some and does not mention others.

    What fits it fits `schema`. A function takes the arguments that it declares, and few clients say that it takes no
    others. Objects that several parts of a schema describe together stay as they are.
    """
    return _closed(schema, () if _joins_parts(schema) else _DEFINITIONS)


def _closed(schema: Any, definitions: Sequence[str] = ()) -> Any:
    """`definitions`: words whose schemas are closed too."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, Mapping):
        return schema
    made = dict(schema)
    unions = () if _OBJECT_WORDS & made.keys() else ("anyOf", "oneOf")
    for word in ("items", "prefixItems", "additionalProperties", *unions):
        if word in made:
            made[word] = _closed(made[word])
    for word in ("properties", *definitions):
        if isinstance(made.get(word), Mapping):
            made[word] = {name: _closed(each) for name, each in made[word].items()}
    if _lists_all_properties(made):
        made["additionalProperties"] = False
    return made


def _lists_all_properties(schema: Mapping[str, Any]) -> bool:
    """Whether an object has properties that it lists, needs no other ones, and nothing else is said of it."""
    properties, required = schema.get("properties"), schema.get("required", [])
    if not properties or not isinstance(properties, Mapping) or not isinstance(required, list):
        return False
    return not (_OPEN_WORDS | _PART_WORDS) & schema.keys() and all(name in properties for name in required)


def _joins_parts(schema: Any) -> bool:
    """Whether some object is described by a definition and by what stands beside the reference to it."""
    level = [schema]
    while level:
        each = level.pop()
        if isinstance(each, list):
            level += each
        elif isinstance(each, Mapping):
            if "allOf" in each or ("$ref" in each and _OBJECT_WORDS & each.keys()):
                return True
            level += each.values()
    return False
