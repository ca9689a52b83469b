"""The disk under the arena: one tier a namespace, opened, read and written by threads, so that the store never waits.

A block goes to disk at its second use, since most are never used again, but while there is room at its first. What is
written stays held in the arena until it is, so writing behind copies nothing; what comes while too much is held is
dropped, and a later use tries again.

A tier whose files are lost or damaged, and one that could not be opened, is tried again every few seconds: the store
goes on without it meanwhile.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass

from baton.kvtransfer.blocks.checksum import digest_by
from baton.kvtransfer.store.arena_index import Key
from baton.kvtransfer.store.disk.base import Tier
from baton.kvtransfer.store.disk.records import Block
from baton.kvtransfer.store.disk.second_use import FIRST_USE_PART, SecondUse
from baton.kvtransfer.store.disk.write_behind import WriteBehind, WriteBehindThread
from baton.kvtransfer.store.lower import ReadDone, Space, WriteDone
from baton.node.errors import SettingsError
from baton.node.telemetry import log_event

logger = logging.getLogger("store")

NUM_READERS = 2
MAX_REMEMBERED = 1 << 17
"""Names of blocks that were used once."""
CLOSE_WITHIN_S = 10.0
UPKEEP_S = 5.0
"""From one look at all tiers to the next."""

OpenTier = Callable[[bytes, int], Tier]
"""By namespace and block_bytes; raises SettingsError."""


@dataclass(frozen=True, slots=True)
class _Read:
    key: Key
    into: memoryview


@dataclass(frozen=True, slots=True)
class _Drop:
    key: Key


class Disk:
    """A LowerTier (lower.py). `wake` is called by the threads when `poll` has results, and when a tier was opened."""

    def __init__(
        self,
        open_tier: OpenTier,
        max_writing_bytes: int,
        wake: Callable[[], None],
        first_use_part: float = FIRST_USE_PART,
        upkeep_s: float = UPKEEP_S,
    ) -> None:
        """first_use_part: of a tier that may be in use for a block to be written at its first use."""
        self._open_tier = open_tier
        self._wake = wake
        self._spaces: dict[bytes, Space] = {}
        self._tiers: dict[bytes, Tier] = {}  # those of `_spaces` that are open
        self._second_use = SecondUse(MAX_REMEMBERED)
        self._first_use_part = first_use_part
        self._roomy: frozenset[bytes] = frozenset()  # namespaces, as of the last `poll`
        self._open_failures = 0
        self._reasons: dict[bytes, str] = {}  # why the last opening failed, by namespace
        self._done: deque[ReadDone | WriteDone] = deque()
        self._behind = WriteBehind(max_writing_bytes)
        self._writer = WriteBehindThread(self._behind)
        self._todo: queue.SimpleQueue[_Read | _Drop | None] = queue.SimpleQueue()
        self._new_spaces: queue.SimpleQueue[Space | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._run, name="disk", daemon=True) for _ in range(NUM_READERS)]
        self._threads.append(threading.Thread(target=self._keep_up, args=(upkeep_s,), name="disk-upkeep", daemon=True))
        for thread in self._threads:
            thread.start()

    def open(self, space: Space) -> None:
        if space.namespace not in self._spaces:
            self._spaces[space.namespace] = space
            self._new_spaces.put(space)

    def has(self, key: Key) -> bool:
        tier = self._tiers.get(key.namespace)
        return tier is not None and tier.contains([key.hash])[0]

    def wants(self, key: Key) -> bool:
        if key.namespace not in self._tiers or self.has(key):
            return False
        return self._second_use.use(key.hash) or key.namespace in self._roomy

    def read(self, key: Key, into: memoryview) -> None:
        self._todo.put(_Read(key, into))

    def write(self, key: Key, data: memoryview, digest: bytes) -> bool:
        tier = self._tiers.get(key.namespace)
        if tier is None:
            return False
        space = self._spaces[key.namespace]
        block = Block(data, digest)
        taken = self._behind.offer(
            tier, key.hash, block, digest_by(space.digest, space.num_units), lambda: self._report(WriteDone(key))
        )
        if taken:
            self._second_use.forget(key.hash)
        return taken

    def drop(self, key: Key) -> None:
        self._todo.put(_Drop(key))

    def poll(self) -> list[ReadDone | WriteDone]:
        self._roomy = frozenset(space for space, tier in [*self._tiers.items()] if self._has_room(tier))
        return [self._done.popleft() for _ in range(len(self._done))]

    def stats(self) -> dict[str, float]:
        behind = self._behind.stats()
        total: Counter[str] = Counter(
            open_failures=self._open_failures, writing_blocks=behind.depth_blocks, writing_bytes=behind.depth_bytes
        )
        total.update({f"dropped_{reason}": count for reason, count in behind.drops.items()})
        for tier in [*self._tiers.values()]:
            total.update(_stats(tier))
        return {f"disk_{name}": float(value) for name, value in total.items()}

    def close(self) -> None:
        """End the threads after what they have begun, and make what is held last."""
        self._writer.close(CLOSE_WITHIN_S)
        self._new_spaces.put(None)
        for _ in range(NUM_READERS):
            self._todo.put(None)
        for thread in self._threads:
            thread.join(CLOSE_WITHIN_S)
        for tier in self._tiers.values():
            tier.close()

    def _has_room(self, tier: Tier) -> bool:
        stats = tier.stats()
        return stats.blocks < self._first_use_part * stats.capacity_blocks

    # -- the threads

    def _run(self) -> None:
        while (job := self._todo.get()) is not None:
            tier = self._tiers.get(job.key.namespace)
            if isinstance(job, _Read):
                digest = tier.get(job.key.hash, job.into) if tier is not None else None
                self._report(ReadDone(job.key, digest or b""))
            elif tier is not None:
                tier.drop([job.key.hash])

    def _keep_up(self, upkeep_s: float) -> None:
        """Opens tiers, and looks after those that are open, one after the other."""
        closed: list[Space] = []
        while True:
            try:
                space = self._new_spaces.get(timeout=upkeep_s)
            except queue.Empty:
                for tier in self._tiers.values():
                    tier.maintain()
                closed = [each for each in closed if not self._open(each)]
                continue
            if space is None:
                return
            if not self._open(space):
                closed.append(space)

    def _open(self, space: Space) -> bool:
        name = space.namespace.hex()[:12]
        try:
            tier = self._open_tier(space.namespace, space.block_bytes)
        except SettingsError as error:
            self._open_failures += 1
            if self._reasons.get(space.namespace) != str(error):
                self._reasons[space.namespace] = str(error)
                log_event(logger, "disk_unusable", level=logging.WARNING, namespace=name, reason=str(error))
        else:
            self._tiers[space.namespace] = tier
            log_event(logger, "disk_opened", namespace=name, tier=tier.name, blocks=tier.stats().blocks)
        self._wake()
        return space.namespace in self._tiers

    def _report(self, done: ReadDone | WriteDone) -> None:
        self._done.append(done)
        self._wake()


def _stats(tier: Tier) -> dict[str, float]:
    stats = tier.stats()
    return {
        "blocks": stats.blocks,
        "used_bytes": stats.blocks * tier.block_bytes,
        "size_bytes": stats.capacity_blocks * tier.block_bytes,
        "queries": stats.queries,
        "hits": stats.hits,
        "read_bytes": stats.read_bytes,
        "read_seconds": stats.read_s,
        "stored": stats.stored,
        "written_bytes": stats.written_bytes,
        "write_seconds": stats.write_s,
        **{f"miss_{reason}": count for reason, count in stats.misses.items()},
        **{f"refused_{reason}": count for reason, count in stats.refusals.items()},
        **{f"evictions_{reason}": count for reason, count in stats.evictions.items()},
    }
