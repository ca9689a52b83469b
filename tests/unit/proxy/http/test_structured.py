"""proxy.http.structured: every spelling of a form becomes one request, sizes are bounded, errors name the parameter."""

from __future__ import annotations

import json
from typing import Any

import pytest

from baton.node.errors import BadRequest
from baton.proxy.http.schema import read_chat, read_completion
from baton.proxy.text.grammar_request import GrammarRequest

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
SCHEMA_TEXT = json.dumps(SCHEMA)


def asked(**fields: Any) -> GrammarRequest | None:
    return read_completion(json.dumps({"model": "m", "prompt": "x", **fields}).encode()).grammar


def chat(**fields: Any) -> GrammarRequest | None:
    messages = [{"role": "user", "content": "x"}]
    return read_chat(json.dumps({"model": "m", "messages": messages, **fields}).encode()).grammar


def format_of(schema: Any, **fields: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, **fields}}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"structured_outputs": {}}, None),
        ({"guided_json": {}, "guided_choice": [], "guided_regex": ""}, None),
        ({"response_format": {"type": "json_object"}}, ("json", '{"type": "object"}', "response_format", False)),
        (
            {"response_format": format_of(SCHEMA, strict=True)},
            ("json", SCHEMA_TEXT, "response_format.json_schema.schema", False),
        ),
        (
            {"response_format": format_of(SCHEMA, strict=False)},
            ("json", SCHEMA_TEXT, "response_format.json_schema.schema", True),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, ("json", SCHEMA_TEXT, "structured_outputs.json", False)),
        ({"structured_outputs": {"json": SCHEMA_TEXT}}, ("json", SCHEMA_TEXT, "structured_outputs.json", False)),
        ({"guided_json": SCHEMA}, ("json", SCHEMA_TEXT, "guided_json", False)),
        ({"structured_outputs": {"json": {}}}, ("json", "{}", "structured_outputs.json", False)),
        ({"guided_json": True}, ("json", "{}", "guided_json", False)),
        ({"structured_outputs": {"regex": "a+"}}, ("regex", "a+", "structured_outputs.regex", False)),
        ({"guided_choice": ["a", "b", "a"]}, ("choice", '["a", "b"]', "guided_choice", False)),
        ({"guided_grammar": "start: /a/"}, ("grammar", "start: /a/", "guided_grammar", False)),
    ],
)
def test_each_spelling_becomes_the_same_request(fields: dict[str, Any], expected: tuple[Any, ...] | None) -> None:
    """Guards against a spelling that is accepted and then ignored: an answer of any form with status 200."""
    for read in (asked, chat):
        found = read(**fields)
        assert (found and (found.kind, found.text, found.param, found.lenient)) == expected


def nested(depth: int) -> Any:
    return {"items": nested(depth - 1)} if depth else {}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
            "response_format.json_schema.name",
        ),
        ({"response_format": format_of([1])}, "response_format.json_schema.schema"),
        ({"response_format": format_of(nested(40))}, "response_format.json_schema.schema"),
        ({"response_format": format_of({"enum": list(range(3000))})}, "response_format.json_schema.schema"),
        ({"response_format": format_of({"const": "x" * 70_000})}, "response_format.json_schema.schema"),
        ({"response_format": format_of(False)}, "response_format.json_schema.schema"),
        ({"response_format": format_of({"minimum": float("inf")})}, "response_format.json_schema.schema"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"json": {}, "choice": ["b"]}}, "structured_outputs.choice"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "guided_regex"),
        ({"structured_outputs": {"jsn": "{}"}}, "structured_outputs.jsn"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
        ({"structured_outputs": {"json": "[" * 60_000}}, "structured_outputs.json"),
        ({"structured_outputs": {"choice": [""]}}, "structured_outputs.choice"),
        ({"structured_outputs": {"regex": "a" * 5000}}, "structured_outputs.regex"),
        ({"guided_decoding_backend": "outlines"}, "guided_decoding_backend"),
        ({"json_schema": SCHEMA_TEXT}, "json_schema"),
        ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
        ({"guided_regex": "a", "allowed_token_ids": [3]}, "allowed_token_ids"),
    ],
)
def test_errors_name_the_parameter(fields: dict[str, Any], param: str) -> None:
    """Guards the client: which of its fields is wrong; and the compiler, before which sizes are bounded."""
    with pytest.raises(BadRequest) as raised:
        asked(**fields)
    assert raised.value.param == param
