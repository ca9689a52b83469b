"""The owner of each block of one pool: references, prefix cache, leases, quarantine. No torch, no bytes, no clock.

    free ── allocate ──► owned ── release ──► free               (its content has no name)
                           │  └── release ──► cached ── match ──► owned      (published; evicted oldest first)
                           ├── lease ────── held under a name besides, or instead of, references
                           └── quarantine ► quarantined ── end_quarantine ──► free

A block is counted once, as the first of: quarantined, owned (referenced), leased (only held by leases), cached, free.
`check()` proves that the five sum up to the pool. One thread makes all calls.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from baton.kvtransfer.blocks.events import BlockJournal, NullJournal
from baton.node.errors import InvariantBroken, Overloaded


class OutOfBlocks(Overloaded):
    """The pool has fewer free and cached blocks than were requested."""


@dataclass(frozen=True, slots=True)
class BlockUsage:
    """How many blocks are in each state; the five sum up to `total`."""

    free: int
    cached: int
    owned: int
    leased: int
    quarantined: int
    total: int


class BlockManager:
    """The owners of the blocks of one pool. Every call either happens whole or raises and changes nothing.

    `journal` gets each hash that can be matched from now on, or no longer.
    """

    def __init__(self, num_blocks: int, journal: BlockJournal | None = None) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool of {num_blocks} blocks")
        self.num_blocks = num_blocks
        self.evictions = 0
        """Cached blocks that `allocate` took for something else."""
        self._journal = journal or NullJournal()
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack; the first allocations are 0, 1, 2 ...
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._refs = [0] * num_blocks
        self._num_owned = 0  # blocks with at least one reference
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._leases: dict[bytes, tuple[int, ...]] = {}
        self._lease_count: Counter[int] = Counter()  # leases on each block, no zeros kept
        self._quarantines: dict[bytes, tuple[int, ...]] = {}
        self._quarantined: set[int] = set()

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out now."""
        return len(self._free) + len(self._cached)

    def usage(self) -> BlockUsage:
        free, cached, quarantined = len(self._free), len(self._cached), len(self._quarantined)
        leased = self.num_blocks - free - cached - quarantined - self._num_owned
        return BlockUsage(free, cached, self._num_owned, leased, quarantined, self.num_blocks)

    # ---- prefix cache -------------------------------------------------------------------------------------------

    def peek(self, hashes: Sequence[bytes]) -> int:
        """How many blocks `match` would return; takes no reference and leaves the order of eviction alone."""
        for index, block_hash in enumerate(hashes):
            if block_hash not in self._block_of:
                return index
        return len(hashes)

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks of the longest prefix of `hashes` that is here, with one reference taken on each."""
        blocks = [self._block_of[block_hash] for block_hash in hashes[: self.peek(hashes)]]
        for block in blocks:
            self._cached.pop(block, None)
            self._refer(block)
        return blocks

    def publish(self, block: int, block_hash: bytes) -> bool:
        """The content of an owned block is final and called `block_hash`: others may share it from now on.

        False if an older block has that name already: that one stays published, this one stays anonymous. Raises
        InvariantBroken if the block is not owned or has another name.
        """
        if not self._in_pool(block) or self._refs[block] == 0:
            raise InvariantBroken(f"block {block} is published, but not owned")
        name = self._hash_of.get(block)
        if name is not None and name != block_hash:
            raise InvariantBroken(f"block {block} is published twice, as {name.hex()[:16]} and {block_hash.hex()[:16]}")
        if self._block_of.setdefault(block_hash, block) != block:
            return False
        if name is None:
            self._hash_of[block] = block_hash
            self._journal.stored(block_hash)
        return True

    # ---- references ---------------------------------------------------------------------------------------------

    def allocate(self, num_blocks: int) -> list[int]:
        """`num_blocks` blocks with one reference each and unknown content, free ones first; all or none.

        Raises OutOfBlocks if there are too few.
        """
        if num_blocks < 0:
            raise ValueError(f"{num_blocks} blocks cannot be allocated")
        if num_blocks > self.num_available:
            raise OutOfBlocks(f"{num_blocks} blocks requested, {self.num_available} of {self.num_blocks} available")
        blocks = []
        for _ in range(num_blocks):
            if self._free:
                block = self._free.pop()
            else:
                block = self._evict_oldest()
                self.evictions += 1
            self._refer(block)
            blocks.append(block)
        return blocks

    def release(self, blocks: Sequence[int]) -> None:
        """Drop one reference of each, in this order; give the blocks of a sequence tail first.

        What is not held any more becomes cached if it is published, else free. What is released first is evicted
        first: a head without its tail is a useful prefix, a tail without its head is none. Raises InvariantBroken if a
        block has fewer references than are dropped.
        """
        for block, times in Counter(blocks).items():
            if not self._in_pool(block) or self._refs[block] < times:
                raise InvariantBroken(f"block {block} is released {times} times, but has fewer references")
        for block in blocks:
            self._refs[block] -= 1
            self._num_owned -= self._refs[block] == 0
            self._settle(block)

    # ---- transfers ----------------------------------------------------------------------------------------------

    def lease(self, blocks: Sequence[int], key: bytes) -> None:
        """Hold `blocks` (each already owned or leased) under a name until `end_lease(key)`; give a sequence head first.

        Raises InvariantBroken if the name is in use, or if a block is not held: it might have been reused.
        """
        if key in self._leases:
            raise InvariantBroken(f"lease {key.hex()} is taken twice")
        for block in blocks:
            if not self._in_pool(block) or not (self._refs[block] or self._lease_count[block]):
                raise InvariantBroken(f"block {block} is leased, but not held")
        self._leases[key] = tuple(blocks)
        self._lease_count.update(blocks)

    def end_lease(self, key: bytes) -> bool:
        """Let go of a lease, tail first; False if there is none of that name (it has ended before)."""
        blocks = self._leases.pop(key, None)
        if blocks is None:
            return False
        for block in reversed(blocks):
            self._lease_count[block] -= 1
            if self._lease_count[block] == 0:
                del self._lease_count[block]
            self._settle(block)
        return True

    def quarantine(self, blocks: Sequence[int], key: bytes) -> None:
        """Take owned blocks out of use, because an aborted transfer may still write into them.

        The references pass from the caller to the quarantine. Raises InvariantBroken unless each block has exactly one
        reference, no lease and no name, and `key` is new.
        """
        if key in self._quarantines:
            raise InvariantBroken(f"quarantine {key.hex()} is begun twice")
        for block, times in Counter(blocks).items():
            alone = self._in_pool(block) and times == self._refs[block] == 1
            if not alone or self._lease_count[block] or block in self._hash_of:
                raise InvariantBroken(f"block {block} cannot be quarantined: it is shared, leased, named or not owned")
        for block in blocks:
            self._refs[block] = 0
        self._num_owned -= len(blocks)
        self._quarantines[key] = tuple(blocks)
        self._quarantined.update(blocks)

    def end_quarantine(self, key: bytes) -> bool:
        """Nothing can write into these blocks any more: they are free. False if there is no quarantine of that name."""
        blocks = self._quarantines.pop(key, None)
        if blocks is None:
            return False
        self._quarantined.difference_update(blocks)
        self._free.extend(reversed(blocks))
        return True

    # ---- proof --------------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Recompute every block's state from scratch; raises InvariantBroken where a count or an index disagrees."""
        leases = Counter(block for blocks in self._leases.values() for block in blocks)
        _require(leases == self._lease_count, "the leases on each block are miscounted")
        quarantined = [block for blocks in self._quarantines.values() for block in blocks]
        _require(sorted(quarantined) == sorted(self._quarantined), "the blocks in quarantine disagree")
        names = {block: block_hash for block_hash, block in self._block_of.items()}
        _require(names == self._hash_of and len(names) == len(self._block_of), "names and blocks do not pair up")
        found: dict[str, list[int]] = {state: [] for state in ("free", "cached", "owned", "leased", "quarantined")}
        for block in range(self.num_blocks):
            found[self._state(block)].append(block)
        _require(found["free"] == sorted(self._free), "the free blocks disagree")
        _require(found["cached"] == sorted(self._cached), "the cached blocks disagree")
        count = BlockUsage(**{state: len(blocks) for state, blocks in found.items()}, total=self.num_blocks)
        _require(count == self.usage(), f"{count} is counted as {self.usage()}")

    def _state(self, block: int) -> str:
        refs, leases, named = self._refs[block], self._lease_count[block], block in self._hash_of
        _require(refs >= 0 and leases >= 0, f"block {block} has {refs} references and {leases} leases")
        if block in self._quarantined:
            _require(not (refs or leases or named), f"block {block} is quarantined, but still in use")
            return "quarantined"
        if refs:
            return "owned"
        if leases:
            return "leased"
        return "cached" if named else "free"

    # ---- steps --------------------------------------------------------------------------------------------------

    def _in_pool(self, block: int) -> bool:
        return 0 <= block < self.num_blocks

    def _refer(self, block: int) -> None:
        self._num_owned += self._refs[block] == 0
        self._refs[block] += 1

    def _settle(self, block: int) -> None:
        """Put a block to rest if the reference or lease that has just ended was the last."""
        if self._refs[block] or self._lease_count[block]:
            return
        if block in self._hash_of:
            self._cached[block] = None
        else:
            self._free.append(block)

    def _evict_oldest(self) -> int:
        block, _ = self._cached.popitem(last=False)
        block_hash = self._hash_of.pop(block)
        del self._block_of[block_hash]
        self._journal.removed(block_hash)
        return block


def _require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise InvariantBroken(otherwise)
