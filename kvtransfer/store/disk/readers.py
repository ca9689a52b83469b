"""Which keys of a tier are being read, and by how many threads: what is read is not removed, nor its storage ended.

All calls are made with the lock held that guards the tier's state; this module knows neither tier nor storage.
"""

from __future__ import annotations

from threading import Condition, Lock


class Readers:
    """Readers by key."""

    def __init__(self, lock: Lock) -> None:
        self._count: dict[bytes, int] = {}
        self._none = Condition(lock)

    def __contains__(self, key: object) -> bool:
        return key in self._count

    def __len__(self) -> int:
        """How many keys have a reader."""
        return len(self._count)

    def add(self, key: bytes) -> None:
        self._count[key] = self._count.get(key, 0) + 1

    def remove(self, key: bytes) -> None:
        self._count[key] -= 1
        if self._count[key] == 0:
            del self._count[key]
            self._none.notify_all()

    def wait_for_none(self, timeout_s: float) -> bool:
        """Give up the lock until nothing is being read; False if that takes longer than `timeout_s`."""
        return self._none.wait_for(lambda: not self._count, timeout=timeout_s)
