"""The search for the highest rate that still meets the objectives: DistServe's goodput. Pure: rates out, results in.

The rate doubles until it is too high (or halves until it is not), then the bracket is cut at its geometric middle until
its ends are within a tenth of each other. A rate is tried once: for steadier results the caller runs several seeds a
rate. Source: DistServe (OSDI '24), section 4.
"""

from __future__ import annotations

import math

PRECISION = 1.1
MAX_DOUBLINGS, MAX_HALVINGS = 16, 6


class RateSearch:
    """Call `next_rate`, run it, report to `observe`, until `next_rate` is None; then `found` is the result."""

    def __init__(self, start_rate: float) -> None:
        self.found: float | None = None
        """The highest rate so far that met the objectives; None if none did."""
        self._too_high: float | None = None
        self._next = start_rate
        self._doublings = self._halvings = 0

    def next_rate(self) -> float | None:
        if self.found and self._too_high and self._too_high / self.found <= PRECISION:
            return None
        return None if self._doublings > MAX_DOUBLINGS or self._halvings > MAX_HALVINGS else self._next

    def observe(self, rate: float, kept: bool) -> None:
        """The result of `rate`, the one given last."""
        if kept:
            self.found = max(rate, self.found or 0.0)
        else:
            self._too_high = min(rate, self._too_high or math.inf)
        if self.found is None:
            self._next, self._halvings = rate / 2, self._halvings + 1
        elif self._too_high is None:
            self._next, self._doublings = rate * 2, self._doublings + 1
        else:
            self._next = math.sqrt(self.found * self._too_high)
