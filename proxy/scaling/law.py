"""How many workers of one role the objectives ask for. Pure: saturations, arrivals and worker counts in, a number out.

    s = mean over MEAN_S of min(P90 latency / objective, CLAMP)
    up,   s > UP_ABOVE:    n + ceil(n * (s * ready / n / UP_ABOVE - 1))
    down, s < DOWN_BELOW:  n - floor(n * (1 - s / DOWN_BELOW))
    at least               ceil(busy / BUSY_UP), at once; to remove one, ceil(busy / BUSY_DOWN) must be less than n

n are the workers that are there or on their way. Those on their way count against the need (ready / n), so that one
step of the load is not answered twice; not on the way down, where they would feign room. `busy` are the workers that
the arrivals fill (`demand`): latencies grow only when these are full, and starting one takes time. The rest must hold
for UP_WINDOW_S before workers are added, for DOWN_WINDOW_S before one is removed; the changes of a while are bounded.
After llm-d's SLO law for KEDA and the HPA, https://llm-d.ai/docs/dev/architecture/advanced/autoscaling/slo-aware-keda.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ScalingRules:
    """The constants of the law. Times are in seconds."""

    up_above: float = 0.55
    down_below: float = 0.40
    clamp: float = 2.0
    """A latency of 90 objectives asks for no more workers than one of 2, and is in the mean for as long."""
    mean_s: float = 15.0
    """Each P90 is of the last minute already."""
    busy_up: float = 0.9
    busy_down: float = 0.8
    """Apart, so that a rate between them changes nothing."""
    up_window_s: float = 10.0
    """Half of what a worker takes to start: waiting longer costs more than an idle worker."""
    down_window_s: float = 120.0
    burst: int = 4
    """Within `burst_s` at most this many workers are added, or as many as there are."""
    burst_s: float = 60.0
    down_every_s: float = 60.0
    """One worker is removed in this time at most: too early is mended by the arrivals, in the time of a start."""
    start_s: float = 180.0
    """Workers that were asked for and have not come by then do not count as on their way any more."""


class RoleScaler:
    """The law for one role. `observe` is called about once a second, with a time that does not go back."""

    def __init__(self, rules: ScalingRules | None = None) -> None:
        self.saturation = 0.0
        self.desired = 0
        """0 until the first worker is there."""
        self._rules = rules or ScalingRules()
        self._saturations: deque[tuple[float, float]] = deque()
        self._asked: deque[tuple[float, int]] = deque()
        """What the formula said, over the longest window."""
        self._levels: deque[tuple[float, int]] = deque()
        """What was desired, over the time of a burst."""
        self._began_at = float("inf")
        self._short_since = float("inf")
        """When fewer workers were there than desired, or more came to be desired."""
        self._lowered_at = float("-inf")

    def observe(self, saturation: float, ready: int, now: float, busy: float = 0.0) -> None:
        """`saturation`: P90 latency by its objective, 0 without traffic. `ready`: workers that take requests; `busy`:
        those that the arrivals fill, 0 where that is not known yet."""
        rules = self._rules
        self._saturations.append((now, min(saturation, rules.clamp)))
        _forget(self._saturations, now - rules.mean_s)
        self.saturation = math.fsum(each for _, each in self._saturations) / len(self._saturations)
        if not self.desired:
            if not ready:
                return
            self._began_at, self.desired = now, ready
        num_workers = self._expected(ready, now)
        kept = min(num_workers, math.ceil(busy / rules.busy_down))
        self._asked.append((now, max(kept, self._formula(num_workers, ready))))
        _forget(self._asked, now - max(rules.up_window_s, rules.down_window_s))
        self._set(self._bounded(math.ceil(busy / rules.busy_up), now), now)

    def _expected(self, ready: int, now: float) -> int:
        """Workers that are there or on their way. Those that do not come are desired no more."""
        if ready >= self.desired:
            self._short_since = float("inf")
            return ready
        self._short_since = min(self._short_since, now)
        if now - self._short_since >= self._rules.start_s:
            self._set(max(1, ready), now)
        return self.desired

    def _formula(self, num_workers: int, ready: int) -> int:
        rules, s = self._rules, self.saturation
        if s > rules.up_above:
            credit = min(1.0, ready / num_workers) if ready else 1.0
            return num_workers + max(0, math.ceil(num_workers * (s * credit / rules.up_above - 1)))
        if s < rules.down_below:
            return max(1, num_workers - math.floor(num_workers * (1 - s / rules.down_below)))
        return num_workers

    def _bounded(self, at_least: int, now: float) -> int:
        """What all that was asked within the window of its direction agrees on, at the rate that is allowed."""
        rules, current = self._rules, self.desired
        up_to = min(asked for at, asked in self._asked if at >= now - rules.up_window_s)
        if now - self._began_at < rules.up_window_s:
            up_to = current
        up_to = max(up_to, at_least)
        if up_to > current:
            lowest = min((level for _, level in self._levels), default=current)
            return max(current, min(up_to, lowest + max(lowest, rules.burst)))
        settled = now - max(self._began_at, self._lowered_at + rules.down_every_s - rules.down_window_s)
        if max(asked for _, asked in self._asked) < current and settled >= rules.down_window_s:
            return current - 1
        return current

    def _set(self, desired: int, now: float) -> None:
        if desired > self.desired:
            self._short_since = now
        elif desired < self.desired:
            self._lowered_at = now
        self.desired = desired
        self._levels.append((now, desired))
        _forget(self._levels, now - self._rules.burst_s)


def _forget(entries: deque[tuple[float, int]] | deque[tuple[float, float]], before: float) -> None:
    while entries[0][0] < before:
        entries.popleft()
