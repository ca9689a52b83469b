"""The figures of a tier while they are counted. Its owner guards it with a lock."""

from __future__ import annotations

from types import MappingProxyType

from baton.kvtransfer.store.disk.base import Eviction, Miss, Refusal, TierStats


class TierCounters:
    """Sums since the opening; `snapshot` makes a value of them."""

    def __init__(self) -> None:
        self._queries = 0
        self._hits = 0
        self._misses = dict.fromkeys(Miss, 0)
        self._read_bytes = 0
        self._read_s = 0.0
        self._stored = 0
        self._refusals = dict.fromkeys(Refusal, 0)
        self._written_bytes = 0
        self._write_s = 0.0
        self._evictions = dict.fromkeys(Eviction, 0)

    def hit(self, size_bytes: int, duration_s: float) -> None:
        self._queries += 1
        self._hits += 1
        self._read_bytes += size_bytes
        self._read_s += duration_s

    def miss(self, reason: Miss) -> None:
        self._queries += 1
        self._misses[reason] += 1

    def stored(self, size_bytes: int, duration_s: float) -> None:
        self._stored += 1
        self._written_bytes += size_bytes
        self._write_s += duration_s

    def refused(self, reason: Refusal) -> None:
        self._refusals[reason] += 1

    def evicted(self, reason: Eviction, blocks: int) -> None:
        self._evictions[reason] += blocks

    def snapshot(self, blocks: int, capacity_blocks: int) -> TierStats:
        return TierStats(
            queries=self._queries,
            hits=self._hits,
            misses=MappingProxyType(dict(self._misses)),
            read_bytes=self._read_bytes,
            read_s=self._read_s,
            stored=self._stored,
            refusals=MappingProxyType(dict(self._refusals)),
            written_bytes=self._written_bytes,
            write_s=self._write_s,
            evictions=MappingProxyType(dict(self._evictions)),
            blocks=blocks,
            capacity_blocks=capacity_blocks,
        )
