"""kvtransfer.store.arena_index: no order of puts, reads, deaths and evictions uses a slot twice, or leaks one."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from baton.kvtransfer.blocks.events import NullJournal
from baton.kvtransfer.store.arena_index import MAX_NAMESPACES, ArenaIndex, Entry, Holder, Key
from baton.node.errors import SettingsError

SMALL, OTHER, LARGE = b"s" * 32, b"o" * 32, b"l" * 32
DIGEST = b"d" * 16


def _key(number: int, namespace: bytes = SMALL) -> Key:
    return Key(namespace, bytes([number]) * 32)


def _put(index: ArenaIndex, *numbers: int, namespace: bytes = SMALL) -> list[Entry | None]:
    holder, entries = Holder("writer", 0), []
    for key in (_key(number, namespace) for number in numbers):
        entries.append(index.reserve(key, holder))
        assert entries[-1] is None or index.commit(key, holder, DIGEST)
    index.release(holder)
    return entries


class Gone:
    """A journal that records removed blocks."""

    def __init__(self) -> None:
        self.names: list[bytes] = []

    def stored(self, block_hash: bytes) -> None: ...

    def removed(self, block_hash: bytes) -> None:
        self.names.append(block_hash)


def _arena(regions: int = 1, slots: int = 4, gone: Gone | None = None) -> ArenaIndex:
    index = ArenaIndex(regions, slots * 10, gone or NullJournal())
    index.register(SMALL, 10)
    return index


def _here(index: ArenaIndex, numbers: range) -> list[int]:
    return [number for number in numbers if index.find(_key(number)) is not None]


def test_the_oldest_block_is_evicted_first_and_a_tail_before_its_head() -> None:
    """Guards LRU: a used chain keeps its head longest, since a tail without its head is useless."""
    gone = Gone()
    index = _arena(gone=gone)
    _put(index, 0, 1, 2, 3)
    index.touch([_key(0), _key(1)])
    _put(index, 4, 5)
    assert _here(index, range(6)) == [0, 1, 4, 5]
    _put(index, 6)
    assert _here(index, range(7)) == [0, 4, 5, 6]
    assert gone.names == [_key(number).hash for number in (2, 3, 1)] and index.evictions["room"] == 3


def test_blocks_in_use_are_never_evicted() -> None:
    """Guards the lease between lookup and copy: an arena full of held blocks accepts no puts."""
    index = _arena()
    _put(index, 0, 1)
    reader, writer = Holder("a", 1), Holder("b", 1)
    assert index.acquire(_key(0), reader) and index.acquire(_key(1), reader)
    assert index.reserve(_key(2), writer) and index.reserve(_key(3), writer)
    assert _put(index, 4) == [None]
    index.release(reader)
    assert _put(index, 4) != [None]
    assert _here(index, range(5)) == [1, 4]  # 2 and 3 are being written and are not found
    index.check()


def test_slots_of_a_dead_owner_are_freed() -> None:
    """Guards against slots and reads that a killed worker never ends; those of others stay."""
    index = _arena()
    _put(index, 0)
    assert index.acquire(_key(0), Holder("dead", 1)) and index.reserve(_key(1), Holder("dead", 2))
    assert index.acquire(_key(0), Holder("alive", 1))
    assert index.release_owner("dead") == 2 and index.num_holders == 1
    assert not index.commit(_key(1), Holder("dead", 2), DIGEST)
    assert len([e for e in _put(index, 2, 3, 4) if e]) == 3
    assert _here(index, range(5)) == [0, 2, 3, 4]
    index.check()


def test_a_damaged_block_is_removed_but_its_slot_waits_for_readers() -> None:
    """Guards other readers of a damaged block: its slot is not reused while they read it."""
    index = _arena(slots=1)
    _put(index, 0)
    entry = index.acquire(_key(0), Holder("a", 1))
    index.drop(_key(0))
    assert index.find(_key(0)) is None and _put(index, 1) == [None]
    index.release(Holder("a", 1))
    (again,) = _put(index, 1)
    assert entry and again and again.offset == entry.offset
    index.check()


def test_only_one_writes_a_block() -> None:
    """Guards against two workers that put the same block: one slot, and one commit."""
    index = _arena()
    assert index.reserve(_key(0), Holder("a", 1)) and index.reserve(_key(0), Holder("b", 1)) is None
    assert index.acquire(_key(0), Holder("b", 2)) is None
    assert not index.commit(_key(0), Holder("b", 1), DIGEST)
    assert index.commit(_key(0), Holder("a", 1), DIGEST) and not index.commit(_key(0), Holder("a", 1), DIGEST)


def test_namespaces_share_room_but_no_blocks() -> None:
    """Guards against hits across namespaces, and the sharing of an arena by two ranks of a model."""
    index = _arena()
    index.register(OTHER, 10)
    _put(index, 0)
    assert index.find(_key(0, OTHER)) is None
    _put(index, 0, 1, 2, 3, namespace=OTHER)
    assert index.find(_key(0)) is None and index.find(_key(0, OTHER)) is not None


def test_another_size_of_block_gets_its_share_of_regions() -> None:
    """Guards a second model on a host whose arena is full, and the first one against losing all its blocks."""
    index = _arena(regions=4, slots=4)
    _put(index, *range(16))
    index.register(LARGE, 20)
    _put(index, *range(6), namespace=LARGE)
    large = [number for number in range(6) if index.find(_key(number, LARGE))]
    assert large == [2, 3, 4, 5]  # two regions of two
    assert len(_here(index, range(16))) == 8 and index.evictions["region"] == 8
    index.check()


def test_a_holder_holds_a_block_once() -> None:
    """Guards the store's memory against a worker that asks for one block for ever."""
    index, holder = _arena(), Holder("reader", 1)
    _put(index, 0)
    for _ in range(3):
        entry = index.acquire(_key(0), holder)
        assert entry is not None and entry.readers == 1
    index.check()
    index.release(holder)
    assert entry.readers == 0 and index.num_holders == 0


def test_registering_refuses_invalid_layouts() -> None:
    """Guards the server against a worker of another layout in the same namespace, and a flood of namespaces."""
    index = _arena()
    index.register(SMALL, 10)
    with pytest.raises(SettingsError, match="in this namespace"):
        index.register(SMALL, 20)
    with pytest.raises(SettingsError, match="do not fit"):
        index.register(LARGE, 41)
    for number in range(MAX_NAMESPACES - 1):
        index.register(bytes([number]) * 32, 10)
    with pytest.raises(SettingsError, match="namespaces"):
        index.register(LARGE, 10)


class Orders(RuleBasedStateMachine):
    """Any order of calls, against a model of the bytes that each slot was last committed with."""

    @initialize(regions=st.integers(1, 4), slots=st.integers(1, 3))
    def start(self, regions: int, slots: int) -> None:
        self.index = ArenaIndex(regions, slots * 20, NullJournal())
        self.index.register(SMALL, 10)
        self.index.register(OTHER, 10)
        self.index.register(LARGE, 20)
        self.memory: dict[int, tuple[Key, int]] = {}  # by offset: the content, and the write that put it there
        self.writes = 0
        self.reads: dict[Holder, list[tuple[Entry, tuple[Key, int]]]] = {}

    keys = st.builds(_key, st.integers(0, 7), st.sampled_from((SMALL, OTHER, LARGE)))
    holders = st.builds(Holder, st.sampled_from("ab"), st.integers(0, 2))

    @rule(key=keys, holder=holders, commits=st.booleans())
    def put(self, key: Key, holder: Holder, commits: bool) -> None:
        entry = self.index.reserve(key, holder)
        if entry is None:
            return
        self.writes += 1
        for byte in range(entry.offset, entry.offset + entry.size_bytes):
            self.memory[byte] = (key, self.writes)
        if commits:
            assert self.index.commit(key, holder, DIGEST)

    @rule(key=keys, holder=holders)
    def read(self, key: Key, holder: Holder) -> None:
        entry = self.index.acquire(key, holder)
        if entry is not None:
            content = self.memory[entry.offset]
            assert content[0] == key
            self.reads.setdefault(holder, []).append((entry, content))

    @rule(holder=holders)
    def release(self, holder: Holder) -> None:
        self.index.release(holder)
        self.reads.pop(holder, None)

    @rule(owner=st.sampled_from("ab"))
    def die(self, owner: str) -> None:
        self.index.release_owner(owner)
        self.reads = {holder: reads for holder, reads in self.reads.items() if holder.owner != owner}

    @rule(key=keys)
    def drop(self, key: Key) -> None:
        self.index.drop(key)

    @rule(keys=st.lists(keys, max_size=4))
    def touch(self, keys: list[Key]) -> None:
        self.index.touch(keys)

    @invariant()
    def holds(self) -> None:
        """Check that no slot is written while it is read, and that every slot is accounted for."""
        if not hasattr(self, "index"):
            return
        self.index.check()
        for reads in self.reads.values():
            for entry, content in reads:
                assert {self.memory[entry.offset + at] for at in range(entry.size_bytes)} == {content}


Orders.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestOrders = Orders.TestCase
