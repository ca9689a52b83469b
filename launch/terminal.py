"""The output of `serve`: on a terminal a child's lines of progress are a bar, elsewhere each line is printed as it is.

A line of progress ends in `event things=12 of=291`, as workers log it every few seconds. It knows no other line.
"""

from __future__ import annotations

import os
import re
import sys
from typing import TextIO

from tqdm import tqdm

_CHILD = re.compile(r"\[([^]]+)\] ")
_PROGRESS = re.compile(r" (\w+) (\w+)=(\d+) of=(\d+)$")


class Screen:
    """Prints lines at once: a program that reads the output through a pipe waits for `ready`."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = sys.stdout if out is None else out
        self._draws = self._out.isatty()
        self._bars: dict[str, tuple[str, tqdm]] = {}
        """By child, with the event that the bar counts."""

    def say(self, line: str) -> None:
        if not self._draws:
            print(line, file=self._out, flush=True)
            return
        child = _CHILD.match(line)
        name = child[1] if child else ""
        found = _PROGRESS.search(line) if child else None
        if found is not None:
            self._draw(name, found[1], found[2], int(found[3]), int(found[4]))
            return
        self._close(name)
        tqdm.write(line, file=self._out)
        self._out.flush()

    def close(self) -> None:
        for name in list(self._bars):
            self._close(name)

    def _draw(self, name: str, event: str, things: str, done: int, total: int) -> None:
        shown, bar = self._bars.get(name, ("", None))
        if bar is None or shown != event:
            self._close(name)
            title = f"{name} {event.replace('_', ' ')}"
            bar = tqdm(total=total, desc=title, unit=f" {things}", file=self._out, leave=False, dynamic_ncols=True)
            self._bars[name] = event, bar
        bar.total, bar.n = total, done
        bar.refresh()

    def _close(self, name: str) -> None:
        """The child has gone on to something else."""
        _, bar = self._bars.pop(name, ("", None))
        if bar is not None:
            bar.close()


def has_terminal() -> bool:
    """Whether this process has a controlling terminal; it has none any more when that was closed."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True
