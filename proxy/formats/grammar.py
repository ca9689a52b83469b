"""The grammar of an answer that calls functions, in the format in which its model writes calls.

    CallRules ── lark_of_calls ──► Lark, whose texts the machine reads as calls of these functions

Forced answers are calls and nothing else; others are free text in which a call, once it begins, is one of these, or
content of a given form in place of calls. Pure: schemas become rules by a function of the caller.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from baton.proxy.formats.argument_rules import JsonRule, arguments_rule
from baton.proxy.formats.envelopes import ENVELOPES, Envelope
from baton.proxy.formats.lark import LarkWriter, holds_none_of, joined, literal
from baton.proxy.formats.tables import CONTENT, FORMATS

_ANY = r"/(.|\n)*/"
_INDEX = "/:(0|[1-9][0-9]{0,3})/"


@dataclass(frozen=True, slots=True)
class CallableFunction:
    """A function that an answer may call."""

    name: str
    parameters: Mapping[str, Any]
    """JSON schema of an object."""
    strict: bool = False
    """What cannot be enforced of the schema is refused; else it is ignored."""


@dataclass(frozen=True, slots=True)
class CallRules:
    """What an answer may, or must, call."""

    format: str
    tokens: Mapping[str, int]
    """Ids of the format's markers that are tokens."""
    functions: Sequence[CallableFunction]
    forced: bool
    """The answer is calls; else it may call."""
    one_call: bool
    """At most one, and an end behind it; else any number."""


def lark_of_calls(rules: CallRules, json_rule: JsonRule, special: Collection[str], content: str = "") -> str:
    """The grammar; raises BadRequest for a strict function whose schema cannot be enforced.

    `special`: those of the markers that no text can hold. `content`: Lark of the content that may be in place of calls.
    """
    writer = LarkWriter(rules.tokens)
    envelope = ENVELOPES[rules.format]
    group = _group(writer, rules, envelope, json_rule)
    if rules.forced:
        return writer.grammar(group.spelled(writer))
    if content:
        return writer.grammar(f"{writer.rule(content)} | {group.tagged(envelope).spelled(writer)}")
    return writer.grammar(_free(writer, rules, envelope, group, special))


@dataclass(frozen=True, slots=True)
class _Group:
    """Calls next to one another: a text that begins them, and Lark of the rest."""

    begins: str
    rest: str
    ends: str

    def spelled(self, writer: LarkWriter) -> str:
        return joined((writer.text(self.begins), self.rest, writer.text(self.ends)))

    def tagged(self, envelope: Envelope) -> _Group:
        """With the markers around it, where the format does without."""
        if envelope.tag is None:
            return self
        before, behind = envelope.tag
        return _Group(before + self.begins, self.rest, self.ends + behind)


def _group(writer: LarkWriter, rules: CallRules, envelope: Envelope, json_rule: JsonRule) -> _Group:
    """What all calls begin with is at the front, so that it can end a text."""
    opening, before = (envelope.opens, envelope.before) if envelope.opens else (envelope.before, "")
    calls = []
    for function in rules.functions:
        arguments = arguments_rule(
            writer, envelope.style, function.parameters, strict=function.strict, json_rule=json_rule
        )
        if envelope.has_index:
            head = joined((literal(function.name), writer.terminal(_INDEX), writer.text(envelope.behind)))
        else:
            head = writer.text(f"{function.name}{envelope.behind}")
        calls.append(joined((head, arguments, writer.text(envelope.after))))
    named = writer.rule(" | ".join(calls))
    first = joined((writer.text(before), named))
    if rules.one_call:
        return _Group(opening, first, envelope.closes)
    following = joined((writer.text(envelope.between + envelope.before), named))
    return _Group(opening, f"{first} ({following})*", envelope.closes)


def _free(writer: LarkWriter, rules: CallRules, envelope: Envelope, group: _Group, special: Collection[str]) -> str:
    """Text with groups of calls in it. A format whose calls need no marker has them at the beginning only."""
    format = FORMATS[rules.format]
    markers = format.states[CONTENT].moves
    tagged = group.tagged(envelope)
    marker = next(each for each in markers if tagged.begins.startswith(each))
    rest = _Group(tagged.begins.removeprefix(marker), tagged.rest, tagged.ends)
    written = [each for each in markers if each not in special]
    text = f"{_ANY} & {holds_none_of(written)}" if written else _ANY

    def part(text: str) -> str:
        """`text` that ends with calls."""
        if marker in rules.tokens:
            head = f"{writer.terminal(text)}? <[{rules.tokens[marker]}]>"
        else:
            head = writer.rule(f"{writer.terminal(text)} {literal(marker)}", options="lazy")
        return writer.rule(joined((head, rest.spelled(writer))))

    if envelope.tag is None:
        first, bare = text, []
    else:
        first, bare = f"{text} & {_begins_without(group.begins[0])}", [group.spelled(writer)]
    last = [] if rules.one_call else [f"{part(text)}*", writer.terminal(text)]
    return " | ".join((*bare, f"{writer.terminal(first)}?", joined((part(first), *last))))


def _begins_without(char: str) -> str:
    """A terminal's body: texts whose first character that is not blank is another one than `char`."""
    return rf"/[ \t\r\n]*([^ \t\r\n\{char}](.|\n)*)?/"
