"""A token bucket: an amount a minute, all of it at once at most, and a debt where more was used than was asked for."""

from __future__ import annotations

MINUTE_S = 60.0


class Bucket:
    """What is left of a limit a minute. It fills evenly, up to the limit; times come from one clock."""

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def resize(self, per_minute: int, now: float) -> None:
        """Change the limit; what was used of it stays used."""
        self._fill(now)
        self._level += per_minute - self.per_minute
        self.per_minute = per_minute

    def wait_s(self, amount: int, now: float) -> float:
        """Until `amount` is there, 0 where it is; more than the limit needs all of it."""
        self._fill(now)
        missing = min(amount, self.per_minute) - self._level
        return max(0.0, missing / self.per_minute * MINUTE_S)

    def take(self, amount: int, now: float) -> None:
        """It may leave a debt. A negative amount gives back."""
        self._fill(now)
        self._level = min(self._level - amount, float(self.per_minute))

    def remaining(self, now: float) -> int:
        self._fill(now)
        return max(0, int(self._level))

    def full_in_s(self, now: float) -> float:
        self._fill(now)
        return (self.per_minute - self._level) / self.per_minute * MINUTE_S

    def _fill(self, now: float) -> None:
        filled = self._level + max(0.0, now - self._at) / MINUTE_S * self.per_minute
        self._level, self._at = min(filled, float(self.per_minute)), now
