"""The KV events of a holder of blocks (a worker's pool, a host's store): which it has gained and lost. No torch.

    owner's thread                                I/O thread
    journal("gpu").stored(hash) ── queue ──► flush() ──► KvEvents 1, 2, 3 ...   to every proxy, at most each 50 ms
                        removed(hash)        replay(seq) ──► those from seq on, or KvSnapshots of all that is held

A batch says what differs after it, so it is the same whether a block came and went once or ten times in between, and
taking one in twice changes nothing. A proxy that misses a number asks for it; the number of the last one goes into
each heartbeat, so that the end of a burst is missed for no longer than that.
"""

from __future__ import annotations

from collections import deque
from typing import Protocol

from baton.node.messages.base import MAX_EVENT_BLOCKS, Tier
from baton.node.messages.control import KvEvents, KvSnapshot, TierChange

FLUSH_EVERY_S = 0.05
KEEP_BLOCKS = 1 << 15
"""Hashes in the batches that are kept for replay; a proxy that misses more gets a snapshot."""

_TIERS: tuple[Tier, ...] = ("gpu", "ram", "disk")


class BlockJournal(Protocol):
    """Called by the owner of blocks, at once, for each that it gains or loses; must be quick."""

    def stored(self, block_hash: bytes) -> None: ...

    def removed(self, block_hash: bytes) -> None: ...


class NullJournal:
    """Discards all events."""

    def stored(self, block_hash: bytes) -> None: ...

    def removed(self, block_hash: bytes) -> None: ...


class TierJournal:
    """Queues what happens in one tier for the log."""

    def __init__(self, tier: Tier, queue: deque[tuple[Tier, bytes, bool]]) -> None:
        self._tier = tier
        self._append = queue.append

    def stored(self, block_hash: bytes) -> None:
        self._append((self._tier, block_hash, True))

    def removed(self, block_hash: bytes) -> None:
        self._append((self._tier, block_hash, False))


class EventLog:
    """The log of one holder's events. Journals may be written by other threads; everything else belongs to one."""

    def __init__(self, keep_blocks: int = KEEP_BLOCKS, batch_blocks: int = MAX_EVENT_BLOCKS) -> None:
        self.seq = 0
        """Number of the last batch."""
        self._queue: deque[tuple[Tier, bytes, bool]] = deque()
        self._held: dict[Tier, dict[bytes, None]] = {tier: {} for tier in _TIERS}
        self._kept: deque[KvEvents] = deque()
        self._num_kept = 0  # hashes in them
        self._keep_blocks = keep_blocks
        self._batch_blocks = batch_blocks

    def journal(self, tier: Tier) -> TierJournal:
        """Where the owner of that tier's blocks notes what happens."""
        return TierJournal(tier, self._queue)

    def flush(self) -> list[KvEvents]:
        """Batches of all that was noted since the last call, for every proxy; often none."""
        batches = []
        while self._queue:
            changes = self._net(self._take())
            if changes:
                self.seq += 1
                batches.append(KvEvents(seq=self.seq, changes=changes))
                self._keep(batches[-1])
        return batches

    def replay(self, seq: int) -> list[KvEvents] | list[KvSnapshot]:
        """The batches from number `seq` on or, if some of them are forgotten, all that is held."""
        if seq > self.seq:
            return []
        if self._kept and self._kept[0].seq <= seq:
            return [batch for batch in self._kept if batch.seq >= seq]
        return self._snapshot()

    def _take(self) -> dict[tuple[Tier, bytes], bool]:
        """The last word on each of the next so many blocks."""
        last: dict[tuple[Tier, bytes], bool] = {}
        while self._queue and len(last) < self._batch_blocks:
            tier, block_hash, stored = self._queue.popleft()
            last[tier, block_hash] = stored
        return last

    def _net(self, last: dict[tuple[Tier, bytes], bool]) -> tuple[TierChange, ...]:
        """Bring `held` up to date, and return the difference."""
        changes = []
        for tier in _TIERS:
            held, stored, removed = self._held[tier], [], []
            for (of, block_hash), is_stored in last.items():
                if of != tier or is_stored == (block_hash in held):
                    continue
                if is_stored:
                    held[block_hash] = None
                    stored.append(block_hash)
                else:
                    del held[block_hash]
                    removed.append(block_hash)
            if stored or removed:
                changes.append(TierChange(tier, tuple(stored), tuple(removed)))
        return tuple(changes)

    def _keep(self, batch: KvEvents) -> None:
        self._kept.append(batch)
        self._num_kept += _size(batch)
        while self._num_kept > self._keep_blocks:
            self._num_kept -= _size(self._kept.popleft())

    def _snapshot(self) -> list[KvSnapshot]:
        changes: list[TierChange] = []
        for tier in _TIERS:
            hashes, step = tuple(self._held[tier]), self._batch_blocks
            changes += [TierChange(tier, hashes[i : i + step]) for i in range(0, len(hashes), step)]
        parts: list[tuple[TierChange, ...]] = [(change,) for change in changes] or [()]
        return [
            KvSnapshot(seq=self.seq, part=part, parts=len(parts), changes=change) for part, change in enumerate(parts)
        ]


def _size(batch: KvEvents) -> int:
    return sum(len(change.stored) + len(change.removed) for change in batch.changes)
