"""Families of small schemas: one keyword, or one pair of keywords, with many values."""

from __future__ import annotations

from itertools import chain, combinations

from baton.tests.unit.worker.schemas.words import (
    BOOL,
    INT,
    NULL,
    NUMBER,
    Schema,
    array,
    either,
    form,
    integer,
    matching,
    named,
    number,
    obj,
    one_of_words,
    opened,
    text,
)

FORMATS = ("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri")
PATTERNS = (
    "^a+$",
    "^(foo|bar)?$",
    "^[^a-z]{2,5}$",
    r"^\d{3}-\d{4}$",
    r"^\w{1,8}$",
    r"^[\w.]{1,6}@[a-z]{1,6}\.(com|org)$",
    "^(0|[1-9][0-9]{0,3})$",
    "^ab{2,4}c?$",
    "^[À-ÿ]{1,3}$",
    r"^\$[a-z]{1,4}\\$",
    '^"[a-z]"$',
    "^(a|b(c|d){1,2}){1,3}$",
    r"^/(\w{1,4}/){0,2}$",
)


def _named_after(schemas: dict[object, Schema], family: str) -> dict[str, Schema]:
    return {f"{family} {name}": schema for name, schema in schemas.items()}


def _integers() -> dict[str, Schema]:
    pairs = ((0, 0), (-1, 1), (0, 9), (5, 17), (-128, 127), (99, 1001), (-1000, -10), (0, 2**31), (-(10**15), 10**15))
    bounded: dict[object, Schema] = {pair: integer(*pair) for pair in pairs}
    exclusive = {
        f"exclusive {a}, {b}": {"type": "integer", "exclusiveMinimum": a, "exclusiveMaximum": b}
        for a, b in ((0, 2), (-5, 100))
    }
    steps = {f"multiple {step}": integer(0, 500, multipleOf=step) for step in (2, 7, 50)}
    return _named_after(
        bounded | exclusive | steps | {"free": INT, "from 10": {"type": "integer", "minimum": 10}}, "integer"
    )


def _numbers() -> dict[str, Schema]:
    pairs = ((0, 1), (-1.5, 1.5), (0.001, 0.01), (-273.15, 1e6), (100, 100))
    bounded: dict[object, Schema] = {pair: number(*pair) for pair in pairs}
    exclusive = {"exclusive": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}}
    return _named_after(bounded | exclusive | {"multiple 0.5": number(0, 9, multipleOf=0.5), "free": NUMBER}, "number")


def _strings() -> dict[str, Schema]:
    lengths: dict[object, Schema] = {
        pair: text(pair[1], pair[0]) for pair in ((0, 0), (0, 1), (1, 1), (2, 3), (5, 12), (0, 40))
    }
    both = {"pattern and length": matching("^[a-z]+$", maxLength=5), "open pattern": matching("[0-9]", maxLength=6)}
    patterns = {pattern: matching(pattern) for pattern in PATTERNS}
    return _named_after(lengths | both | patterns | {name: form(name) for name in FORMATS}, "string")


def _constants() -> dict[str, Schema]:
    values: list[object] = ["a", "", 0, -1.5, True, None, {"a": [1, {}]}, [], 'quo"te\\ \n', "ünï"]
    constants: dict[object, Schema] = {repr(value): {"const": value} for value in values}
    enums = {
        "words": one_of_words("red green blue"),
        "prefixes": one_of_words("a ab abc abcd"),
        "any": {"enum": values},
        "many": {"enum": [f"value_{number_}" for number_ in range(200)]},
        "restricted": {"type": "string", "enum": ["a", "b", 3]},
        "both": {"allOf": [one_of_words("a b"), one_of_words("b c")]},
    }
    return _named_after(constants, "const") | _named_after(dict(enums), "enum")


def _arrays() -> dict[str, Schema]:
    sizes = {
        f"{least}, {most}": array(integer(0, 9), most, least)
        for least, most in ((0, 0), (0, 1), (1, 1), (2, 5), (8, 8))
    }
    tuples = {
        "closed tuple": {"type": "array", "prefixItems": [INT, BOOL], "items": False},
        "open tuple": {"type": "array", "prefixItems": [BOOL], "items": integer(0, 9), "minItems": 1, "maxItems": 3},
        "short tuple": {"type": "array", "prefixItems": [BOOL, NULL, INT], "items": False, "minItems": 2},
        "old tuple": {
            "$schema": "http://json-schema.org/draft-07/schema#",
            "type": "array",
            "items": [BOOL, NULL],
            "additionalItems": False,
        },
        "nested": array(array(array(BOOL, 2), 2), 2),
        "of anything": {"type": "array", "maxItems": 1, "items": {"type": ["integer", "boolean", "null"]}},
    }
    return _named_after({**sizes, **tuples}, "array")


def _objects() -> dict[str, Schema]:
    properties = {"a": integer(0, 9), "b": BOOL, "c": text(4)}
    subsets = chain.from_iterable(combinations("abc", size) for size in range(4))
    required = {f"required {''.join(names)}": obj(properties, " ".join(names)) for names in subsets}
    counts = {
        f"{least} to {most} properties": named(integer(0, 9), least, most) for least, most in ((0, 1), (1, 1), (2, 3))
    }
    others = {
        "open": opened(properties, "a"),
        "open, few": opened(properties, "a b c", maxProperties=4),
        "odd names": obj({'quo"te': BOOL, "line\nbreak": BOOL, "": BOOL, "ü": BOOL}),
        "by pattern": {
            "type": "object",
            "patternProperties": {"^x_[a-z]{1,3}$": integer(0, 9)},
            "additionalProperties": False,
            "minProperties": 1,
            "maxProperties": 2,
        },
        "none": {"type": "object", "additionalProperties": False},
        "forbidden property": opened({"a": False, "b": BOOL}, "b", maxProperties=2),
    }
    return _named_after({**required, **counts, **others}, "object")


def _unions() -> dict[str, Schema]:
    a, b = obj({"kind": {"const": "a"}, "x": integer(0, 9)}), obj({"kind": {"const": "b"}, "y": BOOL})
    return _named_after(
        {
            "anyOf": either(integer(0, 9), text(3)),
            "anyOf, one in the other": either(INT, NUMBER),
            "anyOf beside properties": {
                **opened({"a": integer(0, 9)}),
                "anyOf": [{"required": ["a"]}, {"properties": {"b": text(2)}, "required": ["b"]}],
            },
            "oneOf": {"oneOf": [BOOL, integer(0, 9), NULL]},
            "oneOf, by a constant": {"oneOf": [a, b]},
            "allOf": {
                "allOf": [opened({"a": integer(0, 9)}, "a"), opened({"b": BOOL}, "b")],
                "maxProperties": 3,
                "type": "object",
            },
            "allOf of lengths": {"allOf": [text(5), {"type": "string", "minLength": 2}]},
            "allOf of patterns": {"allOf": [matching("^a"), matching("b$")], "maxLength": 6},
            "types": {"type": ["integer", "string", "null"], "maximum": 3, "maxLength": 2},
            "nullable": {"type": ["string", "null"], "maxLength": 3},
            "unions in unions": either(either(BOOL, NULL), either(integer(0, 1), array(either(BOOL, NULL), 2))),
            "any scalar": {"type": ["boolean", "null", "integer"]},
        },
        "union",
    )


FAMILIES: dict[str, Schema] = {
    name: schema
    for family in (_integers, _numbers, _strings, _constants, _arrays, _objects, _unions)
    for name, schema in family().items()
}

REFUSED: dict[str, tuple[Schema, str]] = {
    "not": ({"not": INT}, '"not"'),
    "if": ({"type": "object", "if": {"required": ["a"]}, "then": {"required": ["b"]}}, '"if"'),
    "unique items": (array(INT, uniqueItems=True), "uniqueItems"),
    "contains": (array(INT, contains={"const": 1}), "contains"),
    "minContains": (array(INT, contains=INT, minContains=2), "minContains"),
    "property names": (named(INT) | {"propertyNames": {"maxLength": 3}}, "propertyNames"),
    "dependent schemas": (opened({}, dependentSchemas={"a": {"required": ["b"]}}), "dependentSchemas"),
    "dependent required": (opened({}, dependentRequired={"a": ["b"]}), "dependentRequired"),
    "unevaluated properties": (opened({"a": INT}, unevaluatedProperties=False), "unevaluatedProperties"),
    "unevaluated items": ({"type": "array", "unevaluatedItems": False}, "unevaluatedItems"),
    "dynamic reference": ({"$dynamicRef": "#a"}, "dynamicRef"),
    "remote reference": ({"$ref": "https://example.com/schema"}, "example.com"),
    "missing reference": ({"$ref": "#/$defs/missing"}, "missing"),
    "oneOf that overlaps": ({"oneOf": [INT, NUMBER]}, "oneOf"),
    "oneOf of open objects": ({"oneOf": [opened({"a": INT}, "a"), opened({"b": INT}, "b")]}, "oneOf"),
    "patterns that overlap": ({"type": "object", "patternProperties": {"^x": INT, "^xy": BOOL}}, "disjoint"),
    "unknown format": (form("color"), "color"),
    "unknown type": ({"type": "date"}, "date"),
    "lookahead": (matching("^(?=a).b$"), "look"),
    "no value": (integer(3, 2), "minimum"),
    "no string": (text(2, 3), "minLength"),
    "a number of optional properties": (opened({"a": INT}, maxProperties=2), "maxProperties"),
    "unsatisfiable property": (obj({}) | {"required": ["a"]}, "required"),
}
"""Schemas that cannot be enforced or met, and what the error names."""
