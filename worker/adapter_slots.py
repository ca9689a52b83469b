"""Which adapter is in which of a runner's slots, and which slot the next one takes. Pure: no tensor, no thread.

A slot that a sequence with blocks uses stays: such a sequence only gives its blocks back by computing on. One of a
sequence without blocks may be taken for one that has some, so that blocks and slots are never waited for in a circle.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AdapterRead:
    """A thread has read an adapter, or `error` says why it cannot be used."""

    digest: bytes
    error: str = ""
    prepared: object = None
    """models.adapters.slots.PreparedAdapter."""


class SlotTable:
    """The slots, in the order in which they were used."""

    def __init__(self, num_slots: int) -> None:
        self._digests: dict[int, bytes | None] = dict.fromkeys(range(num_slots))  # least recently used first
        self._slots: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._digests)

    @property
    def digests(self) -> tuple[bytes, ...]:
        """Of the adapters that are in slots, the last used first."""
        return tuple(digest for digest in reversed(self._digests.values()) if digest is not None)

    def slot_of(self, digest: bytes) -> int | None:
        return self._slots.get(digest)

    def use(self, slot: int) -> None:
        """It is the last used one now."""
        self._digests[slot] = self._digests.pop(slot)

    def choose(self, busy: Set[int], held: Set[int], *, may_take_held: bool) -> int | None:
        """The slot for another adapter: an empty one, or the least recently used that is neither `busy` nor `held`;
        with `may_take_held` at last a held one."""
        free = [slot for slot in self._digests if slot not in busy]
        unheld = [slot for slot in free if slot not in held]
        empty = [slot for slot in unheld if self._digests[slot] is None]
        found = empty or unheld or (free if may_take_held else [])
        return found[0] if found else None

    def put(self, slot: int, digest: bytes) -> None:
        if (before := self._digests.pop(slot)) is not None:
            del self._slots[before]
        self._digests[slot] = digest
        self._slots[digest] = slot
