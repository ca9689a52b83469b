"""A progress bar on a terminal: one line, drawn anew at most five times a second, gone when the run is over."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

from baton.benchmark.load.record import FAILED, Record

BETWEEN_DRAWS_S = 0.2
BAR_CHARS = 24


class ProgressBar:
    """A Watch of one run of `total` requests."""

    def __init__(self, out: TextIO, name: str, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._out = out
        self._name = name
        self._total = total
        self._clock = clock
        self._begun_s = self._drawn_s = clock()
        self._sent = self._done = self._failed = 0

    def sent(self) -> None:
        self._sent += 1
        self._draw()

    def ended(self, record: Record) -> None:
        self._done += 1
        self._failed += record.status == FAILED
        self._draw()

    def close(self) -> None:
        self._out.write("\r\x1b[K")
        self._out.flush()

    def line(self) -> str:
        passed_s = max(1e-9, self._clock() - self._begun_s)
        bar = "█" * (BAR_CHARS * self._done // self._total)
        failed = f", {self._failed} failed" if self._failed else ""
        return (
            f"{self._name} |{bar:<{BAR_CHARS}}| {self._done}/{self._total}, "
            f"{self._sent - self._done} under way{failed}, "
            f"{self._done / passed_s:.1f}/s, {passed_s:.0f} s"
        )

    def _draw(self) -> None:
        now_s = self._clock()
        if now_s - self._drawn_s >= BETWEEN_DRAWS_S:
            self._drawn_s = now_s
            self._out.write(f"\r\x1b[K{self.line()}")
            self._out.flush()
