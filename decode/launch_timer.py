"""When the next step is launched behind the one in flight: as late as the device allows. Pure.

    ──┬── step in flight ───────────────┬── the next
      began          launch_at ├─ margin ┤ expected end: the shortest of the last steps of decoding alone

A sequence that arrives before `launch_at` is in the next step; had that been launched at once, it would have waited for
one more. The margin is half as much again as launches took the host lately, and the time to wake up. Steps with parts
of prompts are longer, launched kernel by kernel, and say nothing of the others: behind one of them the next is
launched early, and they themselves are launched at once.
"""

from __future__ import annotations

from collections import deque

from baton.models.batch import DeviceTime

RECENT = 8
SPARE_S = 0.0003
HOST_PART = 1.5


class LaunchTimer:
    """Times are those of the loop's clock. `launch_at` is 0, long past, while nothing is known of a device."""

    def __init__(self) -> None:
        self.launch_at = 0.0
        self._busy: deque[float] = deque(maxlen=RECENT)
        self._host: deque[float] = deque(maxlen=RECENT)

    def launched(self, began_at: float, now: float, behind: bool, prompts: bool) -> None:
        """A launch took the host from `began_at` to `now`; `behind` another step, or else its step begins now;
        `prompts`: parts of prompts are in it."""
        if not prompts:
            self._host.append(now - began_at)
        if not behind:
            self._expect_end_of_step_begun(now)

    def ended(self, took: DeviceTime | None, now: float, prompts: bool) -> None:
        """A step was read, the next runs since then, if there is one; `behind`: it was launched behind another;
        `prompts`: parts of prompts were in it."""
        if took is None:
            return
        if not prompts:
            self._busy.append(took.busy_s)
        self._expect_end_of_step_begun(now)

    def _expect_end_of_step_begun(self, at: float) -> None:
        if self._busy:
            self.launch_at = at + min(self._busy) - HOST_PART * max(self._host, default=0.0) - SPARE_S
