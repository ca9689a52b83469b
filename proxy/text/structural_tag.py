"""Structural tags as Lark: free text with parts of a fixed form behind triggers, or a tree of such parts. Pure.

Both forms that servers accept: the older one, `structures` and `triggers`, and the tree under `format`, of which nodes
for single tokens and for grammars are refused by name. Source: the structural tags of xgrammar, as vLLM's API takes
them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from baton.node.errors import BadRequest

MAX_NODES = 256
MAX_DEPTH = 16
TEXT = r"/(.|\n)*/"


def lark_of_tags(tag: Any, json_rule: Callable[[Any], str], param: str) -> str:
    """The grammar of a structural tag; `json_rule` writes a schema as a part of a rule. Raises BadRequest."""
    writer = _Writer(json_rule, param)
    if not isinstance(tag, Mapping):
        raise writer.error("must be an object")
    if "format" in tag:
        body = writer.node(tag["format"], 0)
    else:
        body = writer.triggered(
            [
                {"begin": each.get("begin"), "content": {"type": "json_schema", "json_schema": each.get("schema")},
                 "end": each.get("end", "")}
                for each in writer.objects(tag.get("structures"), "structures")
            ],
            writer.strings(tag.get("triggers"), "triggers"),
            0,
        )  # fmt: skip
    return "\n".join([f"start: {body}", *writer.rules])


class _Writer:
    """Rules of one grammar, numbered."""

    def __init__(self, json_rule: Callable[[Any], str], param: str) -> None:
        self.rules: list[str] = []
        self._json_rule = json_rule
        self._param = param
        self._num_nodes = 0

    def error(self, what: str) -> BadRequest:
        return BadRequest(f"{self._param}: {what}", param=self._param)

    def objects(self, value: Any, name: str) -> Sequence[Mapping[str, Any]]:
        if not isinstance(value, list) or not value or not all(isinstance(each, Mapping) for each in value):
            raise self.error(f"{name} must be an array of objects")
        return value

    def strings(self, value: Any, name: str) -> Sequence[str]:
        if not isinstance(value, list) or not value or not all(isinstance(each, str) and each for each in value):
            raise self.error(f"{name} must be an array of strings, none of them empty")
        return value

    def node(self, node: Any, depth: int) -> str:
        """The name of a rule for one node of a tree."""
        self._num_nodes += 1
        if depth > MAX_DEPTH or self._num_nodes > MAX_NODES:
            raise self.error(f"more than {MAX_NODES} nodes, or nested more than {MAX_DEPTH} deep")
        if not isinstance(node, Mapping):
            raise self.error("every node must be an object")
        return self._rule(self._body(node, depth))

    def triggered(self, tags: Sequence[Mapping[str, Any]], triggers: Sequence[str], depth: int) -> str:
        """Text in which each trigger begins one of the tags that begin with it."""
        found = []
        for tag in tags:
            begin = self._text(tag, "begin")
            trigger = next((each for each in triggers if begin.startswith(each)), None)
            if trigger is None:
                raise self.error(f"no trigger begins the tag {begin[:64]!r}")
            head = self._rule(f"{TEXT} {json.dumps(trigger, ensure_ascii=False)}", lazy=True)
            found.append(self._rule(" ".join([head, *self._literal(begin[len(trigger) :]), *self._rest(tag, depth)])))
        return f"({' | '.join(found)})* {self._rule(TEXT)}"

    def _body(self, node: Mapping[str, Any], depth: int) -> str:
        match node.get("type"):
            case "const_string":
                return " ".join(self._literal(self._text(node, "value")))
            case "json_schema" if node.get("style", "json") == "json":
                return self._json_rule(node.get("json_schema"))
            case "regex":
                return f"/{self._text(node, 'pattern').replace('/', chr(92) + '/')}/"
            case "any_text":
                return TEXT
            case "sequence":
                return " ".join(self._all(node, "elements", depth))
            case "or":
                return " | ".join(self._all(node, "elements", depth))
            case "tag":
                return " ".join([*self._literal(self._text(node, "begin")), *self._rest(node, depth)])
            case "triggered_tags":
                if node.get("at_least_one") or node.get("stop_after_first"):
                    raise self.error("triggered_tags with at_least_one or stop_after_first are not supported")
                tags = self.objects(node.get("tags"), "tags")
                return self.triggered(tags, self.strings(node.get("triggers"), "triggers"), depth)
            case other:
                raise self.error(f"nodes of type {str(other)[:64]!r} are not supported")

    def _all(self, node: Mapping[str, Any], name: str, depth: int) -> list[str]:
        return [self.node(each, depth + 1) for each in self.objects(node.get(name), name)]

    def _rest(self, tag: Mapping[str, Any], depth: int) -> list[str]:
        """Content and end of a tag."""
        end = tag.get("end", "")
        if not isinstance(end, str):
            raise self.error("a tag's end must be a string")
        return [self.node(tag.get("content"), depth + 1), *self._literal(end)]

    def _text(self, node: Mapping[str, Any], name: str) -> str:
        value = node.get(name)
        if not isinstance(value, str) or not value:
            raise self.error(f"{name} must be a string that is not empty")
        return value

    def _literal(self, text: str) -> list[str]:
        return [json.dumps(text, ensure_ascii=False)] if text else []

    def _rule(self, body: str, *, lazy: bool = False) -> str:
        name = f"r{len(self.rules)}"
        self.rules.append(f"{name}{'[lazy]' if lazy else ''}: {body}")
        return name
