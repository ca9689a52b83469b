"""A ladder of captured decode steps: a step of any number of rows runs as the next larger graph, its rest padding.

Knows no model: `body(num_rows, max_tokens)` gives the launches of a step of so many rows of up to so many tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable

from baton.models.cuda.queue import Work
from baton.models.weights import Progress

Body = Callable[[int, int], Work]
Capture = Callable[[Work], Work]
"""As Queue.capture."""
SMALL_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128)
LARGE_STEP = 64


def sizes_up_to(max_rows: int) -> tuple[int, ...]:
    """The numbers of rows that get a graph; the last is max_rows."""
    large = range(SMALL_SIZES[-1] + LARGE_STEP, max_rows, LARGE_STEP)
    return (*(size for size in (*SMALL_SIZES, *large) if size < max_rows), max_rows)


def lengths_up_to(max_tokens: int, first: int, factor: int) -> tuple[int, ...]:
    """first, first * factor ... below max_tokens, then max_tokens: the lengths that get graphs of their own."""
    lengths = []
    while first < max_tokens:
        lengths.append(first)
        first *= factor
    return (*lengths, max_tokens)


class DecodeGraphs:
    """Captured decode steps by number of rows and length."""

    def __init__(self, capture: Capture, sizes: tuple[int, ...], lengths: tuple[int, ...], body: Body) -> None:
        self._capture = capture
        self._sizes, self._lengths = sizes, lengths
        self._body = body
        self._graphs: dict[tuple[int, int], Work] = {}

    def capture_all(self, on_progress: Progress) -> None:
        """Largest first, so that the memory of its run serves the others; on_progress counts graphs."""
        wanted = [(size, length) for length in reversed(self._lengths) for size in reversed(self._sizes)]
        for number, key in enumerate(wanted, 1):
            self._graphs[key] = self._capture(self._body(*key))
            on_progress(number, len(wanted))

    def size_for(self, num_rows: int) -> int:
        """Rows of the graph that runs so many."""
        return self._sizes[bisect_left(self._sizes, num_rows)]

    def length_for(self, longest: int) -> int:
        """The tokens up to which the graph for such rows goes."""
        return self._lengths[bisect_left(self._lengths, longest)]

    def graph_for(self, num_rows: int, longest: int) -> Work:
        """For rows of up to `longest` tokens, the new ones included."""
        return self._graphs[self.size_for(num_rows), self.length_for(longest)]
