"""The parameters that ask for an answer of a given form, in all their spellings, as one GrammarRequest.

    response_format      OpenAI's; vLLM's structural tags have a type there too
    structured_outputs   vLLM's, of one kind each; guided_json, guided_regex ... are its older names

Sizes are bounded here, before anything is compiled. Knows no grammar and no library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from baton.node.errors import BadRequest
from baton.proxy.text.grammar_request import GrammarRequest, Kind

MAX_SCHEMA_BYTES = 64 << 10
MAX_SCHEMA_DEPTH = 32
MAX_SCHEMA_NODES = 2000
MAX_REGEX_CHARS = 4096
MAX_GRAMMAR_CHARS = 64 << 10
MAX_CHOICES = 1000
MAX_CHOICE_CHARS = 4096
MAX_SPACE_CHARS = 128

Space = Annotated[str, Field(min_length=1, max_length=MAX_SPACE_CHARS)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class JsonSchemaFormat(_Strict):
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any] | bool | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchemaFormat | None = None
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None
    format: dict[str, Any] | None = None


class StructuredOutputs(_Strict):
    json_: Annotated[dict[str, Any] | bool | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None
    whitespace_pattern: Space | None = None


class StructuredFields(BaseModel):
    """The fields of a request body that this module knows."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | bool | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_json_object: bool | None = None
    guided_whitespace_pattern: Space | None = None


FIELD_NAMES = frozenset(
    field.alias or name
    for model in (JsonSchemaFormat, ResponseFormat, StructuredOutputs, StructuredFields)
    for name, field in model.model_fields.items()
)


def grammar_request(body: StructuredFields) -> GrammarRequest | None:
    """The form that the body asks for; None: any. Raises BadRequest, also where it asks for two."""
    found = [each for each in (_response_format(body), *_structured_outputs(body), *_guided(body)) if each is not None]
    if len(found) > 1:
        raise BadRequest(f"{found[1].param} contradicts {found[0].param}: an answer has one form", param=found[1].param)
    return found[0] if found else None


def _response_format(body: StructuredFields) -> GrammarRequest | None:
    asked, param = body.response_format, "response_format"
    if asked is None or asked.type == "text":
        return None
    if asked.type == "json_object":
        return json_grammar({"type": "object"}, param)
    if asked.type == "structural_tag":
        parts = {"structures": asked.structures, "triggers": asked.triggers, "format": asked.format}
        return _tag({name: value for name, value in parts.items() if value is not None}, param)
    param = "response_format.json_schema"
    if asked.json_schema is None:
        raise BadRequest(f"{param} is missing", param=param)
    schema = {} if asked.json_schema.schema_ is None else asked.json_schema.schema_
    return json_grammar(schema, f"{param}.schema", lenient=asked.json_schema.strict is False)


def _structured_outputs(body: StructuredFields) -> list[GrammarRequest]:
    asked = body.structured_outputs
    if asked is None:
        return []
    if asked.disable_additional_properties:
        param = "structured_outputs.disable_additional_properties"
        raise BadRequest(f"{param} is not supported: write additionalProperties into the schema", param=param)
    style = {"compact": bool(asked.disable_any_whitespace), "space": asked.whitespace_pattern or ""}
    return _kinds(
        "structured_outputs.",
        asked.json_, asked.regex, asked.choice, asked.grammar, asked.json_object, asked.structural_tag, style,
    )  # fmt: skip


def _guided(body: StructuredFields) -> list[GrammarRequest]:
    style = {"space": body.guided_whitespace_pattern or ""}
    return _kinds(
        "guided_",
        body.guided_json or None, body.guided_regex, body.guided_choice, body.guided_grammar,
        body.guided_json_object, None, style,
    )  # fmt: skip


def _kinds(
    prefix: str,
    schema: dict[str, Any] | bool | str | None,
    regex: str | None,
    choice: list[str] | None,
    grammar: str | None,
    json_object: bool | None,
    tag: str | None,
    style: Mapping[str, Any],
) -> list[GrammarRequest]:
    """Of each kind that is given; an empty value, as clients send it for no value, asks for nothing."""
    found = []
    if schema not in (None, ""):
        found.append(json_grammar(_parsed(schema, f"{prefix}json"), f"{prefix}json", **style))
    if regex:
        found.append(_bounded("regex", regex, MAX_REGEX_CHARS, f"{prefix}regex"))
    if choice:
        found.append(_choice(choice, f"{prefix}choice"))
    if grammar:
        found.append(_bounded("grammar", grammar, MAX_GRAMMAR_CHARS, f"{prefix}grammar"))
    if json_object:
        found.append(json_grammar({"type": "object"}, f"{prefix}json_object", **style))
    if tag:
        found.append(_tag(_parsed(tag, f"{prefix}structural_tag"), f"{prefix}structural_tag"))
    return found


def _parsed(value: Any, param: str) -> Any:
    if not isinstance(value, str):
        return value
    if len(value) > MAX_SCHEMA_BYTES:
        raise BadRequest(f"{param} has more than {MAX_SCHEMA_BYTES} bytes", param=param)
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadRequest(f"{param} is not valid JSON", param=param) from None


def json_grammar(schema: Any, param: str, **style: Any) -> GrammarRequest:
    """Answers that a JSON schema allows; raises BadRequest."""
    if not isinstance(schema, dict | bool):
        raise BadRequest(f"{param} must be a JSON schema: an object, true or false", param=param)
    if schema is False:
        raise BadRequest(f"{param} is false: nothing fits it", param=param)
    return GrammarRequest("json", _dumped({} if schema is True else schema, param), param, **style)


def _tag(tag: Any, param: str) -> GrammarRequest:
    return GrammarRequest("tags", _dumped(tag, param), param)


def _choice(choices: list[str], param: str) -> GrammarRequest:
    if len(choices) > MAX_CHOICES or not all(0 < len(each) <= MAX_CHOICE_CHARS for each in choices):
        raise BadRequest(
            f"{param} must have at most {MAX_CHOICES} strings of 1 to {MAX_CHOICE_CHARS} characters", param=param
        )
    return GrammarRequest("choice", json.dumps(list(dict.fromkeys(choices))), param)


def _bounded(kind: Kind, text: str, most: int, param: str) -> GrammarRequest:
    if len(text) > most:
        raise BadRequest(f"{param} has more than {most} characters", param=param)
    return GrammarRequest(kind, text, param)


def _dumped(value: Any, param: str) -> str:
    """As JSON, its size, depth and nodes checked without recursion."""
    num_nodes, level = 0, [value]
    for _ in range(MAX_SCHEMA_DEPTH + 1):
        num_nodes += len(level)
        if num_nodes > MAX_SCHEMA_NODES:
            raise BadRequest(f"{param} has more than {MAX_SCHEMA_NODES} values", param=param)
        level = [
            child
            for each in level
            if isinstance(each, dict | list)
            for child in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            break
    else:
        raise BadRequest(f"{param} is nested more than {MAX_SCHEMA_DEPTH} deep", param=param)
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise BadRequest(f"{param} has a number that JSON cannot write: infinite, or none", param=param) from None
    if len(text.encode(errors="surrogatepass")) > MAX_SCHEMA_BYTES:
        raise BadRequest(f"{param} has more than {MAX_SCHEMA_BYTES} bytes", param=param)
    return text
