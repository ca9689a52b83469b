"""Comparing blocks in the arena with their digests, in a thread: for 8 MiB of a GPU's worker that takes milliseconds,
in which the store's loop would not answer. The caller of `begin` holds the block until the check has ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from baton.kvtransfer.blocks.checksum import DigestOf
from baton.kvtransfer.store.arena_index import Key

Run = Callable[[Callable[[], None]], object]
"""Does what it is given, at once or in a thread."""


@dataclass(frozen=True, slots=True)
class Check:
    """A block whose bytes are `data`; `arriving`: it has come from a peer, and is not found yet."""

    key: Key
    data: memoryview
    digest: bytes
    arriving: bool


class Checks:
    """`wake` is called by the thread when `take` has news."""

    def __init__(self, run: Run, wake: Callable[[], None]) -> None:
        self._run = run
        self._wake = wake
        self._ended: deque[tuple[Check, bool]] = deque()

    def begin(self, check: Check, digest_of: DigestOf) -> None:
        self._run(lambda: self._end(check, digest_of(check.data) == check.digest))

    def take(self) -> list[tuple[Check, bool]]:
        """The checks that have ended since the last call, and whether bytes and digest agree."""
        return [self._ended.popleft() for _ in range(len(self._ended))]

    def _end(self, check: Check, agrees: bool) -> None:
        self._ended.append((check, agrees))
        self._wake()
