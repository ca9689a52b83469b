"""Which worker could use which blocks, and from which tier: a bounded map from block hash to holders. Pure.

Every (holder, tier) has a bit, and each block one integer with the bits of those that hold it. What a thousand workers
hold of a request is then found in one walk along its hashes, with a few operations on integers a block. A worker
reaches its own pool, what it is about to compute, and its host's store.

A holder that leaves loses its bit at once; `sweep` clears the bit out of the blocks, some at a time, and only then may
another get it. When there are too many blocks, the least recently used go, the tail of a chain before its head.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from baton.node.messages.base import Tier
from baton.node.messages.control import TierChange


@dataclass(frozen=True, slots=True)
class Hit:
    """Blocks at a request's beginning that one worker need not compute, by where they come from, in this order."""

    gpu: int = 0
    coming: int = 0
    """Not there yet: requests on their way to that worker will have computed them."""
    ram: int = 0
    disk: int = 0

    @property
    def blocks(self) -> int:
        return self.gpu + self.coming + self.ram + self.disk


class KvIndex:
    """Block hash to holders, bounded. Holders are named by endpoint identity."""

    def __init__(self, max_blocks: int) -> None:
        self.evicted = 0
        """Blocks that were forgotten because there were too many."""
        self._max_blocks = max_blocks
        self._blocks: OrderedDict[bytes, int] = OrderedDict()  # least recently used first
        self._coming: dict[bytes, dict[str, int]] = {}  # how many requests will make it, by worker
        self._bits = _Bits()
        self._store_of: dict[str, str] = {}
        self._reach: dict[int, int] | None = {}  # bit of a store's tier -> mask of its workers; None: to be made anew
        self._to_sweep: list[bytes] = []

    def __len__(self) -> int:
        return len(self._blocks)

    # ---- holders ------------------------------------------------------------------------------------------------

    def reset(self, holder: str) -> None:
        """A holder joins, or starts over: it holds nothing."""
        self._bits.drop(holder)
        self._bits.get(holder, "gpu")  # so that blocks on their way to it count
        self._reach = None

    def leave(self, holder: str) -> None:
        """It is gone, and its blocks with it."""
        self._store_of.pop(holder, None)
        self._bits.drop(holder)
        self._reach = None

    def attach(self, worker: str, store: str) -> None:
        """From now on `worker` loads from `store`; "" is none."""
        if self._store_of.get(worker, "") != store:
            self._store_of[worker] = store
            self._reach = None

    def apply(self, holder: str, changes: Iterable[TierChange]) -> None:
        """Take in what a holder has gained and lost."""
        blocks = self._blocks
        for change in changes:
            mask = 1 << self._bit(holder, change.tier)
            for block_hash in change.stored:
                blocks[block_hash] = blocks.get(block_hash, 0) | mask
                blocks.move_to_end(block_hash)
            for block_hash in change.removed:
                self._clear(block_hash, mask)
        while len(blocks) > self._max_blocks:
            blocks.popitem(last=False)
            self.evicted += 1

    def sweep(self, max_blocks: int) -> None:
        """Clear bits of holders that are gone out of at most so many blocks."""
        if not self._to_sweep and self._bits.begin_sweep():
            self._to_sweep = list(self._blocks)
        for _ in range(min(max_blocks, len(self._to_sweep))):
            self._clear(self._to_sweep.pop(), self._bits.sweeping)
        if not self._to_sweep:
            self._bits.end_sweep()

    # ---- blocks on their way ------------------------------------------------------------------------------------

    def expect(self, worker: str, hashes: Iterable[bytes]) -> None:
        """`worker` was sent a request that will make these blocks; taken back with `unexpect`."""
        for block_hash in hashes:
            makers = self._coming.setdefault(block_hash, {})
            makers[worker] = makers.get(worker, 0) + 1

    def unexpect(self, worker: str, hashes: Iterable[bytes]) -> None:
        """The end of one `expect`: `worker` has reported what it computed, or will not compute it."""
        for block_hash in hashes:
            makers = self._coming[block_hash]
            makers[worker] -= 1
            if not makers[worker]:
                del makers[worker]
                if not makers:
                    del self._coming[block_hash]

    # ---- requests -----------------------------------------------------------------------------------------------

    def match(self, hashes: Sequence[bytes]) -> dict[str, Hit]:
        """What each worker has of the prefix of `hashes`; workers that have nothing are left out."""
        reach = self._current_reach()
        walk = _Walk(self._bits.workers)
        expanded: dict[int, tuple[int, int]] = {0: (0, 0)}
        length = 0
        for block_hash in hashes:
            there = self._blocks.get(block_hash, 0)
            stores = there & self._bits.stores
            if stores not in expanded:
                expanded[stores] = self._expand(stores, reach)
            if not walk.step(there, self._coming_mask(block_hash), *expanded[stores]):
                break
            length += 1
        for block_hash in reversed(hashes[:length]):
            if block_hash in self._blocks:
                self._blocks.move_to_end(block_hash)
        return self._hits(*walk.ends())

    def _hits(
        self, gpu: dict[int, int], coming: dict[int, int], ram: dict[int, int], disk: dict[int, int]
    ) -> dict[str, Hit]:
        """From how far each worker (by its bit) gets with one more source each."""
        if gpu is disk:
            plain = {end: Hit(end) for end in set(gpu.values())}
            return {self._bits.holder_of[bit]: plain[end] for bit, end in gpu.items()}
        made: dict[tuple[int, int, int, int], Hit] = {}
        hits = {}
        for bit, end in disk.items():
            ends = (gpu.get(bit, 0), coming.get(bit, 0), ram.get(bit, 0), end)
            hit = made.get(ends)
            if hit is None:
                hit = made[ends] = Hit(ends[0], ends[1] - ends[0], ends[2] - ends[1], ends[3] - ends[2])
            hits[self._bits.holder_of[bit]] = hit
        return hits

    # ---- steps --------------------------------------------------------------------------------------------------

    def _bit(self, holder: str, tier: Tier) -> int:
        bit, is_new = self._bits.get(holder, tier)
        if is_new:
            self._reach = None
        return bit

    def _clear(self, block_hash: bytes, mask: int) -> None:
        there = self._blocks.get(block_hash)
        if there is None:
            return
        if there & ~mask:
            self._blocks[block_hash] = there & ~mask
        else:
            del self._blocks[block_hash]

    def _coming_mask(self, block_hash: bytes) -> int:
        makers = self._coming.get(block_hash)
        if makers is None:
            return 0
        return sum(1 << bit for worker in makers if (bit := self._bits.find(worker, "gpu")) is not None)

    def _current_reach(self) -> dict[int, int]:
        if self._reach is None:
            reach: dict[int, int] = {}
            for worker, store in self._store_of.items():
                if not store:
                    continue
                worker_bit, _ = self._bits.get(worker, "gpu")
                for tier in ("ram", "disk"):
                    bit = self._bits.find(store, tier)
                    if bit is not None:
                        reach[bit] = reach.get(bit, 0) | 1 << worker_bit
            self._reach = reach
        return self._reach

    def _expand(self, stores: int, reach: dict[int, int]) -> tuple[int, int]:
        """The workers that reach a block in RAM, and on disk, where `stores` has it."""
        ram = disk = 0
        for bit in _positions(stores):
            if self._bits.tier_of[bit] == "ram":
                ram |= reach.get(bit, 0)
            else:
                disk |= reach.get(bit, 0)
        return ram, disk


class _Bits:
    """Gives every (holder, tier) a bit; one that was dropped is given again only after a sweep."""

    def __init__(self) -> None:
        self.workers = 0
        """The gpu bits that are in use."""
        self.stores = 0
        """The same of the other tiers."""
        self.sweeping = 0
        self.holder_of: dict[int, str] = {}
        self.tier_of: dict[int, Tier] = {}
        self._bit_of: dict[tuple[str, Tier], int] = {}
        self._free: list[int] = []
        self._dropped = 0
        self._next = 0

    def find(self, holder: str, tier: Tier) -> int | None:
        return self._bit_of.get((holder, tier))

    def get(self, holder: str, tier: Tier) -> tuple[int, bool]:
        """The bit, and whether it is a new one."""
        bit = self._bit_of.get((holder, tier))
        if bit is not None:
            return bit, False
        if self._free:
            bit = self._free.pop()
        else:
            bit, self._next = self._next, self._next + 1
        self._bit_of[holder, tier] = bit
        self.holder_of[bit], self.tier_of[bit] = holder, tier
        if tier == "gpu":
            self.workers |= 1 << bit
        else:
            self.stores |= 1 << bit
        return bit, True

    def drop(self, holder: str) -> None:
        for tier in ("gpu", "ram", "disk"):
            bit = self._bit_of.pop((holder, tier), None)
            if bit is not None:
                del self.holder_of[bit], self.tier_of[bit]
                self._dropped |= 1 << bit
                self.workers &= ~(1 << bit)
                self.stores &= ~(1 << bit)

    def begin_sweep(self) -> bool:
        """Whether there is anything to sweep."""
        self.sweeping, self._dropped = self._dropped, 0
        return self.sweeping != 0

    def end_sweep(self) -> None:
        self._free += _positions(self.sweeping)
        self.sweeping = 0


class _Walk:
    """How far each worker gets along a chain of blocks, with its pool alone, and with one more source each.

    While no other source has had a block, the four are one.
    """

    def __init__(self, workers: int) -> None:
        self._alive = [workers]  # workers that have all blocks so far: one mask, or one a source
        self._ended: list[list[tuple[int, int]]] = [[]]  # (blocks, workers with exactly so many), for each of them
        self._length = 0

    def step(self, gpu: int, coming: int, ram: int, disk: int) -> bool:
        """The next block is held by these workers; False if no worker has all blocks up to it."""
        if len(self._alive) == 1 and (coming or ram or disk):
            self._alive = self._alive * 4
            self._ended = [[*self._ended[0]] for _ in range(4)]
        self._pass(0, gpu)
        if len(self._alive) == 4:
            self._pass(1, gpu | coming)
            self._pass(2, gpu | coming | ram)
            self._pass(3, gpu | coming | ram | disk)
        self._length += 1
        return self._alive[-1] != 0

    def _pass(self, level: int, held: int) -> None:
        alive = self._alive[level]
        left = alive & held
        if left != alive:
            self._alive[level] = left
            if self._length:
                self._ended[level].append((self._length, alive ^ left))

    def ends(self) -> tuple[dict[int, int], dict[int, int], dict[int, int], dict[int, int]]:
        """By a worker's bit, how many blocks it has; without workers that have none. One for each source added."""
        if self._length:
            for ended, alive in zip(self._ended, self._alive, strict=True):
                ended.append((self._length, alive))
        made = [_by_bit(ended) for ended in self._ended]
        gpu, coming, ram, disk = made if len(made) == 4 else made * 4
        return gpu, coming, ram, disk


def _by_bit(groups: Iterable[tuple[int, int]]) -> dict[int, int]:
    return {bit: blocks for blocks, mask in groups for bit in _positions(mask)}


def _positions(mask: int) -> list[int]:
    """The numbers of the bits that are set: by the lowest while there are few, else by reading all digits."""
    if mask.bit_count() * 16 > mask.bit_length():
        digits = bin(mask)
        return [place for place, digit in enumerate(reversed(digits)) if digit == "1"]
    found = []
    while mask:
        lowest = mask & -mask
        found.append(lowest.bit_length() - 1)
        mask ^= lowest
    return found
