"""Content and reasoning of one answer, less the blank lines that belong to the markup around them.

Line breaks at the end of a text are held, as they are dropped where a marker follows; so is a text that is blank so
far. Both bounded: of a longer run the first ones are text. Knows no markers.
"""

from __future__ import annotations

from baton.proxy.formats.events import ContentText, FormatEvent, ReasoningText

MAX_BLANK_CHARS = 64


class ProseWriter:
    """Appends the events of texts to `events`."""

    def __init__(self, events: list[FormatEvent]) -> None:
        self._events = events
        self._gap = ""
        """Held blanks at the end."""
        self._blank = True
        """Nothing but blanks since the start, or the last call."""
        self._trims = False
        """Content follows reasoning: line breaks at its start are dropped."""
        self._at_start = False
        """Reasoning has just begun: one line break belongs to its marker."""

    def passes(self, text: str) -> bool:
        """`text` would go on as it is, and change nothing here."""
        return not (self._blank or self._gap or self._trims or self._at_start or text[-1] == "\n")

    def plain(self, text: str) -> None:
        """Content that no marker can follow."""
        text, self._gap = self._gap + text, ""
        self._events.append(ContentText(text))

    def content(self, text: str) -> None:
        if self._trims:
            text = text.lstrip("\n")
            if not text:
                return
            self._trims = False
        text = self._gap + text
        self._blank = self._blank and text.isspace()
        cut = 0 if self._blank else len(text.rstrip("\n"))
        cut = max(cut, len(text) - MAX_BLANK_CHARS)
        self._gap = text[cut:]
        if cut:
            self._events.append(ContentText(text[:cut]))

    def begin_reasoning(self) -> None:
        self._gap = ""
        self._at_start = True

    def reasoning(self, text: str) -> None:
        if self._at_start:
            self._at_start = False
            self._blank = False
            text = text[1:] if text[0] == "\n" else text
        text = self._gap + text
        cut = max(len(text.rstrip("\n")), len(text) - MAX_BLANK_CHARS)
        self._gap = text[cut:]
        if cut > 0:
            self._events.append(ReasoningText(text[:cut]))

    def end_reasoning(self) -> None:
        self._gap = ""
        self._at_start = False
        self._blank = self._trims = True

    def begin_call(self) -> None:
        """A call has begun: blanks between it and the text before it belong to the markup."""
        self._gap = ""
        self._blank = True
        self._trims = False

    def finish(self, *, reasoning: bool, after_calls: bool) -> None:
        """The answer ends, inside reasoning or not; blanks after the last call belong to the markup."""
        gap, self._gap = self._gap, ""
        if gap and reasoning:
            self._events.append(ReasoningText(gap))
        elif gap and not (self._blank and after_calls):
            self._events.append(ContentText(gap))
