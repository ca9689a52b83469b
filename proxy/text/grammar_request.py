"""What a request asks of the form of its answer, as plain values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["json", "regex", "choice", "grammar", "tags", "calls"]


@dataclass(frozen=True, slots=True)
class GrammarRequest:
    """The form that an answer must have."""

    kind: Kind
    text: str
    """A JSON schema, a regular expression, a JSON array of strings, a grammar in Lark or GBNF, or a structural tag as
    JSON, or the JSON of `call_request`."""
    param: str
    """The parameter that it comes from, for errors."""
    lenient: bool = False
    """Keywords of a schema that cannot be enforced are ignored."""
    compact: bool = False
    """JSON has no white space between its tokens."""
    space: str = ""
    """The white space that may be between JSON tokens, as a regular expression; empty: a bounded one."""
