"""Copies that end when a test allows it, as on a GPU, and that detect code that does not wait for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton.kvtransfer.blocks.checksum import digest_by
from baton.kvtransfer.blocks.copies import Pair
from baton.kvtransfer.blocks.memory import BlockMemory
from baton.node.errors import PeerLost
from baton.node.messages.store import DigestName

GARBAGE = 0xA5


@dataclass
class LateLock:
    """A lock that becomes ready when the test sets it."""

    owner: LateCopies
    closed: bool = False

    def ready(self) -> bool:
        assert not self.closed
        if self.owner.unlockable:
            raise PeerLost("the pages cannot be locked")
        return not self.owner.locking

    def close(self) -> None:
        assert not self.owner.under_way, "let go while a copy uses it"
        self.closed = True


class LateCopies:
    """Asynchronous copies: a load fills its blocks with garbage at its start, and with the data `polls` later.

    While it is `held`, no copy ends. `spoil`: blocks in which a bit flips on the way to the pool.
    """

    def __init__(self, pool: BlockMemory, *, polls: int = 2, batch_blocks: int = 2) -> None:
        self.block_bytes, self.num_units, self.batch_blocks = pool.block_bytes, pool.num_units, batch_blocks
        self.digest: DigestName = "xxh3"
        self.polls = polls
        self.held = self.locking = self.unlockable = self.broken = self.closed = False
        self.spoil: set[int] = set()
        self.locks: list[LateLock] = []
        self.begun: list[tuple[str, list[int]]] = []
        self.under_way: dict[int, tuple[str, list[Pair], int]] = {}
        self._pool = pool

    @property
    def touched(self) -> set[int]:
        """Blocks of the pool that copies read or write."""
        return {pair.block for _, pairs, _ in self.under_way.values() for pair in pairs}

    def lock(self, memory: memoryview) -> LateLock:
        self.locks.append(LateLock(self))
        return self.locks[-1]

    def begin_load(self, pairs: Sequence[Pair]) -> int:
        for block, _ in pairs:
            self._pool.block(block)[:] = bytes([GARBAGE]) * self.block_bytes
        return self._begin("load", pairs)

    def begin_save(self, pairs: Sequence[Pair]) -> int:
        for _, span in pairs:
            span[:] = bytes([GARBAGE]) * self.block_bytes
        return self._begin("save", pairs)

    def ended(self, copy: int) -> list[bytes] | None:
        kind, pairs, polls = self.under_way[copy]
        if self.broken:
            raise RuntimeError("the GPU is gone")
        if self.held or polls:
            self.under_way[copy] = (kind, pairs, max(0, polls - 1))
            return None
        return self._end(copy)

    def close(self) -> None:
        for copy in [*self.under_way]:
            self._end(copy)
        self.closed = True

    def _begin(self, kind: str, pairs: Sequence[Pair]) -> int:
        assert not self.closed and 1 <= len(pairs) <= self.batch_blocks
        assert not self.touched & {pair.block for pair in pairs}, "a block is in two copies"
        self.begun.append((kind, [pair.block for pair in pairs]))
        self.under_way[len(self.begun)] = (kind, [*pairs], self.polls)
        return len(self.begun)

    def _end(self, copy: int) -> list[bytes]:
        kind, pairs, _ = self.under_way.pop(copy)
        for block, span in pairs:
            held = self._pool.block(block)
            if kind == "save":
                span[:] = held
                continue
            held[:] = span
            if block in self.spoil:
                held[0] ^= 1
        return [digest_by(self.digest, self.num_units)(self._pool.block(block)) for block, _ in pairs]
