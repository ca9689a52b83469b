"""Structures: recursive ones, references, tuples, many properties, and open objects."""

from __future__ import annotations

from baton.tests.unit.worker.schemas.words import (
    BOOL,
    FREE,
    INT,
    NUMBER,
    Schema,
    array,
    either,
    form,
    integer,
    matching,
    nullable,
    number,
    obj,
    one_of_words,
    opened,
    ref,
    text,
)

STRUCTURES: dict[str, Schema] = {
    "schema of a schema": {
        **obj({"root": ref("schema")}),
        "$defs": {
            "schema": obj(
                {
                    "type": one_of_words("object array string integer"),
                    "items": ref("schema"),
                    "description": text(8),
                },
                "type",
            )
        },
    },
    "syntax tree": {
        **ref("expression"),
        "$defs": {
            "expression": either(
                integer(0, 99),
                obj({"op": one_of_words("+ - * /"), "left": ref("expression"), "right": ref("expression")}),
            )
        },
    },
    "menu": {
        **obj({"items": array(ref("entry"), 3)}),
        "$defs": {"entry": obj({"label": text(6), "items": array(ref("entry"), 2)}, "label")},
    },
    "linked list": {**ref("node"), "$defs": {"node": obj({"value": integer(0, 9), "next": nullable(ref("node"))})}},
    "binary tree": {
        **ref("tree"),
        "$defs": {"tree": nullable(obj({"v": integer(-9, 9), "l": ref("tree"), "r": ref("tree")}))},
    },
    "root as its own item": obj({"name": text(4), "children": array({"$ref": "#"}, 2)}, "name"),
    "mutual references": {
        **ref("a"),
        "$defs": {"a": obj({"b": nullable(ref("b"))}), "b": obj({"a": nullable(ref("a"))})},
    },
    "definitions": {
        **obj({"x": {"$ref": "#/definitions/positive"}}),
        "definitions": {"positive": {"type": "integer", "exclusiveMinimum": 0, "maximum": 99}},
    },
    "reference with siblings": {**obj({"x": {**ref("n"), "minimum": 5}}), "$defs": {"n": integer(0, 9)}},
    "reference to a property": {**obj({"a": text(5), "b": {"$ref": "#/properties/a"}})},
    "html": {
        **ref("element"),
        "$defs": {
            "element": obj(
                {
                    "tag": one_of_words("div p span"),
                    "attributes": {
                        "type": "object",
                        "patternProperties": {"^(class|id)$": text(6)},
                        "additionalProperties": False,
                    },
                    "children": array(either(ref("element"), text(6)), 2),
                },
                "tag",
            )
        },
    },
    "survey": obj(
        {
            "questions": array(
                {
                    "oneOf": [
                        obj({"kind": {"const": "choice"}, "options": array(text(6), 3, 2)}),
                        obj({"kind": {"const": "scale"}, "from": {"const": 1}, "to": integer(2, 10)}),
                        obj({"kind": {"const": "text"}, "longest": nullable(integer(1, 1000))}),
                    ]
                },
                2,
                1,
            )
        }
    ),
    "game": obj(
        {
            "board": array(array({"enum": ["x", "o", None]}, 3, 3), 3, 3),
            "next": one_of_words("x o"),
            "winner": {"enum": ["x", "o", None]},
        }
    ),
    "matrix": array(array(number(-1, 1), 2, 2), 2, 2),
    "palette": obj({"colors": array(matching("^#[0-9a-fA-F]{6}$"), 4, 1), "alpha": number(0, 1)}, "colors"),
    "cron": obj(
        {"minute": matching(r"^(\*|[0-5]?[0-9])$"), "hour": matching(r"^(\*|1?[0-9]|2[0-3])$"), "command": text(16)}
    ),
    "network": obj(
        {"host": form("hostname"), "port": integer(1, 65535), "tls": BOOL, "peers": array(form("ipv4"), 2)}, "host port"
    ),
    "money": obj(
        {
            "amount": {"type": "number", "multipleOf": 0.01, "minimum": 0, "maximum": 9999},
            "currency": matching("^[A-Z]{3}$"),
        }
    ),
    "interval": obj(
        {"start": form("time"), "length": form("duration"), "repeat": nullable(integer(1, 52))}, "start length"
    ),
    "medical": obj(
        {
            "code": matching(r"^[A-Z][0-9]{2}(\.[0-9]{1,2})?$"),
            "severity": integer(1, 10),
            "onset": form("date"),
            "notes": text(24),
        },
        "code severity",
    ),
    "measurement": array(
        obj({"t": INT, "value": nullable(number(-273.15, 5000)), "unit": one_of_words("C F K")}), 3, 1
    ),
    "train": obj(
        {
            "line": text(6),
            "stops": array(
                {
                    "type": "array",
                    "prefixItems": [text(8), form("time"), nullable(form("time"))],
                    "items": False,
                    "minItems": 3,
                },
                2,
                1,
            ),
        }
    ),
    "flags": {
        "type": "object",
        "properties": {f"flag_{letter}": BOOL for letter in "abcdefgh"},
        "additionalProperties": False,
    },
    "wide": obj({f"field_{number_}": integer(0, 9) for number_ in range(24)}),
    "deep": obj({"a": obj({"b": obj({"c": obj({"d": obj({"e": obj({"f": integer(0, 1)})})})})})}),
    "open record": opened({"id": integer(1, 9), "tag": text(4)}, "id tag", maxProperties=3),
    "extra fields": {
        **opened({"id": integer(1, 9)}, "id"),
        "additionalProperties": {"type": ["integer", "null"]},
        "maxProperties": 4,
    },
    "names by pattern": {
        **opened({"id": integer(1, 9)}, "id"),
        "patternProperties": {"^n_[a-z]{1,4}$": NUMBER, "^s_[a-z]{1,4}$": text(4)},
        "additionalProperties": False,
        "maxProperties": 4,
    },
    "required, not described": {
        "type": "object",
        "required": ["x"],
        "additionalProperties": integer(0, 9),
        "maxProperties": 2,
    },
    "free log": obj({"lines": array(FREE, 4)}),
}
