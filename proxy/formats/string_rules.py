"""The strings of a JSON schema as raw text between tags, as Lark.

The text must not have what the machine reads as its end. Knows no other types.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from baton.node.errors import BadRequest
from baton.proxy.formats.lark import regex_of
from baton.proxy.formats.schemas import resolved

TEXT_END = "\n</parameter>\n"
"""What follows a value."""
_ENDS_ANYWHERE = ("</parameter>",)
_ENDS_A_LINE = ("<parameter=", "</function>", "</tool_call>")
"""At the beginning of a line."""
_ANY = r"(.|\n)*"
_NOTES = frozenset(("title", "description", "default", "examples", "$comment", "deprecated", "type"))
_CLASSES = {r"\d": "0-9", r"\w": "A-Za-z0-9_", r"\s": r"\t\n\r\x20"}
_NEGATED = {r"\D": r"\d", r"\W": r"\w", r"\S": r"\s"}
_DATE = (
    r"[0-9]{4}-((0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])|(0[13-9]|1[0-2])-(29|30)|(0[13578]|1[02])-31)"  # no leap years
)
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9])"
_LABEL = "[A-Za-z0-9]([A-Za-z0-9-]{0,30}[A-Za-z0-9])?"
_HOST = rf"{_LABEL}(\.{_LABEL}){{0,4}}"
_BYTE = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_FORMATS: Mapping[str, str] = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "duration": "P([0-9]{1,4}W|([0-9]{1,4}D)(T[0-9]{1,4}H)?|T([0-9]{1,4}H([0-9]{1,4}M)?|[0-9]{1,4}M|[0-9]{1,4}S))",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
    "ipv4": rf"({_BYTE}\.){{3}}{_BYTE}",
    "ipv6": "([0-9a-f]{1,4}:){7}[0-9a-f]{1,4}|([0-9a-f]{1,4}:){1,6}:[0-9a-f]{1,4}|::[0-9a-f]{0,4}",
    "hostname": _HOST,
    "email": rf"[A-Za-z0-9_+-]{{1,32}}(\.[A-Za-z0-9_+-]{{1,32}}){{0,4}}@{_HOST}",
    "uri": rf"[a-z][a-z0-9+.-]{{0,15}}:\/\/{_HOST}(:[0-9]{{1,4}})?(\/[A-Za-z0-9._~-]{{0,64}}){{0,16}}"
    r"(\?[A-Za-z0-9._~=&-]{0,99})?",
}
"""The usual forms of each, as regular expressions of Lark."""


def is_any_text(schema: Any, root: Mapping[str, Any]) -> bool:
    """Whether a schema of strings and null allows every string."""
    schema = resolved(schema, root)
    if not isinstance(schema, Mapping):
        return False
    parts = schema.get("anyOf")
    if isinstance(parts, list) and set(schema) - {"anyOf"} <= _NOTES:
        return any(is_any_text(part, root) for part in parts if isinstance(part, Mapping) and "anyOf" not in part)
    return set(schema) <= _NOTES and "string" in schema.get("type", ())


def text_choices(schema: Any) -> Sequence[str] | None:
    """The strings that a schema lists, less those that cannot be written; None if it lists none."""
    if not isinstance(schema, Mapping) or not {"const", "enum"} & set(schema):
        return None
    listed = [schema["const"]] if "const" in schema else schema["enum"]
    choices = [each for each in listed if isinstance(each, str) and _can_write(each)]
    if not choices:
        raise BadRequest("none of the strings of an enum can be written in this model's format of calls")
    return choices


def text_terminal(schema: Any, *, strict: bool) -> str:
    """The body of a terminal: the strings of a schema that lists none, up to their end."""
    schema = schema if isinstance(schema, Mapping) else {}
    parts = [f"/(.|\\n){_length(schema)}/", _not_the_end()]
    if isinstance(schema.get("pattern"), str):
        parts.append(f"/{_whole(schema['pattern'])}/")
    known = _FORMATS.get(str(schema.get("format")))
    if known:
        parts.append(f"/{known}/")
    ignored = sorted(set(schema) - _NOTES - {"minLength", "maxLength", "pattern", *(("format",) if known else ())})
    if ignored and strict:
        raise BadRequest(f"{ignored[0]} of strings is not supported in this model's format of calls")
    return " & ".join(parts)


def _length(schema: Mapping[str, Any]) -> str:
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    return f"{{{least},{most}}}" if least or most != "" else "*"


def _can_write(text: str) -> bool:
    lines = f"\n{text}\n"
    return not any(end in text for end in _ENDS_ANYWHERE) and not any(f"\n{end}" in lines for end in _ENDS_A_LINE)


def _not_the_end() -> str:
    anywhere, line = ("|".join(map(regex_of, ends)) for ends in (_ENDS_ANYWHERE, _ENDS_A_LINE))
    return rf"~/((.|\n)*({anywhere}|\n({line}))|({line}))(.|\n)*/"


def _whole(pattern: str) -> str:
    """A pattern, which JSON schema searches in a string, as one of the whole string."""
    return "|".join(_anchored(each) for each in _split(pattern))


def _anchored(pattern: str) -> str:
    before = "" if pattern.startswith("^") else _ANY
    ends = pattern.endswith("$") and not pattern.endswith(r"\$")
    body = pattern.removeprefix("^")
    after = "" if ends else _ANY
    return f"{before}({_escaped(body[:-1] if ends else body)}){after}"


def _escaped(pattern: str) -> str:
    """As a literal of Lark, with the classes of JSON schema's patterns, which are of ASCII."""
    found, in_class = [], False
    for piece in re.finditer(r"\\.|.", pattern, re.DOTALL):  # over a schema
        text = piece[0]
        if text in _CLASSES:
            text = _CLASSES[text] if in_class else f"[{_CLASSES[text]}]"
        elif text in _NEGATED and not in_class:
            text = f"[^{_CLASSES[_NEGATED[text]]}]"
        elif text in "[]":
            in_class = text == "["
        found.append({"/": r"\/", "\n": r"\n"}.get(text, text))
    return "".join(found)


def _split(pattern: str) -> list[str]:
    """The alternatives of a pattern."""
    found, depth, in_class, start = [], 0, False, 0
    for piece in re.finditer(r"\\.|.", pattern, re.DOTALL):
        char = piece[0]
        if in_class:
            in_class = char != "]"
        elif char == "[":
            in_class = True
        elif char in "()":
            depth += 1 if char == "(" else -1
        elif char == "|" and not depth:
            found.append(pattern[start : piece.start()])
            start = piece.end()
    return [*found, pattern[start:]]
