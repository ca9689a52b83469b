"""What a grammar allows next in one sequence. Knows the library only by the interface of its matcher.

A constraint is a function of a grammar's text and of the tokens generated so far, and holds nothing else: so a
hand-over moves nothing of it, a preempted sequence keeps it, and another attempt builds it anew from the tokens it is
sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple, Protocol

from baton.node.messages.control import Grammar

MAX_BLANKS = 2
"""Line breaks between reasoning and text."""


class Matcher(Protocol):
    """A compiled grammar after some tokens: llguidance.LLMatcher."""

    def consume_token(self, token_id: int) -> bool:
        """Take a token in; False if it is not allowed here, and all behind it."""
        ...

    def compute_ff_tokens(self) -> list[int]:
        """The tokens that come next, as far as each is the only one allowed."""
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


class _Reached(NamedTuple):
    """Where the tokens so far have led."""

    phase: _Phase
    num_reasoned: int = 0
    """Tokens of reasoning, its markers left out."""
    num_blanks: int = 0
    """Behind reasoning."""


class Allowed(NamedTuple):
    """Which tokens may come at one place."""

    masked: bool
    """Those of the matcher's mask."""
    num_text: int
    """Drafts before the place that the matcher has to take for this mask."""
    listed: tuple[int, ...]
    """These besides."""
    is_free: bool
    """Any but those of `barred`: in reasoning, or because what is drawn is dropped."""
    barred: tuple[int, ...]


AS_MASKED = Allowed(masked=True, num_text=0, listed=(), is_free=False, barred=())
"""What the matcher's mask says, and nothing else."""


class Constraint:
    """Which tokens may come next in one sequence, after those that `advance` was given."""

    def __init__(self, grammar: Grammar, matcher: Matcher, lexer: int = 0) -> None:
        """`lexer`: masks of those that share one are made one after the other."""
        self.is_broken = False
        """A token was drawn that the grammar does not allow here."""
        self.lexer = lexer
        self._grammar = grammar
        self._matcher = matcher
        self._forced: list[int] | None = None  # None: not looked up since the last token
        self._reached = _Reached(_Phase.TEXT)
        if grammar.begins_after:
            self._reached = _Reached(_Phase.FIRST if grammar.opened_by else _Phase.REASONING)

    def advance(self, token_ids: Sequence[int]) -> None:
        for token_id in token_ids:
            self._reached, is_text = self._next(self._reached, token_id)
            if is_text:
                self.is_broken |= not self._takes(token_id)
            if self._forced is not None:
                follows = self._forced[:1] == [token_id]
                self._forced = (self._forced[1:] or None) if follows else None

    def _next(self, reached: _Reached, token_id: int) -> tuple[_Reached, bool]:
        """Behind one more token, and whether it is part of the grammar's text."""
        phase, num_reasoned, num_blanks = reached
        if phase is _Phase.REASONING:
            ends = token_id in self._grammar.begins_after
            return _Reached(_Phase.BEHIND if ends else phase, num_reasoned + 1), False
        if phase is _Phase.FIRST and token_id in self._grammar.opened_by:
            return reached._replace(phase=_Phase.REASONING), False
        if phase is _Phase.BEHIND and token_id in self._grammar.blank_ids:
            phase = _Phase.BEHIND if num_blanks + 1 < MAX_BLANKS else _Phase.TEXT
            return _Reached(phase, num_reasoned, num_blanks + 1), False
        return reached._replace(phase=_Phase.TEXT), True

    def _takes(self, token_id: int) -> bool:
        if token_id in self._grammar.end_ids:
            return self._matcher.is_stopped() or self._matcher.is_accepting()
        return not self._matcher.is_stopped() and self._matcher.consume_token(token_id)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end the text."""
        return self._grammar.end_ids

    @property
    def matcher(self) -> Matcher:
        """What makes masks. Of a broken one it makes none."""
        return self._matcher

    @property
    def forced(self) -> Sequence[int]:
        """Tokens that come next, each the only one that is allowed in its place. A long text is looked up once."""
        if self._forced is None:
            looks = self._reached.phase is _Phase.TEXT and not self.is_broken and not self._matcher.is_stopped()
            self._forced = self._matcher.compute_ff_tokens() if looks else []
        return self._forced

    def along(self, drafts: Sequence[int]) -> list[Allowed]:
        """What may come next, and what may come behind each of the drafts. Whether these are allowed themselves is not
        looked at. An end that does not end the sequence leaves all as it is."""
        reached, num_text = self._reached, 0
        found = [self._allowed(reached, num_text)]
        for token_id in drafts:
            reached, is_text = self._next(reached, token_id)
            num_text += is_text and token_id not in self._grammar.end_ids
            found.append(self._allowed(reached, num_text))
        return found

    def _allowed(self, reached: _Reached, num_text: int) -> Allowed:
        phase, num_reasoned, _ = reached
        if self.is_broken:
            return Allowed(masked=False, num_text=num_text, listed=(), is_free=True, barred=())
        if phase is _Phase.REASONING:
            most, ends = self._grammar.max_reasoning, self._grammar.begins_after
            is_free = most is None or num_reasoned < most
            # an answer without its text is none
            return Allowed(masked=False, num_text=0, listed=ends, is_free=is_free, barred=self._grammar.end_ids)
        masked = not self._matcher.is_stopped()
        if masked and not num_text and phase is _Phase.TEXT:
            return AS_MASKED  # most are
        listed = () if masked else self._grammar.end_ids
        if phase is _Phase.FIRST:
            listed = self._grammar.opened_by
        elif phase is _Phase.BEHIND:
            listed = self._grammar.blank_ids
        return Allowed(masked=masked, num_text=num_text, listed=listed, is_free=False, barred=())
