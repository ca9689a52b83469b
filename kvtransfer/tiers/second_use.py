"""Which blocks are worth a write to disk: those that are used a second time. Pure.

Most prompts never come back; writing each block at its first use would wear the disk and crowd out what does come back.
"""

from __future__ import annotations


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
        """Whether this is not the first use. The key is forgotten then: the caller writes it, and knows what it has."""
        if key in self._once:
            del self._once[key]
            return True
        self._once[key] = None
        if len(self._once) > self._num_keys:
            del self._once[next(iter(self._once))]
        return False
