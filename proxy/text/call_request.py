"""What an answer may call, as a GrammarRequest, and read back from one: the text between a proxy and its compilers."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from baton.proxy.formats.grammar import CallableFunction, CallRules
from baton.proxy.text.grammar_request import GrammarRequest


@dataclass(frozen=True, slots=True)
class CallRequest:
    """Calls that an answer may have, or must have."""

    rules: CallRules
    params: Sequence[str]
    """Of each function, the parameter of the request that declares it, for errors."""
    bound: Sequence[bool]
    """Of each function, whether a schema that cannot be read is an error; else any object is allowed."""
    content: GrammarRequest | None = None
    """The form of an answer that calls nothing; None: free text."""

    def to_grammar_request(self) -> GrammarRequest:
        value = {
            **_fields(self),
            "rules": {**_fields(self.rules), "functions": [_fields(each) for each in self.rules.functions]},
            "content": None if self.content is None else _fields(self.content),
        }
        return GrammarRequest("calls", json.dumps(value, ensure_ascii=False), "tools")

    @classmethod
    def from_text(cls, text: str) -> CallRequest:
        """Of the text of such a GrammarRequest."""
        value = json.loads(text)
        functions = [CallableFunction(**each) for each in value["rules"].pop("functions")]
        content = GrammarRequest(**value["content"]) if value["content"] else None
        return cls(CallRules(**value["rules"], functions=functions), value["params"], value["bound"], content)


def _fields(value: Any) -> dict[str, Any]:
    """Of a dataclass; dataclasses.asdict would copy the schemas, which takes ten times as long as writing them."""
    return {each.name: getattr(value, each.name) for each in dataclasses.fields(value)}
