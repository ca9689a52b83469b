"""Which blocks are worth a write to disk: those that are used a second time, and while there is room all. Pure.

Most prompts never come back; writing each block at its first use would wear the disk and crowd out what does come back.
As long as a part of the disk is empty nothing is crowded out, and what falls out of RAM before its second use is found.
"""

from __future__ import annotations

FIRST_USE_PART = 0.75
"""Of a tier: while less of it is in use, the first use of a block is enough (docs/decisions/0005)."""


class SecondUse:
    """Remembers the last `num_keys` keys that were used once; about 150 bytes each."""

    def __init__(self, num_keys: int) -> None:
        if num_keys < 1:
            raise ValueError(f"a memory of {num_keys} keys")
        self._num_keys = num_keys
        self._once: dict[bytes, None] = {}  # the longest ago first

    def __len__(self) -> int:
        return len(self._once)

    def use(self, key: bytes) -> bool:
        """Whether this is not the first use, as far as it is remembered."""
        if key in self._once:
            return True
        self._once[key] = None
        if len(self._once) > self._num_keys:
            del self._once[next(iter(self._once))]
        return False

    def forget(self, key: bytes) -> None:
        """It is being written: from then on its tier knows it."""
        self._once.pop(key, None)
