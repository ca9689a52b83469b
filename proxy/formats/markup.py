"""The markup of one model: a format of calls and the markers of its reasoning, joined to one table.

Owns the states of reasoning, and what a prompt's end says about the first of them. Pure; gets token ids of markers.
Knows no model output.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto

from baton.proxy.formats.tables import CONTENT, CallFormat, FormatState, Reads

REASONING = "reasoning"
UNDECIDED = "undecided"


class Thinking(Enum):
    """Whether an answer begins with reasoning, as far as its prompt says."""

    OPEN = auto()
    """The prompt ends inside it."""
    CLOSED = auto()
    """The prompt has ended it, or the model has none."""
    UNKNOWN = auto()
    """The model may begin it."""


@dataclass(frozen=True, slots=True)
class ReasoningMarkers:
    """The tags around a model's reasoning."""

    start: str
    end: str


THINK = ReasoningMarkers("<think>", "</think>")
THINK_BRACKETS = ReasoningMarkers("[THINK]", "[/THINK]")
REASONINGS: Mapping[str, ReasoningMarkers] = {"think": THINK, "think_brackets": THINK_BRACKETS}


@dataclass(frozen=True, slots=True)
class MarkupState:
    """A state of the table, with the markers that are searched in text."""

    row: FormatState
    text_moves: tuple[tuple[str, str], ...]
    """Marker -> next state, of markers that are no single token."""
    firsts: frozenset[str]
    """The first characters of those."""


@dataclass(frozen=True, slots=True)
class Markup:
    """All that the machine needs to know of a model; one serves all of its requests."""

    format: CallFormat
    reasoning: ReasoningMarkers | None
    states: Mapping[str, MarkupState]
    marker_of: Mapping[int, str]
    """Token id -> the marker that it is."""

    @property
    def first_states(self) -> tuple[MarkupState, ...]:
        """Those in which an answer that is all content begins."""
        names = (UNDECIDED, self.format.start)
        return tuple(self.states[name] for name in names if name in self.states)

    def first_state(self, thinking: Thinking) -> str:
        if self.reasoning is None or thinking is Thinking.CLOSED:
            return self.format.start
        return REASONING if thinking is Thinking.OPEN else UNDECIDED


def make_markup(format: CallFormat, reasoning: ReasoningMarkers | None, tokens: Mapping[str, int]) -> Markup:
    """`tokens`: ids of the vocabulary's added tokens by their text, of which markers are picked."""
    rows = dict(format.states)
    if reasoning is not None:
        _add_reasoning(rows, format, reasoning)
    markers = {marker for row in rows.values() for marker in row.moves}
    if reasoning is not None:
        markers |= {reasoning.start, reasoning.end}
    ids = {marker: tokens[marker] for marker in markers if marker in tokens}
    return Markup(
        format=format,
        reasoning=reasoning,
        states={name: _with_text_moves(row, ids) for name, row in rows.items()},
        marker_of={token_id: marker for marker, token_id in ids.items()},
    )


def _add_reasoning(rows: dict[str, FormatState], format: CallFormat, markers: ReasoningMarkers) -> None:
    opening = {marker: rows[CONTENT].moves[marker] for marker in format.ends_reasoning}
    rows[REASONING] = FormatState(Reads.REASONING, {markers.end: format.start, **opening})
    rows[UNDECIDED] = FormatState(Reads.GAP, {markers.start: REASONING}, then=format.start)


def _with_text_moves(row: FormatState, ids: Collection[str]) -> MarkupState:
    text_moves = tuple((marker, to) for marker, to in row.moves.items() if marker not in ids)
    return MarkupState(row, text_moves, frozenset(marker[0] for marker, _ in text_moves))


def thinking_of(
    prompt_ids: Sequence[int], start: Sequence[int], end: Sequence[int], boundaries: Collection[int]
) -> Thinking:
    """What a prompt says: the last of its markers in the last turn, which begins behind the last of `boundaries`.

    `start` and `end` are the token ids of the markers. Boundaries are the special tokens that templates put around
    turns; a marker that is one of them counts as a marker.
    """
    kinds = ((tuple(end), Thinking.CLOSED), (tuple(start), Thinking.OPEN))
    for place in range(len(prompt_ids), 0, -1):
        for marker, thinking in kinds:
            if (
                marker
                and prompt_ids[place - 1] == marker[-1]
                and tuple(prompt_ids[max(0, place - len(marker)) : place]) == marker
            ):
                return thinking
        if prompt_ids[place - 1] in boundaries:
            break
    return Thinking.UNKNOWN
