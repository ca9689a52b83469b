"""The disk under the arena: one tier a namespace, opened, read and written by threads, so that the store never waits.

A block goes to disk at its second use, since most are never used again: the first use only notes its name. What is
written stays held in the arena until it is; so writing behind copies nothing, and is bounded by the bytes so held.
Beyond that bound what comes is dropped: its next use tries again. The bytes are checked against the digest before they
are written, for the tier will vouch for them afterwards.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from kvtransfer.store.arena import digest_of
from kvtransfer.store.arena_index import Key
from kvtransfer.store.lower import ReadDone, WriteDone
from kvtransfer.tiers.base import Tier
from node.errors import SettingsError
from node.telemetry import log_event

logger = logging.getLogger("store")

NUM_READERS = 2
MAX_REMEMBERED = 1 << 17
"""Names of blocks that were used once."""
STOP_TIMEOUT_S = 30.0

OpenTier = Callable[[bytes, int], Tier]
"""By namespace and block_bytes; raises SettingsError."""


@dataclass(frozen=True, slots=True)
class _Job:
    """A read, or with a digest a write."""

    key: Key
    view: memoryview
    digest: bytes = b""


class SecondUse:
    """Whether a block is used again, as far as the last `capacity` names are remembered."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._used: OrderedDict[Key, None] = OrderedDict()

    def again(self, key: Key) -> bool:
        """Note a use; False if none is remembered before it."""
        known = key in self._used
        self._used[key] = None
        self._used.move_to_end(key)
        if len(self._used) > self._capacity:
            self._used.popitem(last=False)
        return known


class Disk:
    """A Lower (lower.py). `wake` is called by the threads when `poll` has news, and when a tier was opened."""

    def __init__(self, open_tier: OpenTier, max_writing_bytes: int, wake: Callable[[], None]) -> None:
        self._open_tier = open_tier
        self._max_writing_bytes = max_writing_bytes
        self._wake = wake
        self._tiers: dict[bytes, Tier | None] = {}  # None: being opened, or it cannot be
        self._second_use = SecondUse(MAX_REMEMBERED)
        self._reads: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._writes: queue.SimpleQueue[_Job | tuple[bytes, int] | None] = queue.SimpleQueue()
        self._done: deque[ReadDone | WriteDone] = deque()
        self._writing: dict[Key, int] = {}
        self._writing_bytes = 0
        self._counters: Counter[str] = Counter(write_drops=0, write_damaged=0, open_failures=0)
        targets = [self._read_all] * NUM_READERS + [self._write_all]
        self._threads = [threading.Thread(target=target, name="disk", daemon=True) for target in targets]
        for thread in self._threads:
            thread.start()

    def open(self, namespace: bytes, block_bytes: int) -> None:
        if namespace not in self._tiers:
            self._tiers[namespace] = None
            self._writes.put((namespace, block_bytes))

    def has(self, key: Key) -> bool:
        tier = self._tiers.get(key.namespace)
        return tier is not None and tier.contains([key.hash])[0]

    def wants(self, key: Key) -> bool:
        again = self._second_use.again(key)
        return again and self._tiers.get(key.namespace) is not None and not self.has(key)

    def read(self, key: Key, into: memoryview) -> None:
        self._reads.put(_Job(key, into))

    def write(self, key: Key, data: memoryview, digest: bytes) -> bool:
        if self._writing_bytes + len(data) > self._max_writing_bytes or key in self._writing:
            self._counters["write_drops"] += 1
            return False
        self._writing[key] = len(data)
        self._writing_bytes += len(data)
        self._writes.put(_Job(key, data, digest))
        return True

    def poll(self) -> list[ReadDone | WriteDone]:
        done = [self._done.popleft() for _ in range(len(self._done))]
        for each in done:
            if isinstance(each, WriteDone):
                self._writing_bytes -= self._writing.pop(each.key)
        return done

    def stats(self) -> dict[str, float]:
        total: Counter[str] = Counter(self._counters)
        total["writing_bytes"] = self._writing_bytes
        for tier in self._tiers.values():
            if tier is None:
                continue
            stats = tier.stats()
            total["blocks"] += stats.blocks
            total["used_bytes"] += stats.blocks * tier.block_bytes
            total["size_bytes"] += stats.capacity_blocks * tier.block_bytes
            for name in ("hits", "read_bytes", "read_s", "stored", "written_bytes", "write_s"):
                total[name] += getattr(stats, name)
            for prefix, counts in (("miss", stats.misses), ("refused", stats.refusals), ("evicted", stats.evictions)):
                for reason, count in counts.items():
                    total[f"{prefix}_{reason}"] += count
        return {f"disk_{name}": float(value) for name, value in total.items()}

    def close(self) -> None:
        """End the threads after what they have begun, and make what is held last."""
        for _ in range(NUM_READERS):
            self._reads.put(None)
        self._writes.put(None)
        for thread in self._threads:
            thread.join(STOP_TIMEOUT_S)
        for tier in self._tiers.values():
            if tier is not None:
                tier.close()

    # -- the threads

    def _read_all(self) -> None:
        while (job := self._reads.get()) is not None:
            tier = self._tiers.get(job.key.namespace)
            self._tell(ReadDone(job.key, tier is not None and tier.get(job.key.hash, job.view)))

    def _write_all(self) -> None:
        while (job := self._writes.get()) is not None:
            if isinstance(job, tuple):
                self._open(*job)
                self._wake()
                continue
            tier = self._tiers.get(job.key.namespace)
            if digest_of(job.view) != job.digest:
                self._counters["write_damaged"] += 1
            elif tier is not None:
                tier.put(job.key.hash, job.view)
            self._tell(WriteDone(job.key))

    def _open(self, namespace: bytes, block_bytes: int) -> None:
        try:
            self._tiers[namespace] = self._open_tier(namespace, block_bytes)
        except SettingsError as error:
            self._counters["open_failures"] += 1
            log_event(logger, "disk_unusable", level=logging.WARNING, namespace=namespace.hex()[:12], reason=str(error))

    def _tell(self, done: ReadDone | WriteDone) -> None:
        self._done.append(done)
        self._wake()
