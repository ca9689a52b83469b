"""Pairs of workers between which a transfer failed lately: the router keeps new prompts off them for a while.

It knows no clock and sends nothing. Each further failure doubles the time, and a transfer that succeeds ends it; the
first request after that time tries the pair again.
"""

from __future__ import annotations

from dataclasses import dataclass

AVOID_S = 10.0
AVOID_MAX_S = 80.0
MAX_PAIRS = 1024

Pair = tuple[str, str]
"""Endpoint identities of the prefill and the decode worker."""


@dataclass(frozen=True, slots=True)
class _Failure:
    until: float
    avoid_s: float


class FailedPairs:
    """Which pairs to avoid; of too many the one that failed longest ago is forgotten."""

    def __init__(self) -> None:
        self._failures: dict[Pair, _Failure] = {}  # the last one to fail comes last
        self._avoided: frozenset[Pair] = frozenset()
        self._changes_at = float("inf")

    def add(self, pair: Pair, now: float) -> None:
        """A transfer failed. Those that were under way at the first failure count once."""
        known = self._failures.get(pair)
        if known is not None and now < known.until:
            return
        recent = known is not None and now < known.until + known.avoid_s
        avoid_s = min(2 * known.avoid_s, AVOID_MAX_S) if known is not None and recent else AVOID_S
        self._failures.pop(pair, None)
        while len(self._failures) >= MAX_PAIRS:
            del self._failures[next(iter(self._failures))]
        self._failures[pair] = _Failure(now + avoid_s, avoid_s)
        self._renew(now)

    def discard(self, pair: Pair, now: float) -> None:
        """A transfer succeeded."""
        if self._failures.pop(pair, None) is not None:
            self._renew(now)

    def avoided(self, now: float) -> frozenset[Pair]:
        """The pairs to avoid at this moment."""
        if now >= self._changes_at:
            self._renew(now)
        return self._avoided

    def _renew(self, now: float) -> None:
        avoided = {pair: failure.until for pair, failure in self._failures.items() if now < failure.until}
        self._avoided = frozenset(avoided)
        self._changes_at = min(avoided.values(), default=float("inf"))
