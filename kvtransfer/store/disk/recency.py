"""Which blocks a tier holds, and in which order they were used. Pure.

Ticks count uses; they are written to disk with the next write, not at each use, so that a hit costs no write.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable, Mapping


class Recency:
    """Keys in the order of their last use."""

    def __init__(self, entries: Iterable[tuple[bytes, int]] = ()) -> None:
        """`entries`: key and tick, as they were kept, in any order."""
        self._ticks: OrderedDict[bytes, int] = OrderedDict(sorted(entries, key=lambda entry: entry[1]))
        self._next = max(self._ticks.values(), default=0) + 1
        self._unsaved: dict[bytes, None] = {}

    def __contains__(self, key: object) -> bool:
        return key in self._ticks

    def __len__(self) -> int:
        return len(self._ticks)

    @property
    def num_unsaved(self) -> int:
        """Held keys whose newest tick was not taken by `take_unsaved`."""
        return len(self._unsaved)

    def keys(self) -> list[bytes]:
        """Least recently used first."""
        return list(self._ticks)

    def next_tick(self) -> int:
        """Larger than all before."""
        self._next += 1
        return self._next - 1

    def add(self, key: bytes, tick: int) -> None:
        """As the most recently used; `tick` is from `next_tick` and is being saved with the record."""
        self._ticks[key] = tick
        self._ticks.move_to_end(key)
        self._unsaved.pop(key, None)

    def touch(self, key: bytes) -> None:
        """A use of a held key."""
        self._ticks[key] = self.next_tick()
        self._ticks.move_to_end(key)
        self._unsaved[key] = None

    def remove(self, key: bytes) -> bool:
        """Whether it was held."""
        self._unsaved.pop(key, None)
        return self._ticks.pop(key, None) is not None

    def take_oldest(self, count: int, skip: Container[bytes]) -> dict[bytes, int]:
        """Remove the `count` least recently used that are not in `skip`, or fewer if there are no more."""
        taken: dict[bytes, int] = {}
        for key in self._ticks:
            if len(taken) >= count:
                break
            if key not in skip:
                taken[key] = self._ticks[key]
        for key in taken:
            self.remove(key)
        return taken

    def put_back(self, taken: Mapping[bytes, int]) -> None:
        """Undo `take_oldest`: they are the least recently used again (some uses may be saved once more than needed)."""
        for key, tick in reversed(list(taken.items())):
            self._ticks[key] = tick
            self._ticks.move_to_end(key, last=False)
            self._unsaved[key] = None

    def take_unsaved(self, limit: int) -> dict[bytes, int]:
        """Up to `limit` keys with ticks that are not saved yet; the caller saves them."""
        keys = [key for key, _ in zip(self._unsaved, range(limit), strict=False)]
        for key in keys:
            del self._unsaved[key]
        return {key: self._ticks[key] for key in keys}

    def not_saved(self, keys: Iterable[bytes]) -> None:
        """Undo `take_unsaved` for those that are still held."""
        for key in keys:
            if key in self._ticks:
                self._unsaved[key] = None
