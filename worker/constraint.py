"""What a grammar allows next in one sequence. Knows the library only by the interface of its matcher.

A constraint is a function of a grammar's text and of the tokens generated so far, and holds nothing else: so a
hand-over moves nothing of it, a preempted sequence keeps it, and another attempt builds it anew from the tokens it is
sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Protocol

from baton.node.messages.control import Grammar

MAX_BLANKS = 2
"""Line breaks between reasoning and text."""


class Matcher(Protocol):
    """A compiled grammar after some tokens: llguidance.LLMatcher."""

    def consume_token(self, token_id: int) -> bool:
        """Take a token in; False if it is not allowed here, and all behind it."""
        ...

    def is_accepting(self) -> bool:
        """Whether the text may end here."""
        ...

    def is_stopped(self) -> bool:
        """Whether nothing but an end may follow."""
        ...


@dataclass(frozen=True, slots=True)
class GrammarCompiled:
    """A grammar can be used now, or `error` says why it never can."""

    grammar: Grammar
    error: str = ""
    compiled: object = None
    """For whatever compiled it: it may have forgotten the grammar meanwhile."""


class _Phase(Enum):
    """What the next token is."""

    FIRST = auto()
    """The opening of reasoning, or part of the grammar's text."""
    REASONING = auto()
    BEHIND = auto()
    """A line break behind reasoning, or part of the text."""
    TEXT = auto()


class Constraint:
    """Which tokens may come next in one sequence, after those that `advance` was given."""

    def __init__(self, grammar: Grammar, matcher: Matcher, lexer: int = 0) -> None:
        """`lexer`: masks of those that share one are made one after the other."""
        self.is_broken = False
        """A token was drawn that the grammar does not allow here."""
        self.lexer = lexer
        self._grammar = grammar
        self._matcher = matcher
        self._num_reasoned = 0
        """Tokens of reasoning, its markers left out."""
        self._num_blanks = 0
        """Behind reasoning."""
        self._phase = _Phase.TEXT
        if grammar.begins_after:
            self._phase = _Phase.FIRST if grammar.opened_by else _Phase.REASONING

    def advance(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            if self._phase is _Phase.REASONING:
                self._num_reasoned += 1
                if token_id in self._grammar.begins_after:
                    self._phase = _Phase.BEHIND
            elif self._phase is _Phase.FIRST and token_id in self._grammar.opened_by:
                self._phase = _Phase.REASONING
            elif self._phase is _Phase.BEHIND and token_id in self._grammar.blank_ids:
                self._num_blanks += 1
                self._phase = _Phase.BEHIND if self._num_blanks < MAX_BLANKS else _Phase.TEXT
            else:
                self._phase = _Phase.TEXT
                self.is_broken |= not self._takes(token_id)

    def _takes(self, token_id: int) -> bool:
        if token_id in self._grammar.end_ids:
            return self._matcher.is_stopped() or self._matcher.is_accepting()
        return not self._matcher.is_stopped() and self._matcher.consume_token(token_id)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end the text."""
        return self._grammar.end_ids

    @property
    def is_free(self) -> bool:
        """Any token may come next, but for those of `barred`: in reasoning, or because what is drawn is dropped."""
        return (self._phase is _Phase.REASONING and not self._has_reasoned) or self.is_broken

    @property
    def _has_reasoned(self) -> bool:
        """As much as it may."""
        most = self._grammar.max_reasoning
        return most is not None and self._num_reasoned >= most

    @property
    def barred(self) -> tuple[int, ...]:
        """Tokens that may not come next though any other may: an answer without its text is none."""
        return self._grammar.end_ids if self._phase is _Phase.REASONING else ()

    @property
    def matcher(self) -> Matcher | None:
        """What makes the next mask; None where it is known without."""
        unknown = self._phase is not _Phase.REASONING and not self.is_broken and not self._matcher.is_stopped()
        return self._matcher if unknown else None

    @property
    def listed(self) -> tuple[int, ...]:
        """Tokens that may come next besides those of the matcher."""
        if self._phase is _Phase.REASONING:
            return self._grammar.begins_after
        if self._phase is _Phase.FIRST:
            return self._grammar.opened_by
        if self._phase is _Phase.BEHIND:
            return self._grammar.blank_ids
        return self._grammar.end_ids if self._matcher.is_stopped() else ()
