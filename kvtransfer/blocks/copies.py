"""Copies between blocks of a worker's pool and spans of host memory: the interface, and the implementation for a CPU.

The one for a GPU is device_copies.py. The digest that a copy returns is always of the pool's bytes: after a load
of what has arrived there, at a save of what was meant.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import xxhash

from baton.kvtransfer.blocks.checksum import digest_of_sums
from baton.node.messages.store import DigestName

IN_FLIGHT = 2
"""Batches of one direction: the next begins when the one before it ends, without a turn of the loop between them."""
PIECE_BYTES = 256 << 10
BATCH_BYTES = 4 << 20
"""Copied at once by the CPU, so that messages are not kept waiting."""


class Pair(NamedTuple):
    """A block of the pool, and the block_bytes of the arena that it is copied from or to."""

    block: int
    span: memoryview


class Lock(Protocol):
    """Memory that is being made fit for copies."""

    def ready(self) -> bool:
        """Whether copies may use it. Raises PeerLost if they never may."""
        ...

    def close(self) -> None:
        """Let go of it, when no copy uses it any more. Returns at once."""
        ...


class Copies(Protocol):
    """One thread makes all calls, and none but `close` waits for a copy. A number names a copy until it has ended.

    Until then the blocks and spans of the copy must not be written, nor those that it writes be read.
    """

    block_bytes: int
    num_units: int
    batch_blocks: int
    """At most so many in one copy."""
    digest: DigestName
    """How the units of a block are summed up."""

    def lock(self, memory: memoryview) -> Lock:
        """Make the arena fit for copies, which takes seconds; see `Lock.ready`."""
        ...

    def begin_load(self, pairs: Sequence[Pair]) -> int:
        """Arena to pool; the blocks differ."""
        ...

    def begin_save(self, pairs: Sequence[Pair]) -> int:
        """Pool to arena."""
        ...

    def ended(self, copy: int) -> list[bytes] | None:
        """The digests of the blocks, in order; None: it has not ended. Raises if it failed: then all will."""
        ...

    def close(self) -> None:
        """Wait for what runs, and let go of everything. May be repeated."""
        ...


class UnitBytes(Protocol):
    """The units of a pool in host memory, each in one part, or in as many as there are stages that hold its layers."""

    @property
    def block_bytes(self) -> int: ...

    @property
    def num_units(self) -> int: ...

    def unit_parts(self, index: int) -> list[list[memoryview]]:
        """The writable bytes of each unit of one block, in order."""
        ...


class HostCopies:
    """For pools in host memory: at once. numpy and xxhash work without the interpreter's lock, beside the model."""

    def __init__(self, pool: UnitBytes) -> None:
        self._pool = pool
        self.digest: DigestName = "xxh3"
        self.block_bytes = pool.block_bytes
        self.num_units = pool.num_units
        self.batch_blocks = max(1, BATCH_BYTES // pool.block_bytes)
        self._copies = 0
        self._digests: dict[int, list[bytes]] = {}  # of copies whose end was not asked for yet

    def lock(self, memory: memoryview) -> Lock:
        return NoLock()

    def begin_load(self, pairs: Sequence[Pair]) -> int:
        return self._done([self._copy(block, span, loads=True) for block, span in pairs])

    def begin_save(self, pairs: Sequence[Pair]) -> int:
        return self._done([self._copy(block, span, loads=False) for block, span in pairs])

    def ended(self, copy: int) -> list[bytes] | None:
        return self._digests.pop(copy)

    def close(self) -> None: ...

    def _copy(self, block: int, span: memoryview, *, loads: bool) -> bytes:
        """The digest of the block: taken piece by piece, as long as it is in the cache."""
        sums, first = [], 0
        for parts in self._pool.unit_parts(block):
            state = xxhash.xxh3_128()
            for part in parts:
                for start in range(0, len(part), PIECE_BYTES):
                    held = part[start : start + PIECE_BYTES]
                    outside = span[first : first + len(held)]
                    target, source = (held, outside) if loads else (outside, held)
                    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))
                    state.update(held)
                    first += len(held)
            sums.append(state.digest())
        return digest_of_sums(sums)

    def _done(self, digests: list[bytes]) -> int:
        self._copies += 1
        self._digests[self._copies] = digests
        return self._copies


class NoLock:
    """Memory that is fit as it is."""

    def ready(self) -> bool:
        return True

    def close(self) -> None: ...
