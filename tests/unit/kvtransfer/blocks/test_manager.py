"""Guards block accounting: no order of calls leaks a block, allocates one twice, or frees one that is still held."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, multiple, rule

from baton.kvtransfer.blocks.manager import BlockManager, BlockUsage, OutOfBlocks
from baton.node.errors import InvariantBroken, Overloaded

A, B, C = (bytes([n]) * 32 for n in (1, 2, 3))


def sequence(manager: BlockManager, *names: bytes) -> list[int]:
    """Blocks of one sequence, published under `names`."""
    blocks = manager.allocate(len(names))
    for block, name in zip(blocks, names, strict=True):
        assert manager.publish(block, name)
    return blocks


# ---- allocation and references --------------------------------------------------------------------------------------


def test_allocation_is_all_or_nothing() -> None:
    """Guards against deadlock: two partial allocations would wait for each other's blocks."""
    manager = BlockManager(4)
    manager.allocate(3)
    with pytest.raises(OutOfBlocks) as caught:
        manager.allocate(2)
    assert isinstance(caught.value, Overloaded)
    assert manager.usage() == BlockUsage(free=1, cached=0, owned=3, leased=0, quarantined=0, total=4)
    manager.check()


def test_blocks_are_allocated_once() -> None:
    manager = BlockManager(5)
    assert sorted(manager.allocate(2) + manager.allocate(3)) == [0, 1, 2, 3, 4]
    assert manager.allocate(0) == []


def test_a_negative_count_is_refused() -> None:
    with pytest.raises(ValueError):
        BlockManager(4).allocate(-1)


def test_releasing_what_is_not_held_is_a_bug_and_changes_nothing() -> None:
    manager = BlockManager(3)
    (block,) = manager.allocate(1)
    for wrong in ([block, block], [2], [-1], [3], [block, 2]):
        with pytest.raises(InvariantBroken):
            manager.release(wrong)
        manager.check()
    manager.release([block])
    with pytest.raises(InvariantBroken):
        manager.release([block])
    assert manager.num_available == 3


# ---- prefix cache ---------------------------------------------------------------------------------------------------


def test_a_released_sequence_is_found_again_with_its_references() -> None:
    manager = BlockManager(4)
    blocks = sequence(manager, A, B)
    manager.release(blocks)
    assert manager.usage().cached == 2 and manager.num_available == 4
    assert manager.peek([A, B, C]) == 2
    assert manager.match([A, B, C]) == blocks
    assert manager.match([A]) == blocks[:1]
    manager.release(blocks)
    assert manager.usage().owned == 1
    manager.release(blocks[:1])
    manager.check()


def test_a_match_ends_at_the_first_block_that_is_missing() -> None:
    manager = BlockManager(4)
    sequence(manager, A, C)
    assert manager.peek([A, B, C]) == 1
    assert manager.match([B, C]) == []


def test_tails_are_evicted_before_heads_and_old_sequences_before_new() -> None:
    """Guards the hit rate: a tail without its head can never be matched."""
    manager = BlockManager(4)
    old, new = sequence(manager, A, B), sequence(manager, C)
    manager.release(old[::-1])
    manager.release(new)
    manager.allocate(2)
    assert manager.evictions == 1
    assert [manager.peek([name]) for name in (A, B, C)] == [1, 0, 1]
    manager.allocate(1)
    assert [manager.peek([name]) for name in (A, C)] == [0, 1]
    manager.check()


def test_match_updates_recency_and_peek_does_not() -> None:
    manager = BlockManager(2)
    manager.release(sequence(manager, A))
    manager.release(sequence(manager, B))
    manager.peek([A])
    manager.release(manager.match([A]))
    manager.allocate(1)
    assert [manager.peek([name]) for name in (A, B)] == [1, 0]


def test_the_older_block_keeps_the_name() -> None:
    manager = BlockManager(4)
    (first,) = sequence(manager, A)
    (second,) = manager.allocate(1)
    assert not manager.publish(second, A)
    manager.release([second])
    assert manager.usage().cached == 0
    assert manager.match([A]) == [first]
    manager.check()


def test_publishing_again_is_harmless_and_renaming_is_a_bug() -> None:
    manager = BlockManager(2)
    (block,) = sequence(manager, A)
    assert manager.publish(block, A)
    with pytest.raises(InvariantBroken):
        manager.publish(block, B)
    manager.check()


@pytest.mark.parametrize("block", [1, -1, 2])
def test_publishing_an_unowned_block_is_a_bug(block: int) -> None:
    manager = BlockManager(2)
    manager.allocate(1)
    with pytest.raises(InvariantBroken):
        manager.publish(block, A)
    assert manager.peek([A]) == 0


# ---- leases and quarantine ------------------------------------------------------------------------------------------


def test_a_lease_outlives_its_sequence() -> None:
    """Guards against corrupting a transfer: the sender's sequence may end before the receiver has copied the blocks."""
    manager = BlockManager(2)
    blocks = sequence(manager, A, B)
    manager.lease(blocks, b"t")
    manager.release(blocks)
    assert manager.usage() == BlockUsage(free=0, cached=0, owned=0, leased=2, quarantined=0, total=2)
    with pytest.raises(OutOfBlocks):
        manager.allocate(1)
    assert manager.end_lease(b"t")
    assert manager.usage().cached == 2
    assert not manager.end_lease(b"t")
    manager.check()


def test_the_end_of_a_lease_caches_the_tail_as_first_to_evict() -> None:
    manager = BlockManager(2)
    blocks = sequence(manager, A, B)
    manager.lease(blocks, b"t")
    manager.release(blocks)
    manager.end_lease(b"t")
    manager.allocate(1)
    assert [manager.peek([name]) for name in (A, B)] == [1, 0]


def test_a_leased_block_can_be_matched_and_outlive_the_lease() -> None:
    manager = BlockManager(2)
    blocks = sequence(manager, A)
    manager.lease(blocks, b"t")
    manager.lease(blocks, b"u")
    manager.release(blocks)
    assert manager.match([A]) == blocks
    manager.end_lease(b"t")
    manager.end_lease(b"u")
    assert manager.usage().owned == 1
    manager.release(blocks)
    assert manager.usage().cached == 1
    manager.check()


def test_leasing_twice_under_a_name_or_unowned_blocks_is_a_bug() -> None:
    manager = BlockManager(3)
    blocks = manager.allocate(1)
    manager.lease(blocks, b"t")
    for wrong, key in [(blocks, b"t"), ([2], b"u"), ([*blocks, 2], b"v"), ([-1], b"w"), ([3], b"x")]:
        with pytest.raises(InvariantBroken):
            manager.lease(wrong, key)
        manager.check()
    assert not manager.end_lease(b"v")


def test_quarantined_blocks_are_freed_only_on_request() -> None:
    manager = BlockManager(3)
    blocks = manager.allocate(2)
    manager.quarantine(blocks, b"t")
    assert manager.usage() == BlockUsage(free=1, cached=0, owned=0, leased=0, quarantined=2, total=3)
    with pytest.raises(OutOfBlocks):
        manager.allocate(2)
    with pytest.raises(InvariantBroken):
        manager.release(blocks)
    assert manager.end_quarantine(b"t")
    assert not manager.end_quarantine(b"t")
    assert manager.usage().free == 3
    manager.check()


def test_shared_blocks_are_never_quarantined() -> None:
    """Guards other users of a block, which the end of a quarantine would free."""
    manager = BlockManager(6)
    named = sequence(manager, A)
    shared = sequence(manager, B)
    manager.match([B])
    leased, plain = manager.allocate(1), manager.allocate(1)
    manager.lease(leased, b"l")
    for wrong in (named, shared, leased, [5], [-1], plain + plain, plain + named):
        with pytest.raises(InvariantBroken):
            manager.quarantine(wrong, b"t")
        manager.check()
    manager.quarantine(plain, b"t")
    with pytest.raises(InvariantBroken):
        manager.quarantine([], b"t")


def test_check_detects_damage() -> None:
    """Guards against a check that never fails."""

    def damaged(damage) -> BlockManager:
        manager = BlockManager(6)
        manager.release(sequence(manager, A))
        blocks = sequence(manager, B)
        manager.lease(blocks, b"l")
        manager.quarantine(manager.allocate(1), b"q")
        manager.check()
        damage(manager)
        return manager

    damages = [
        lambda m: m._free.pop(),
        lambda m: m._free.append(m._free[0]),
        lambda m: m._cached.popitem(),
        lambda m: m._refs.__setitem__(1, 0),
        lambda m: m._refs.__setitem__(1, -1),
        lambda m: m._refs.__setitem__(4, 1),
        lambda m: m._hash_of.popitem(),
        lambda m: m._block_of.clear(),
        lambda m: m._lease_count.clear(),
        lambda m: m._leases.clear(),
        lambda m: m._quarantined.clear(),
        lambda m: m._quarantines.clear(),
        lambda m: setattr(m, "_num_owned", 2),
    ]
    for number, damage in enumerate(damages):
        with pytest.raises(InvariantBroken):
            damaged(damage).check()
            pytest.fail(f"damage {number} was not seen")


# ---- any order of calls ---------------------------------------------------------------------------------------------

NAMES = st.sampled_from([bytes([n]) * 32 for n in range(8)])
NUM_BLOCKS = 7


class AnyOrder(RuleBasedStateMachine):
    """The manager against a simple model: one record a block and an explicit eviction order."""

    sequences = Bundle("sequences")
    leases = Bundle("leases")
    quarantines = Bundle("quarantines")

    def __init__(self) -> None:
        super().__init__()
        self.manager = BlockManager(NUM_BLOCKS)
        self.refs: Counter[int] = Counter()
        self.name: dict[int, bytes] = {}
        self.held: dict[bytes, list[int]] = {}  # by lease
        self.away: dict[bytes, list[int]] = {}  # by quarantine
        self.order: list[int] = []  # cached blocks, oldest first
        self.next_key = 0

    # -- the model

    def state(self, block: int) -> str:
        if any(block in blocks for blocks in self.away.values()):
            return "quarantined"
        if self.refs[block]:
            return "owned"
        if any(block in blocks for blocks in self.held.values()):
            return "leased"
        return "cached" if block in self.name else "free"

    def blocks_in(self, *states: str) -> list[int]:
        return [block for block in range(NUM_BLOCKS) if self.state(block) in states]

    def rest(self, blocks: list[int]) -> None:
        """Update the model for blocks whose references were released, in this order."""
        for block in blocks:
            if self.state(block) == "cached" and block not in self.order:
                self.order.append(block)

    def key(self) -> bytes:
        self.next_key += 1
        return self.next_key.to_bytes(16, "little")

    # -- the calls

    @rule(target=sequences, count=st.integers(0, NUM_BLOCKS + 1))
    def allocate(self, count: int) -> object:
        free = self.blocks_in("free")
        if count > len(free) + len(self.order):
            with pytest.raises(OutOfBlocks):
                self.manager.allocate(count)
            return multiple()
        blocks = self.manager.allocate(count)
        evicted = self.order[: max(0, count - len(free))]
        assert len(set(blocks)) == count
        assert set(blocks) <= set(free) | set(evicted)
        del self.order[: len(evicted)]
        for block in evicted:
            del self.name[block]
        self.refs.update(blocks)
        return blocks

    @rule(target=sequences, names=st.lists(NAMES, max_size=4, unique=True))
    def match(self, names: list[bytes]) -> list[int]:
        where = {name: block for block, name in self.name.items()}
        expected = []
        for name in names:
            if name not in where:
                break
            expected.append(where[name])
        assert self.manager.peek(names) == len(expected)
        assert self.manager.match(names) == expected
        self.refs.update(expected)
        self.order = [block for block in self.order if block not in expected]
        return expected

    @rule(blocks=consumes(sequences))
    def release(self, blocks: list[int]) -> None:
        self.manager.release(blocks)
        self.refs.subtract(blocks)
        self.rest(blocks)

    @rule(target=sequences, names=st.lists(NAMES, min_size=1, max_size=3, unique=True))
    def compute(self, names: list[bytes]) -> object:
        """Allocate and publish a whole sequence at once, so that the cache is seldom empty."""
        blocks = self.allocate(len(names))
        if not isinstance(blocks, list):
            return blocks
        for index, name in enumerate(names):
            self.publish(blocks, index, name)
        return blocks

    @rule(blocks=sequences, index=st.integers(0, 3), name=NAMES)
    def publish(self, blocks: list[int], index: int, name: bytes) -> None:
        if index >= len(blocks):
            return
        block = blocks[index]
        if block in self.name and self.name[block] != name:
            with pytest.raises(InvariantBroken):
                self.manager.publish(block, name)
            return
        mine = name not in self.name.values() or self.name.get(block) == name
        assert self.manager.publish(block, name) == mine
        if mine:
            self.name[block] = name

    @rule(target=leases, blocks=sequences)
    def lease(self, blocks: list[int]) -> bytes:
        key = self.key()
        self.manager.lease(blocks, key)
        self.held[key] = list(blocks)
        return key

    @rule(key=leases)
    def end_lease(self, key: bytes) -> None:
        """End a lease without consuming it, so that some are ended twice."""
        assert self.manager.end_lease(key) == (key in self.held)
        self.rest(self.held.pop(key, [])[::-1])

    @rule(target=quarantines, blocks=consumes(sequences))
    def quarantine(self, blocks: list[int]) -> object:
        key = self.key()
        leased = {block for held in self.held.values() for block in held}
        if any(self.refs[block] != 1 or block in self.name or block in leased for block in blocks):
            with pytest.raises(InvariantBroken):
                self.manager.quarantine(blocks, key)
            self.release(blocks)
            return multiple()
        self.manager.quarantine(blocks, key)
        self.refs.subtract(blocks)
        self.away[key] = list(blocks)
        return key

    @rule(key=quarantines)
    def end_quarantine(self, key: bytes) -> None:
        assert self.manager.end_quarantine(key) == (key in self.away)
        self.away.pop(key, None)

    @rule(block=st.integers(-1, NUM_BLOCKS))
    def misuse(self, block: int) -> None:
        """Check that an unowned block can be neither released, published nor quarantined."""
        if block in self.blocks_in("owned"):
            return
        for call in (
            lambda: self.manager.release([block]),
            lambda: self.manager.publish(block, b"\xff" * 32),
            lambda: self.manager.quarantine([block], b"misuse"),
        ):
            with pytest.raises(InvariantBroken):
                call()

    @invariant()
    def agree(self) -> None:
        self.manager.check()
        count = Counter(self.state(block) for block in range(NUM_BLOCKS))
        expected = BlockUsage(*(count[s] for s in ("free", "cached", "owned", "leased", "quarantined")), NUM_BLOCKS)
        assert self.manager.usage() == expected
        assert self.manager.num_available == count["free"] + count["cached"]


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
