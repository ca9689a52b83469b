"""Which grammar the answer of a chat has: of the calls that it may or must have, of its content, or of both.

    tool_choice          required and of one function: calls and nothing else, whatever form content would have
    strict, allowed      free text, in which calls are forced from their marker on
    response_format      content of the form, or calls in its place

Knows no grammar; what a function's `strict` means for its schema is decided here.
"""

from __future__ import annotations

from baton.node.errors import BadRequest
from baton.proxy.formats.envelopes import ENVELOPES
from baton.proxy.formats.grammar import CallableFunction, CallRules
from baton.proxy.formats.markup import Markup
from baton.proxy.http.tools import ToolRequest
from baton.proxy.text.call_request import CallRequest
from baton.proxy.text.grammar_request import GrammarRequest


def answer_grammar(tools: ToolRequest, content: GrammarRequest | None, markup: Markup) -> GrammarRequest | None:
    """The form of an answer whose content would have the form `content`; None: any."""
    if not tools.schemas:
        return content
    chosen = tools.forced or tools.narrowed or content is not None
    if not (chosen or any(tools.strict.values())):
        return None
    if markup.format.name not in ENVELOPES:
        if chosen:
            raise _not_forced(tools, markup.format.name)
        return None  # `strict` alone, which clients set unasked
    if markup.format.has_channels and not tools.forced and content is None:
        return None  # a part begins alike whatever it is, so that a grammar would make a call of each
    functions = [
        CallableFunction(name, schema, strict=bool(tools.strict[name])) for name, schema in tools.schemas.items()
    ]
    rules = CallRules(
        format=markup.format.name,
        tokens={marker: token_id for token_id, marker in markup.marker_of.items()},
        functions=functions,
        forced=tools.forced,
        one_call=markup.format.one_call or tools.max_calls == 1,
    )
    request = CallRequest(
        rules,
        params=[tools.params[each.name] for each in functions],
        bound=[_is_bound(tools, each.name) for each in functions],
        content=None if tools.forced else content,
    )
    return request.to_grammar_request()


def _not_forced(tools: ToolRequest, format: str) -> BadRequest:
    """What asks for a grammar of calls that there is none of."""
    if tools.forced or tools.narrowed:
        what, param = "tool_choice must be auto or none", "tool_choice"
    else:
        what, param = "an answer of a given form cannot have tools", "tools"
    return BadRequest(f"{what}: calls in this model's format, {format}, are read and cannot be forced", param=param)


def _is_bound(tools: ToolRequest, name: str) -> bool:
    """Whether a schema that cannot be read is an error: of a strict function, and of the one that must be called."""
    strict = tools.strict[name]
    return bool(strict) or (tools.named and strict is None)
