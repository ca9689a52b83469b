"""Stop strings in a stream of text: where the answer ends, and how much of it may go out before that is known.

The text ends where the first stop string is complete (of several that end at one character, the longest counts). This
does not depend on how the text was cut into pieces, so streaming and not streaming give the same answer. Knows no
tokens.
"""

from __future__ import annotations

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

    def push(self, piece: str) -> tuple[str, str]:
        """The text that may go out, and the stop string that ended it, or ""; after a match nothing may be pushed."""
        if not self._strings:
            return piece, ""
        text = self._held + piece
        for index, char in enumerate(piece, start=len(self._held)):
            found = self._step(char)
            if found:
                end = index + 1
                self._held = ""
                return text[: end if self._include else end - len(found)], found
        cut = len(text) - max(self._states)
        self._held = text[cut:]
        return text[:cut], ""

    def flush(self) -> str:
        """What is still held, at the end of the text."""
        held, self._held = self._held, ""
        return held

    def _step(self, char: str) -> str:
        """Advance every automaton by one character; the longest string that is complete now, or ""."""
        found = ""
        for which, (string, borders) in enumerate(zip(self._strings, self._borders, strict=True)):
            state = self._states[which]
            while state and string[state] != char:
                state = borders[state - 1]
            if string[state] == char:
                state += 1
            self._states[which] = state
            if state == len(string) and state > len(found):
                found = string
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
