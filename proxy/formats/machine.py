"""Reads a model's tokens by its markup, and says what is content, what reasoning and what calls.

Owns where in the markup one answer is. The events of an answer are the same however its text is cut into tokens, and
so streamed or not: each character is decided by the characters before it, and by at most a marker's length behind it.
No part of the text is read twice; what is held back is bounded. Knows no tokenizer and no API.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from baton.proxy.formats.calls import CallWriter
from baton.proxy.formats.events import ContentText, FormatEvent, ReasoningText
from baton.proxy.formats.json_reader import ArgumentsReader, CallReader, Progress
from baton.proxy.formats.markup import Markup, Thinking
from baton.proxy.formats.parameters import ParameterWriter
from baton.proxy.formats.prose import ProseWriter
from baton.proxy.formats.python_reader import PythonReader
from baton.proxy.formats.tables import ANALYSIS, ARGUMENTS, BLANK, CONTENT, FormatState, Reads

MAX_PIECE_CHARS = 512
"""Text is read in pieces of at most this, so that a search for a marker that is not there stays short."""
MAX_NAME_CHARS = 256
MAX_HEADER_CHARS = 512
MAX_REGION_CHARS = 1 << 18
"""A longer text whose function has no name yet is content."""
_RECIPIENT = re.compile(r"(?:^functions\.|\bto=(?:functions\.)?)([A-Za-z0-9_.\-]+)")
_INDEXED = re.compile(r"(?:functions\.)?([A-Za-z0-9_.\-]+)(:[0-9]+)?")
_PROSE = frozenset((Reads.CONTENT, Reads.REASONING))


class FormatMachine:
    """The events of one answer."""

    def __init__(
        self,
        markup: Markup,
        thinking: Thinking,
        tools: Mapping[str, Mapping[str, Any]],
        id_of: Callable[[int], str],
        *,
        max_calls: int | None = None,
    ) -> None:
        """`tools`: the declared functions with the JSON schemas of their parameters; `id_of`: the id of each call.

        Calls after the first `max_calls` are dropped.
        """
        self.num_reasoning_tokens = 0
        """Markers included."""
        self._markup = markup
        self._marker_of = markup.marker_of
        self._events: list[FormatEvent] = []
        self._calls = CallWriter(tools, id_of, max_calls, self._events)
        self._prose = ProseWriter(self._events)
        self._tail = ""
        """Text that may be the beginning of a marker."""
        self._pending = True
        """A call may begin, and has not: what is held is content if it does not."""
        self._held: list[str] = []
        self._held_chars = 0
        self._marked = False
        """The region that is read began with a marker of calls."""
        self._rejected = False
        """The last region was no call: its further markers are text."""
        self._name = ""
        """Of the function or the parameter that is being read."""
        self._reader: CallReader | ArgumentsReader | PythonReader | None = None
        self._parameters: ParameterWriter | None = None
        self._readers: Mapping[Reads, Callable[[str, int, int], int]] = {
            Reads.CONTENT: self._read_content,
            Reads.REASONING: self._read_reasoning,
            Reads.GAP: self._read_gap,
            Reads.HEADER: self._read_header,
            Reads.NAME: self._read_name,
            Reads.KEY: self._read_key,
            Reads.VALUE: self._read_value,
            Reads.CALL: self._read_structure,
            Reads.ARGUMENTS: self._read_structure,
            Reads.PYTHON: self._read_structure,
            Reads.CHANNEL: self._read_channel,
        }
        self._go(markup.first_state(thinking))
        if self._row.reads is Reads.REASONING:
            self._prose.begin_reasoning()

    @property
    def in_content(self) -> bool:
        """What was read last is content, so far."""
        return self._row.reads is Reads.CONTENT

    def is_content(self, token_id: int) -> bool:
        """Whether the next token would be content, unless the text behind it says otherwise."""
        begins = any(self._state is state for state in self._markup.first_states)
        return (begins or self.in_content) and token_id not in self._marker_of

    @property
    def num_calls(self) -> int:
        return self._calls.num_calls

    @property
    def is_full(self) -> bool:
        """A call beyond `max_calls` has begun: what follows is dropped."""
        return self._calls.is_full

    @property
    def broken_calls(self) -> Sequence[str]:
        """Of each call that the model did not write as its format demands, a digest of its beginning: calls that have
        begun, and what stayed content behind a marker of calls."""
        return self._calls.broken

    def push(self, token_id: int, text: str) -> list[FormatEvent]:
        """What a token adds, which completes `text`; the text of a token that is a marker is ignored. A negative id is
        no token, but text that was left over."""
        marker = self._marker_of.get(token_id)
        if marker is None and text and self._is_plain(text):
            return self._plain_events(text)
        reasons = self._row.reads is Reads.REASONING
        if marker is not None:
            self._take_marker(marker)
        elif text:
            self._take_text(text)
        if token_id >= 0 and (reasons or self._row.reads is Reads.REASONING):
            self.num_reasoning_tokens += 1
        return self._taken_events()

    def _is_plain(self, text: str) -> bool:
        """The short way for most tokens: all of `text` goes on as it is, and no state changes."""
        if self._tail or (self._reader is not None and (self._pending or not self._reader.passes(text))):
            return False
        if self._reader is not None:
            return self._reader.opaque or not any(map(text.__contains__, self._state.firsts))
        if self._in_prose:
            if not self._prose.passes(text):
                return False
        elif self._row.reads is not Reads.VALUE:
            return False
        return not any(map(text.__contains__, self._state.firsts))

    def _plain_events(self, text: str) -> list[FormatEvent]:
        if self._reader is not None:
            self._calls.arguments(text)
            return self._taken_events()
        if self._row.reads is Reads.VALUE:
            self._read_value(text, 0, len(text))
            return self._taken_events()
        if self._row.reads is Reads.CONTENT:
            return [ContentText(text)]
        self.num_reasoning_tokens += 1
        return [ReasoningText(text)]

    def finish(self, *, cut: bool = False) -> list[FormatEvent]:
        """What is left at the end of the answer; `cut`: the model would have gone on."""
        self._flush_tail()
        if self._calls.is_open:
            self._calls.end(broken=True, cut=cut)
        elif not self._in_prose and self._pending:
            self._marked = self._marked and not cut
            self._release()
        self._prose.finish(reasoning=self._row.reads is Reads.REASONING, after_calls=self._calls.num_calls > 0)
        return self._taken_events()

    def _taken_events(self) -> list[FormatEvent]:
        taken = self._events[:]
        self._events.clear()
        return taken

    # Markers and text

    @property
    def _opaque(self) -> bool:
        return self._reader is not None and self._reader.opaque

    def _is_text(self, marker: str) -> bool:
        """Whether a marker that is a token is part of the text that is read."""
        row = self._row
        return self._opaque or (row.reads is Reads.VALUE and (marker not in row.moves or self._in_json_value))

    def _take_marker(self, marker: str) -> None:
        """One that is a token of its own."""
        if not self._is_text(marker):
            self._flush_tail()
        row = self._row
        if self._is_text(marker):
            self._take_text(marker)
        elif marker in row.moves:
            self._move(marker)
        elif self._in_prose:
            self._stray(marker)
        else:
            if row.reads is Reads.GAP:
                self._leave_gap()
            else:
                self._fail()
            self._take_marker(marker)

    def _stray(self, marker: str) -> None:
        """A marker that means nothing here: dropped, but part of a text that is no call after all."""
        markers = self._markup.reasoning
        if self._row.reads is Reads.REASONING and not self._markup.format.has_channels:
            if markers is None or marker != markers.start:
                self._prose.reasoning(marker)
        elif self._rejected:
            self._prose.content(marker)

    def _take_text(self, text: str) -> None:
        if len(text) <= MAX_PIECE_CHARS:
            self._tail = self._read(self._tail + text, whole=False)
            return
        for start in range(0, len(text), MAX_PIECE_CHARS):
            self._tail = self._read(self._tail + text[start : start + MAX_PIECE_CHARS], whole=False)

    def _flush_tail(self) -> None:
        """No marker will be completed any more."""
        self._tail = self._read(self._tail, whole=True) if self._tail else ""

    def _read(self, text: str, *, whole: bool) -> str:
        """Read `text`; what is left may be the beginning of a marker, unless `text` is `whole`."""
        place = 0
        while place < len(text):
            firsts = self._state.firsts
            if text[place] in firsts and not self._opaque:
                marker = self._marker_at(text, place)
                if marker:
                    place += len(marker)
                    self._move(marker)
                    continue
                if not whole and self._may_begin_marker(text, place):
                    return text[place:]
            end = self._next_candidate(text, place + 1, firsts) if firsts else len(text)
            if self._pending and not self._in_prose:
                end = min(end, place + MAX_REGION_CHARS - self._held_chars)
                if end <= place:
                    self._fail()
                    continue
            place = self._take(text, place, end)
        return ""

    def _marker_at(self, text: str, place: int) -> str:
        for marker, _ in self._state.text_moves:
            if text.startswith(marker, place) and not (self._in_json_value and marker[0] != "\n"):
                return marker
        return ""

    @property
    def _in_json_value(self) -> bool:
        """Inside of a string of JSON, of which a marker may be a part if it does not begin with a line break."""
        return self._row.reads is Reads.VALUE and self._parameters is not None and self._parameters.in_json_string

    def _may_begin_marker(self, text: str, place: int) -> bool:
        rest = text[place : place + 64]
        return any(marker.startswith(rest) for marker, _ in self._state.text_moves)

    @staticmethod
    def _next_candidate(text: str, start: int, firsts: frozenset[str]) -> int:
        found = (text.find(first, start) for first in firsts)
        return min((place for place in found if place >= 0), default=len(text))

    # From state to state

    def _go(self, name: str) -> None:
        self._state = self._markup.states[name]
        self._row: FormatState = self._state.row
        row = self._row
        self._in_prose = row.reads in _PROSE
        self._take = self._readers[row.reads]
        self._name = ""
        self._reader = None
        if row.opens and not self._pending:
            self._begin_region()
        if row.reads is Reads.CALL:
            self._reader = CallReader(self, strict=row.strict)
        elif row.reads is Reads.ARGUMENTS:
            self._reader = ArgumentsReader(self._calls)
        elif row.reads is Reads.PYTHON:
            self._reader = PythonReader(self._calls)

    def _begin_region(self) -> None:
        self._pending = True
        self._clear_held()

    def _move(self, marker: str) -> None:
        row, to = self._row, self._row.moves[marker]
        if self._in_prose or (self._markup.reasoning is not None and marker == self._markup.reasoning.start):
            self._leave_prose(marker, to)
            return
        if row.reads is Reads.CHANNEL:
            self._take_header(marker, to)
            return
        if row.reads is Reads.NAME and not self._begin_named(marker):
            return
        if row.reads is Reads.KEY:
            assert self._parameters is not None
            self._parameters.begin(self._name)
        elif row.reads is Reads.VALUE:
            assert self._parameters is not None
            self._parameters.end()
        next_row = self._markup.states[to].row
        if self._calls.is_open and not next_row.inside:
            self._end_call(broken=self._reader is not None)
        if next_row.opens and not self._pending:
            self._begin_region()
        self._marked = self._marked or marker in self._markup.states[CONTENT].row.moves
        self._hold(marker)
        if next_row.reads is Reads.CONTENT and self._pending:
            self._fail()
        else:
            self._go(to)

    def _leave_prose(self, marker: str, to: str) -> None:
        """From content or reasoning into a region, or from one to the other."""
        markers = self._markup.reasoning
        if self._row.reads is Reads.REASONING:
            self._prose.end_reasoning()
        self._rejected = self._marked = False
        self._begin_region()
        if markers is not None and marker == markers.start:
            self._prose.begin_reasoning()
        elif markers is None or marker != markers.end:
            self._marked = True
            self._hold(marker)
        self._go(to)

    def _take_header(self, marker: str, to: str) -> None:
        """A marker in a header, or behind it: then the part that it describes begins."""
        header = self._name
        if to != CONTENT:
            self._name += marker
            return
        recipient = _RECIPIENT.search(header)
        if recipient is not None and self.begin(recipient[1]):
            self._go(ARGUMENTS)
            return
        if recipient is not None:
            self._calls.reject(header)
        elif header.rpartition("<|channel|>")[2].split()[:1] == [ANALYSIS]:
            self._prose.begin_reasoning()
            to = ANALYSIS
        self._go(to)

    def _leave_gap(self) -> None:
        """To the state behind a gap; what it skipped is content if a call was expected and has not begun."""
        to = self._row.then
        if to == CONTENT and (self._pending or self._calls.is_open):
            self._fail()
        else:
            self._go(to)

    def _fail(self) -> None:
        """What is read is no call, or a broken one: content follows."""
        if self._calls.is_open:
            self._end_call(broken=True)
        else:
            self._release()
        self._go(CONTENT)

    def _release(self) -> None:
        held = "".join(self._held)
        self._clear_held()
        self._rejected = bool(held.strip())
        if self._marked and self._rejected:
            self._calls.reject(held)
        self._marked = False
        if held:
            self._prose.content(held)

    def _hold(self, text: str) -> None:
        if self._pending and not self._markup.format.has_channels:
            self._held.append(text)
            self._held_chars += len(text)

    def _clear_held(self) -> None:
        self._held.clear()
        self._held_chars = 0

    # Calls

    def begin(self, name: str, written_id: str = "") -> bool:
        """Whether `name` is declared; if so, its call begins."""
        if not self._calls.begin(name, written_id):
            return False
        self._pending = False
        self._clear_held()
        self._prose.begin_call()
        return True

    def arguments(self, text: str) -> None:
        self._calls.arguments(text)

    def _begin_named(self, marker: str) -> bool:
        """At the end of a name: whether it is a call's."""
        name, written_id = self._name.strip(BLANK), ""
        if self._row.has_index:
            found = _INDEXED.fullmatch(name)
            name, written_id = (found[1], name if found[2] else "") if found is not None else ("", "")
        if self.begin(name, written_id):
            bare = self._markup.format.bare_values
            self._parameters = ParameterWriter(self._calls, self._calls.schema, bare=bare)
            return True
        self._hold(marker)
        self._fail()
        return False

    def _end_call(self, *, broken: bool) -> None:
        if self._parameters is not None and not broken:
            self._parameters.close()
        self._parameters = None
        self._calls.end(broken=broken)

    # What text is in each state: read text[start:end], return where reading goes on

    def _read_content(self, text: str, start: int, end: int) -> int:
        if self._row.moves or self._markup.reasoning is not None:
            self._prose.content(text[start:end])
        else:
            self._prose.plain(text[start:end])
        return end

    def _read_reasoning(self, text: str, start: int, end: int) -> int:
        self._prose.reasoning(text[start:end])
        return end

    def _read_gap(self, text: str, start: int, end: int) -> int:
        place = start
        while place < end and text[place] in self._row.skips:
            place += 1
        self._hold(text[start:place])
        if place < end:
            peeked = self._row.peeks.get(text[place])
            if peeked is not None:
                self._go(peeked)
            else:
                self._leave_gap()
        return place

    def _read_header(self, text: str, start: int, end: int) -> int:
        self._hold(text[start:end])
        return end

    def _read_channel(self, text: str, start: int, end: int) -> int:
        end = min(end, start + max(0, MAX_HEADER_CHARS - len(self._name)))
        self._name += text[start:end]
        if end == start:
            self._fail()
        return end

    def _read_name(self, text: str, start: int, end: int) -> int:
        for place in range(start, end):
            char = text[place]
            if char in self._row.peeks:
                self._hold(text[start:place])
                if self._begin_named(""):
                    self._go(self._row.peeks[char])
                return place
            follows_blank = self._name[-1:].isspace() and not self._name.isspace()
            is_part = char.isalnum() or char in "_-." or (char == ":" and self._row.has_index)
            allowed = char in BLANK or (is_part and not follows_blank)
            if not allowed or len(self._name) == MAX_NAME_CHARS:
                self._hold(text[start:place])
                self._fail()
                return place
            self._name += char
        self._hold(text[start:end])
        return end

    def _read_key(self, text: str, start: int, end: int) -> int:
        end = min(end, start + MAX_NAME_CHARS - len(self._name))
        self._name += text[start:end]
        if end == start:
            self._fail()
        return end

    def _read_value(self, text: str, start: int, end: int) -> int:
        assert self._parameters is not None
        self._parameters.text(text[start:end])
        return end

    def _read_structure(self, text: str, start: int, end: int) -> int:
        assert self._reader is not None
        stop, progress = self._reader.take(text, start, end)
        self._hold(text[start:stop])
        if progress is Progress.FAILED:
            self._fail()
        elif progress is Progress.DONE:
            self._parameters = None  # these arguments have braces of their own
            self._end_call(broken=False)
            self._go(self._row.then)
        return stop
