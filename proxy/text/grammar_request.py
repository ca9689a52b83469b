"""What a request asks of the form of its answer, and what may come before it, as plain values."""

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


ANY_TOKENS = GrammarRequest("grammar", "start: <[*]>*", "thinking_token_budget")
"""No form: the answer is free, and ends where the model ends it."""


@dataclass(frozen=True, slots=True)
class Reasoning:
    """Reasoning between two markers, behind which the form begins."""

    start: str
    end: str
    begun: bool
    """By the prompt; else an answer may do without it."""
    start_ids: tuple[int, ...] = ()
    """The markers where they are tokens, which workers recognise; else the grammar has to."""
    end_ids: tuple[int, ...] = ()
    blank_ids: tuple[int, ...] = ()
    """Tokens of line breaks, of which some may follow."""
