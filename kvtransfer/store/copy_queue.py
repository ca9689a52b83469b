"""Blocks that wait to be copied between arena and pool, and the batches under way: loads first, a few at a time.

Knows no messages. An *operation* is a load or a put; it counts how many of its blocks are being copied, since until
none is it must not be reported as over.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from baton.kvtransfer.blocks.copies import IN_FLIGHT, Copies, Pair
from baton.node.errors import InvariantBroken

POLL_S = 0.0002
COPY_S = 30.0
"""A copy that has not ended by then never will: the GPU is gone, and with it the worker."""


class CopyOperation(Protocol):
    copying: int
    """Blocks that a copy touches now."""

    def wants(self, number: int) -> bool:
        """Whether this block is still to be copied."""
        ...


Op = TypeVar("Op", bound=CopyOperation)


@dataclass(frozen=True, slots=True)
class Copy(Generic[Op]):
    """One block between the arena and the pool; `number` is its place in the operation."""

    operation: Op
    number: int
    pair: Pair
    digest: bytes = b""
    """What the pool's bytes must have after a load."""


@dataclass(frozen=True, slots=True)
class Copied(Generic[Op]):
    """It has ended; the block's share of the time that its batch took, and the digest of the pool's bytes."""

    copy: Copy[Op]
    digest: bytes
    took_s: float


@dataclass(frozen=True, slots=True)
class _Batch(Generic[Op]):
    id: int
    begun_at: float
    copies: list[Copy[Op]]


@dataclass(slots=True)
class _Lane(Generic[Op]):
    """One direction."""

    waiting: deque[Copy[Op]] = field(default_factory=deque)
    in_flight: deque[_Batch[Op]] = field(default_factory=deque)
    """In their order, in which they end."""
    ended_at: float = 0.0

    def next_batch(self, most: int) -> list[Copy[Op]]:
        """Blocks that are still wanted."""
        batch: list[Copy[Op]] = []
        while self.waiting and len(batch) < most:
            copy = self.waiting.popleft()
            if copy.operation.wants(copy.number):
                batch.append(copy)
        return batch


class CopyQueue(Generic[Op]):
    """The copies of one worker, in both directions."""

    def __init__(self, copies: Copies) -> None:
        self._copies = copies
        self._loads: _Lane[Op] = _Lane()
        self._saves: _Lane[Op] = _Lane()

    def load(self, copy: Copy[Op]) -> None:
        self._loads.waiting.append(copy)

    def save(self, copy: Copy[Op]) -> None:
        self._saves.waiting.append(copy)

    @property
    def idle(self) -> bool:
        """Whether no copy touches pool or arena."""
        return not self._loads.in_flight and not self._saves.in_flight

    @property
    def poll_s(self) -> float:
        """How long `begin` and `take` may be left alone, at most."""
        lanes = (self._loads, self._saves)
        if any(lane.waiting and len(lane.in_flight) < IN_FLIGHT for lane in lanes):
            return 0.0
        return float("inf") if self.idle else POLL_S

    def begin(self, clock: Callable[[], float]) -> None:
        """Begin what may begin; puts wait while loads do, since prompts wait for those."""
        self._begin(self._loads, self._copies.begin_load, clock)
        if not self._loads.waiting:
            self._begin(self._saves, self._copies.begin_save, clock)

    def take(self, clock: Callable[[], float]) -> Iterator[Copied[Op]]:
        """What has ended since the last call, block by block, each counted off when it is given.

        Raises what the copies raise, and InvariantBroken after COPY_S.
        """
        yield from self._take(self._loads, clock)
        yield from self._take(self._saves, clock)

    def drop_waiting(self) -> None:
        """Nothing more begins."""
        self._loads.waiting.clear()
        self._saves.waiting.clear()

    def close(self) -> None:
        """Wait for what is under way, and forget it."""
        self.drop_waiting()
        self._copies.close()
        self._loads.in_flight.clear()
        self._saves.in_flight.clear()

    def _begin(self, lane: _Lane[Op], begin: Callable[[Sequence[Pair]], int], clock: Callable[[], float]) -> None:
        while len(lane.in_flight) < IN_FLIGHT and (batch := lane.next_batch(self._copies.batch_blocks)):
            now = clock()
            lane.in_flight.append(_Batch(begin([copy.pair for copy in batch]), now, batch))
            for copy in batch:
                copy.operation.copying += 1

    def _take(self, lane: _Lane[Op], clock: Callable[[], float]) -> Iterator[Copied[Op]]:
        while lane.in_flight:
            batch = lane.in_flight[0]
            digests = self._copies.ended(batch.id)
            now = clock()
            if digests is None:
                if now - batch.begun_at > COPY_S:
                    raise InvariantBroken(f"{len(batch.copies)} blocks are not copied after {COPY_S} s")
                return
            lane.in_flight.popleft()
            took_s = (now - max(batch.begun_at, lane.ended_at)) / len(batch.copies)
            lane.ended_at = now
            for copy, digest in zip(batch.copies, digests, strict=True):
                copy.operation.copying -= 1
                yield Copied(copy, digest, took_s)
