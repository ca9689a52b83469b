"""python -m baton.testing.paced_store RATE_FILE OPTIONS: a KV store with a slow disk, for `baton bench gate`.

RATE_FILE holds a rate in bytes/s and is read for each block; if it is empty, reads run at the disk's own speed. Blocks
are read one after the other: a read completes when the disk has returned it and its bytes have taken their time.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from baton.kvtransfer.store.arena_index import Key
from baton.kvtransfer.store.lower import LowerTier, ReadDone, Space, WriteDone
from baton.kvtransfer.store.process import serve
from baton.kvtransfer.store.settings import StoreSettings
from baton.node.settings import parse

MAX_STEP_S = 0.001
"""A sleep ends a little late; what is late by less than this is not slept for."""


class PacedLower:
    """Delays the reads of another LowerTier to a given rate; everything else passes through."""

    def __init__(self, lower: LowerTier, wake: Callable[[], None], bytes_per_s: Callable[[], float]) -> None:
        """`bytes_per_s` gives the current rate."""
        self._lower = lower
        self._wake = wake
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0
        self._due_at: dict[Key, float] = {}
        self._held: queue.SimpleQueue[tuple[float, ReadDone]] = queue.SimpleQueue()
        self._done: deque[ReadDone] = deque()
        threading.Thread(target=self._run, name="delay", daemon=True).start()

    def open(self, space: Space) -> None:
        self._lower.open(space)

    def has(self, key: Key) -> bool:
        return self._lower.has(key)

    def wants(self, key: Key) -> bool:
        return self._lower.wants(key)

    def write(self, key: Key, data: memoryview, digest: bytes) -> bool:
        return self._lower.write(key, data, digest)

    def drop(self, key: Key) -> None:
        self._lower.drop(key)

    def stats(self) -> dict[str, float]:
        return self._lower.stats()

    def close(self) -> None:
        self._lower.close()

    def read(self, key: Key, into: memoryview) -> None:
        now = time.monotonic()
        self._free_at = max(self._free_at, now) + into.nbytes / self._bytes_per_s()
        self._due_at[key] = self._free_at
        self._lower.read(key, into)

    def poll(self) -> list[ReadDone | WriteDone]:
        found: list[ReadDone | WriteDone] = []
        for each in self._lower.poll():
            if isinstance(each, WriteDone):
                found.append(each)
            else:
                self._held.put((self._due_at.pop(each.key), each))
        return found + [self._done.popleft() for _ in range(len(self._done))]

    def _run(self) -> None:
        while True:
            due_at, done = self._held.get()
            if (left_s := due_at - time.monotonic()) > MAX_STEP_S:
                time.sleep(left_s)
            self._done.append(done)
            self._wake()


def rate_of(path: Path) -> float:
    """Bytes/s; unlimited where the file is empty."""
    return float(path.read_text().strip() or "inf")


def main(argv: list[str]) -> int:
    path = Path(argv[0])
    settings = parse(StoreSettings, argv[1:], prog="paced_store", description="A KV store with a slow disk.")
    return serve(settings, lambda lower, wake: PacedLower(lower, wake, lambda: rate_of(path)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
