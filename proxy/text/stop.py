"""Stop strings in a stream of text: where the answer ends, and how much of it may go out before that is known.

The text ends where the first stop string is complete (of several that end at one character, the longest counts). This
does not depend on how the text was cut into pieces, so streaming and not streaming give the same answer. A match may
begin in text that is too early to stop at, and may lie in text that is never shown, as that of special tokens. Knows no
tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence


class StopMatcher:
    """Follows one text; holds back what may be the beginning of a stop string.

    One Knuth-Morris-Pratt automaton a string: its state is how many of the string's first characters the text ends
    with, so the largest state is what must be held, and a full one is a match.
    """

    def __init__(self, strings: Sequence[str], *, include: bool = False) -> None:
        """`include` leaves the matched string in the text."""
        self._strings = tuple(strings)
        self._borders = tuple(_borders(string) for string in self._strings)
        self._states = [0] * len(self._strings)
        self._include = include
        self._held = ""
        """What matches so far, of which only the characters at `_shown` may go out."""
        self._shown: list[bool] = []

    def push(self, piece: str, *, shown: bool = True, early: bool = False) -> tuple[str, str]:
        """The text that may go out, and the stop string that ended it, or ""; after a match nothing may be pushed.

        `shown` is False for a piece that is searched but never goes out, except in a match that stays in the text;
        `early` is True where no string that is complete within `piece` counts, though one may begin there.
        """
        if not self._strings:
            return piece if shown else "", ""
        text = self._held + piece
        self._shown += [shown] * len(piece)
        for index, char in enumerate(piece, start=len(self._held)):
            found = self._step(char)
            if found and not early:
                out = self._visible(text, index + 1 - len(found)) + (found if self._include else "")
                self._held, self._shown = "", []
                return out, found
        cut = len(text) - max(self._states)
        out = self._visible(text, cut)
        self._held, self._shown = text[cut:], self._shown[cut:]
        return out, ""

    def flush(self) -> str:
        """What is still held, at the end of the text; what is pushed later is another text."""
        if not self._held:
            return ""
        held = self._visible(self._held, len(self._held))
        self._held, self._shown, self._states = "", [], [0] * len(self._strings)
        return held

    def _visible(self, text: str, end: int) -> str:
        """What may go out of the first `end` characters of `text`."""
        shown = self._shown[:end]
        return text[:end] if all(shown) else "".join(itertools.compress(text, shown))

    def _step(self, char: str) -> str:
        """Advance every automaton by one character; the longest string that is complete now, or ""."""
        found = ""
        for which, (string, borders) in enumerate(zip(self._strings, self._borders, strict=True)):
            state = self._states[which]
            while state and string[state] != char:
                state = borders[state - 1]
            if string[state] == char:
                state += 1
            if state == len(string):
                found = max(found, string, key=len)
                state = borders[-1]  # where the match does not count, the next one may overlap it
            self._states[which] = state
        return found


def _borders(string: str) -> tuple[int, ...]:
    """For each prefix of `string`, the length of its longest proper prefix that is also its suffix (KMP's table)."""
    table = [0] * len(string)
    length = 0
    for index in range(1, len(string)):
        while length and string[index] != string[length]:
            length = table[length - 1]
        if string[index] == string[length]:
            length += 1
        table[index] = length
    return tuple(table)
