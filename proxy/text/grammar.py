"""What a request asks of the answer's form, as a grammar for llguidance. Pure, and run in a process of its own.

    GrammarRequest  ── lark_of, behind_reasoning ──►  text of node.messages.control.Grammar

A schema becomes JSON whose keywords are all enforced; what the library cannot enforce is refused by its name, unless
the request is lenient. White space between JSON tokens is bounded: models that may write it without end do.
"""

from __future__ import annotations

import json
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import GbnfToLarkError, gbnf_to_lark

from baton.node.errors import BadRequest, InvariantBroken
from baton.proxy.text.grammar_request import GrammarRequest, Reasoning
from baton.proxy.text.structural_tag import lark_of_tags

BOUNDED_SPACE = r"\x20|\x0D?\x0A[\x20\x09]{0,32}"
"""A blank, or a line break and indentation: what programs print, and no blank lines, which small models repeat."""
OPTIONS_KEY = "x-guidance"
"""Options of the library inside a schema; a client's are dropped."""


def lark_of(asked: GrammarRequest) -> str:
    """The grammar's text; raises BadRequest for what cannot be read. Whether it compiles is not known yet."""
    match asked.kind:
        case "json":
            schema = json.loads(asked.text)
            if isinstance(schema, dict):
                schema.pop(OPTIONS_KEY, None)
            return LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_options(asked))  # type: ignore[arg-type]
        case "regex":
            return LLMatcher.grammar_from_regex(asked.text)
        case "choice":
            return "start: " + " | ".join(literal(each) for each in json.loads(asked.text))
        case "grammar":
            return _grammar(asked)
        case "tags":
            return lark_of_tags(json.loads(asked.text), lambda schema: json_rule(schema, asked), asked.param)
        case "calls":
            raise InvariantBroken("call_grammar writes the grammars of calls")


def behind_reasoning(text: str, reasoning: Reasoning) -> str:
    """The grammar `text` behind reasoning whose markers are text, as a list of grammars in the library's JSON."""
    first, *others = json.loads(text)["grammars"] if text.startswith("{") else [{"lark_grammar": text}]
    first = {**first, "name": "answer"}
    rules = [
        "start: reasoning @answer" if reasoning.begun else f"start: ({literal(reasoning.start)} reasoning)? @answer",
        r"reasoning: marked /\n{0,2}/",
        f"marked[suffix={literal(reasoning.end)}]: /(.|\\n)*/",
    ]
    return json.dumps({"grammars": [{"lark_grammar": "\n".join(rules)}, first, *others]}, ensure_ascii=False)


def json_rule(schema: Any, asked: GrammarRequest) -> str:
    """A schema inside a Lark grammar."""
    if isinstance(schema, dict):
        schema = {name: value for name, value in schema.items() if name != OPTIONS_KEY}
        schema[OPTIONS_KEY] = _options(asked)
    return f"%json {json.dumps(schema)}"


def literal(text: str) -> str:
    """A text in a Lark grammar."""
    return json.dumps(text, ensure_ascii=False)


def _options(asked: GrammarRequest) -> dict[str, Any]:
    options: dict[str, Any] = {"lenient": asked.lenient}
    if asked.compact:
        return {**options, "whitespace_flexible": False}
    return {**options, "whitespace_pattern": asked.space or BOUNDED_SPACE}


def _grammar(asked: GrammarRequest) -> str:
    if "::=" in asked.text:
        try:
            return gbnf_to_lark(asked.text)
        except GbnfToLarkError as error:
            raise BadRequest(f"{asked.param} cannot be read as GBNF: {error}", param=asked.param) from None
    if "start:" not in asked.text:
        raise BadRequest(
            f"{asked.param} must be GBNF, with rules `root ::= ...`, or Lark, with a rule `start: ...`",
            param=asked.param,
        )
    return asked.text
