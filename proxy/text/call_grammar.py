"""From the calls that an answer may have to a grammar that compiles, run where grammars are compiled on trial.

Most requests are compiled once. Only where that fails is each function compiled alone: to name the one that is wrong,
or to let it take any object.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection

from baton.node.errors import BadRequest
from baton.proxy.formats.argument_rules import ANY_OBJECT
from baton.proxy.formats.grammar import CallableFunction, CallRules, lark_of_calls
from baton.proxy.text.call_request import CallRequest
from baton.proxy.text.grammar import json_rule, lark_of
from baton.proxy.text.grammar_request import GrammarRequest

SPACE_IN_ARGUMENTS = r"[\x20\x0A\x0D\x09]{1,2}"
"""Models write arguments in one line."""
Complaint = Callable[[str], str]
"""What is wrong with a grammar; empty if it compiles."""


def lark_of_request(asked: CallRequest, special: Collection[str], complaint: Complaint) -> str:
    """The grammar's text; raises BadRequest. `special`: those of the markers that no text can hold."""
    content = "" if asked.content is None else _content_rule(asked.content)
    try:
        return _compiled(asked.rules, special, content, complaint)
    except BadRequest:
        functions = [_readable(asked, index, special, complaint) for index in range(len(asked.rules.functions))]
    if asked.content is not None and (reason := complaint(lark_of(asked.content))):
        raise BadRequest(f"{asked.content.param} is not supported: {reason}", param=asked.content.param)
    try:
        return _compiled(dataclasses.replace(asked.rules, functions=functions), special, content, complaint)
    except BadRequest as error:
        raise BadRequest(f"tools cannot be called as asked: {error}", param="tools") from None


def _readable(asked: CallRequest, index: int, special: Collection[str], complaint: Complaint) -> CallableFunction:
    """A function whose schema can be enforced as it has to be."""
    function = asked.rules.functions[index]
    try:
        _compiled(dataclasses.replace(asked.rules, functions=[function], forced=True), special, "", complaint)
    except BadRequest as error:
        if asked.bound[index]:
            param = asked.params[index]
            raise BadRequest(f"{param} of {function.name} is not supported: {error}", param=param) from None
        return CallableFunction(function.name, ANY_OBJECT)
    return function


def _compiled(rules: CallRules, special: Collection[str], content: str, complaint: Complaint) -> str:
    lark = lark_of_calls(rules, _arguments_rule, special, content)
    reason = complaint(lark)
    if reason:
        raise BadRequest(reason)
    return lark


def _arguments_rule(schema: object, lenient: bool) -> str:
    return json_rule(schema, GrammarRequest("json", "", "", lenient=lenient, space=SPACE_IN_ARGUMENTS))


def _content_rule(asked: GrammarRequest) -> str:
    """The form of an answer as a part of another grammar."""
    if asked.kind == "json":
        return json_rule(json.loads(asked.text), asked)
    lark = lark_of(asked)
    return f"%lark {{\n{json.loads(lark)['grammars'][0]['lark_grammar'] if asked.kind == 'regex' else lark}\n}}"
