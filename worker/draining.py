"""How a worker leaves: it says so, answers Busy to what is on its way, ends what runs, and waits for a bounded time."""

from __future__ import annotations

from baton.node.membership import HEARTBEAT_S

NOTICE_S = 2 * HEARTBEAT_S
"""So long even an idle worker stays: a request sent before the proxy heard of it gets its Busy, not silence."""


class Draining:
    """One worker's leaving; `now` is a monotonic time."""

    def __init__(self, longest_s: float) -> None:
        self._longest_s = longest_s
        self._begun_at: float | None = None

    @property
    def begun(self) -> bool:
        return self._begun_at is not None

    def begin(self, now: float) -> bool:
        """Whether this was the first word of it."""
        first = self._begun_at is None
        if first:
            self._begun_at = now
        return first

    def over(self, idle: bool, now: float) -> bool:
        """Whether to go now: nothing is left and the proxies know, or the time is up."""
        if self._begun_at is None:
            return False
        waited_s = now - self._begun_at
        return waited_s >= self._longest_s or (idle and waited_s >= NOTICE_S)
