"""Blocks on their way into a tier, so that no caller waits for a disk. Bounded in bytes; when full, the newest go.

The blocks are not copied: the queue holds views, and says when it has done with each, once, whatever becomes of it.
They are checked against their digest before they are written: a block that was spoiled in memory is not worth its place
on the disk.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from threading import Condition, Thread
from types import MappingProxyType

from baton.kvtransfer.blocks.checksum import DigestOf
from baton.kvtransfer.store.disk.base import Tier
from baton.kvtransfer.store.disk.records import Block

IDLE_S = 0.5
"""How long the thread sleeps at most before it looks if it shall end."""


class Drop(StrEnum):
    """Why a block was not written."""

    QUEUE_FULL = "queue_full"
    QUEUED = "queued"  # it is waiting already
    SPOILED = "spoiled"  # its bytes are not what they were
    REFUSED = "refused"  # by the tier, which says why
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class WriteBehindStats:
    """Figures since the beginning; depths are of now, with what is being written."""

    depth_blocks: int
    depth_bytes: int
    max_bytes: int
    written: int
    drops: Mapping[Drop, int]


@dataclass(frozen=True, slots=True)
class _Write:
    tier: Tier
    key: bytes
    block: Block
    digest_of: DigestOf
    done: Callable[[], None]


class WriteBehind:
    """The queue. `offer` from any thread, `step` from one."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._changed = Condition()
        self._queue: deque[_Write] = deque()
        self._keys: set[bytes] = set()  # queued, or being written
        self._depth_bytes = 0
        self._written = 0
        self._drops = dict.fromkeys(Drop, 0)
        self._closed = False

    def offer(self, tier: Tier, key: bytes, block: Block, digest_of: DigestOf, done: Callable[[], None]) -> bool:
        """Queue a block. True: its bytes must stay as they are until `done` is called, by the thread that writes.

        `digest_of` makes the digest as the owner of the block did. False: dropped, and counted.
        """
        with self._changed:
            drop = self._refusal(key, block.data.nbytes)
            if drop is not None:
                self._drops[drop] += 1
                return False
            self._queue.append(_Write(tier, key, block, digest_of, done))
            self._keys.add(key)
            self._depth_bytes += block.data.nbytes
            self._changed.notify()
            return True

    def step(self, timeout_s: float = 0.0) -> bool:
        """Write the block that waits longest; False if none came in `timeout_s`."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._queue or self._closed, timeout=timeout_s) or not self._queue:
                return False
            write = self._queue.popleft()
        drop = _write(write)
        self._end(write, drop)
        return True

    def close(self) -> None:
        """Take no more; what is queued can still be written by `step`, or dropped by `drop_all`."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def drop_all(self) -> None:
        """What is queued will not be written."""
        while True:
            with self._changed:
                if not self._queue:
                    return
                write = self._queue.popleft()
            self._end(write, Drop.CLOSED)

    def stats(self) -> WriteBehindStats:
        with self._changed:
            drops = MappingProxyType(dict(self._drops))
            return WriteBehindStats(len(self._keys), self._depth_bytes, self._max_bytes, self._written, drops)

    def _refusal(self, key: bytes, size_bytes: int) -> Drop | None:
        if self._closed:
            return Drop.CLOSED
        if key in self._keys:
            return Drop.QUEUED
        if self._depth_bytes + size_bytes > self._max_bytes:
            return Drop.QUEUE_FULL
        return None

    def _end(self, write: _Write, drop: Drop | None) -> None:
        with self._changed:
            self._keys.remove(write.key)
            self._depth_bytes -= write.block.data.nbytes
            if drop is None:
                self._written += 1
            else:
                self._drops[drop] += 1
        write.done()


class WriteBehindThread:
    """The thread that steps a queue, until `close`."""

    def __init__(self, queue: WriteBehind) -> None:
        self._queue = queue
        self._end_at_s: float | None = None
        self._thread = Thread(target=self._run, name="write-behind", daemon=True)
        self._thread.start()

    def close(self, within_s: float) -> bool:
        """Write what is queued, for `within_s` at most, and drop the rest. False: a write hangs, and is left behind."""
        self._end_at_s = time.monotonic() + within_s
        self._queue.close()
        self._thread.join(within_s + IDLE_S)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while self._end_at_s is None or time.monotonic() < self._end_at_s:
            if not self._queue.step(IDLE_S) and self._end_at_s is not None:
                break
        self._queue.drop_all()


def _write(write: _Write) -> Drop | None:
    data, digest = write.block.data, write.block.digest
    if write.digest_of(data) != digest:
        return Drop.SPOILED
    return None if write.tier.put(write.key, data, digest) else Drop.REFUSED
