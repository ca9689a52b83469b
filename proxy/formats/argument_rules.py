"""The arguments of one function as Lark, in each style: from the JSON schema of its parameters.

Where a model writes parameters one by one, they come in the order of the schema, and of the object only `properties`
and `required` are enforced: a strict function with other keywords there is refused, by their names. Objects have the
properties that they list and no others, unless a schema says that they may. What is written is what `parameters` and
`python_reader` read. Knows no tools and no requests.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from baton.node.errors import BadRequest
from baton.proxy.formats.envelopes import ArgumentStyle
from baton.proxy.formats.lark import LarkWriter, joined, literal
from baton.proxy.formats.schemas import closed, foreign_references, resolved, types_of, with_definitions
from baton.proxy.formats.string_rules import TEXT_END, is_any_text, text_choices, text_terminal

JsonRule = Callable[[Any, bool], str]
"""A schema as a part of a rule, and whether keywords that cannot be enforced are ignored."""
ANY_OBJECT: Mapping[str, Any] = {"type": "object"}
_ENFORCED = frozenset(("type", "properties", "required", "additionalProperties", "$ref", "$defs", "definitions"))
_NOTES = frozenset(
    ("title", "description", "default", "examples", "$schema", "$id", "$comment", "deprecated", "x-guidance")
)
_ANY_KEY = "/[A-Za-z_][A-Za-z0-9_]{0,63}/"
"""Of an object whose properties are not listed."""


@dataclass(frozen=True, slots=True)
class _Parameter:
    name: str
    schema: Any
    required: bool


def arguments_rule(
    writer: LarkWriter, style: ArgumentStyle, parameters: Mapping[str, Any], *, strict: bool, json_rule: JsonRule
) -> str:
    """The body of a rule; BadRequest names what a strict function asks for that cannot be enforced."""
    if style is ArgumentStyle.JSON:
        schema = parameters if "type" in parameters else {**parameters, **ANY_OBJECT}
        return writer.rule(json_rule(closed(schema), not strict))
    rules = (_Tags if style is ArgumentStyle.TAGS else _Keywords)(writer, parameters, strict, json_rule)
    return rules.body()


class _Parameters:
    """What both styles share: the parameters of one function."""

    def __init__(self, writer: LarkWriter, parameters: Mapping[str, Any], strict: bool, json_rule: JsonRule) -> None:
        self.writer = writer
        self.root: Mapping[str, Any] = resolved(parameters, parameters)
        self.strict = strict
        self._json_rule = json_rule
        unknown = sorted(set(self.root) - _ENFORCED - _NOTES)
        if strict and unknown:
            raise BadRequest(f"{unknown[0]} is not supported at the top of parameters in this model's format of calls")

    @property
    def is_open(self) -> bool:
        """Any keys may come."""
        return "properties" not in self.root and self.root.get("additionalProperties") is not False

    def listed(self, can_write: Callable[[str], bool]) -> Sequence[_Parameter]:
        properties, required = self.root.get("properties"), self.root.get("required")
        listed = properties if isinstance(properties, Mapping) else {}
        needed = [each for each in required if isinstance(each, str)] if isinstance(required, list) else []
        schemas = {name: schema for name, schema in listed.items() if schema is not False or name in needed}
        schemas |= {name: True for name in needed if name not in schemas}
        for name in needed:
            if not can_write(name):
                raise BadRequest(f"the parameter {name[:64]!r} cannot be written in this model's format of calls")
        return [_Parameter(name, schema, name in needed) for name, schema in schemas.items() if can_write(name)]

    def json(self, schema: Any) -> str:
        """A value of `schema` as JSON."""
        for reference in foreign_references(schema):
            if self.strict:
                raise BadRequest(f"the reference {reference[:64]!r} is not supported in this model's format of calls")
            return self.writer.rule(self._json_rule({}, True))
        document = with_definitions(schema, self.root) if "$ref" in json.dumps(schema) else schema
        return self.writer.rule(self._json_rule(closed(document), not self.strict))


class _Tags:
    """`<parameter=k>\\nVALUE\\n</parameter>\\n` one after the other."""

    def __init__(self, writer: LarkWriter, parameters: Mapping[str, Any], strict: bool, json_rule: JsonRule) -> None:
        self._of = _Parameters(writer, parameters, strict, json_rule)
        self._writer = writer

    def body(self) -> str:
        if self._of.is_open:
            begin, end = literal("<parameter="), literal(">\n")
            return f"{self._writer.rule(f'{begin} {_ANY_KEY} {end} {self._text_value({})}')}*"
        parts = [self._parameter(each) for each in self._of.listed(_is_tag)]
        return joined(parts) or '""'

    def _parameter(self, parameter: _Parameter) -> str:
        begin = literal(f"<parameter={parameter.name}>\n")
        rule = self._writer.rule(f"{begin} {self._value(parameter.schema)}")
        return rule if parameter.required else f"{rule}?"

    def _value(self, schema: Any) -> str:
        """With the tag at its end. What may be a string only is raw text, other types are JSON."""
        types = types_of(schema, self._of.root)
        if types == {"string", "null"} and is_any_text(schema, self._of.root):
            return self._text_value({})
        if types == {"string"}:
            return self._text_value(resolved(schema, self._of.root))
        return f"{self._of.json(schema)} {literal(TEXT_END)}"

    def _text_value(self, schema: Any) -> str:
        choices = text_choices(schema)
        if choices is not None:
            return self._writer.rule(" | ".join(literal(choice + TEXT_END) for choice in choices))
        terminal = self._writer.terminal(text_terminal(schema, strict=self._of.strict))
        return self._writer.rule(terminal, options=f"suffix={literal(TEXT_END)}")


class _Keywords:
    """`a=1, b="x"`; booleans and null as Python writes them, strings of any text in either kind of quotes, and all else
    as JSON, which Python reads alike."""

    def __init__(self, writer: LarkWriter, parameters: Mapping[str, Any], strict: bool, json_rule: JsonRule) -> None:
        self._of = _Parameters(writer, parameters, strict, json_rule)
        self._writer = writer

    def body(self) -> str:
        if self._of.is_open:
            pair = self._writer.rule(f'{_ANY_KEY} "=" {self._of.json({})}')
            return f'({pair} (", " {pair})*)?'
        return self._from(self._of.listed(str.isidentifier))

    def _from(self, parameters: Sequence[_Parameter]) -> str:
        """Built from the last one: what may follow a parameter, and what may follow if none has been written yet."""
        after = first = self._writer.rule('""')
        for each in reversed(parameters):
            pair = self._writer.rule(f"{literal(f'{each.name}=')} {self._value(each.schema)}")
            skip_after, skip_first = ("", "") if each.required else (f" | {after}", f" | {first}")
            after, first = (
                self._writer.rule(f'", " {pair} {after}{skip_after}'),
                self._writer.rule(f"{pair} {after}{skip_first}"),
            )
        return first

    def _value(self, schema: Any) -> str:
        """As JSON, or as Python writes the same."""
        types = types_of(schema, self._of.root)
        found = resolved(schema, self._of.root)
        keywords = found.keys() if isinstance(found, Mapping) else ()
        ways = [self._of.json(schema)]
        if types == {"boolean"} and _CHOICES.isdisjoint(keywords):
            ways = ['"True"', '"False"']
        if "null" in types and _CHOICES.isdisjoint({*keywords} - {"anyOf", "oneOf"}):
            ways.append('"None"')
        if types and types <= {"string", "null"} and is_any_text(schema, self._of.root):
            ways.append(_SINGLE_QUOTED)
        return f"({' | '.join(ways)})"


_SINGLE_QUOTED = r"""/'([^'\\\n]|\\['"\\nrt])*'/"""
_CHOICES = frozenset(("enum", "const", "anyOf", "oneOf", "allOf", "not"))


def _is_tag(name: str) -> bool:
    """Whether `name` can stand in a tag: up to its `>`."""
    return 0 < len(name) <= 256 and ">" not in name and "\n" not in name and name == name.strip()
