"""The contract of a disk tier (kvtransfer/store/disk/base.py), tested for every kind."""

from __future__ import annotations

import threading

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from baton.kvtransfer.store.disk.base import Eviction, Miss, Refusal
from baton.kvtransfer.store.disk.tier import RecordTier
from baton.tests.unit.kvtransfer.store.disk.tier_checks import (
    BLOCK_BYTES,
    Changes,
    Opener,
    block,
    digest,
    fill,
    key,
    put,
    read,
)


def test_what_was_put_is_got_bit_for_bit(open_tier: Opener) -> None:
    """Guards against another block's bytes, or bytes at an offset."""
    tier = open_tier(8)
    fill(tier, range(8))
    assert all(read(tier, number) for number in reversed(range(8)))
    stats = tier.stats()
    assert (stats.queries, stats.hits, stats.stored, stats.blocks) == (8, 8, 8, 8)
    assert stats.read_bytes == stats.written_bytes == 8 * BLOCK_BYTES
    assert stats.read_s >= 0 and stats.write_s >= 0


def test_an_unknown_key_is_a_counted_miss(open_tier: Opener) -> None:
    """Guards against an exception, or a hit, for a key that was never put."""
    tier = open_tier(4)
    fill(tier, range(2))
    assert not read(tier, 7)
    assert tier.contains([key(0), key(7), key(1)]) == [True, False, True]
    stats = tier.stats()
    assert (stats.queries, stats.hits, stats.misses[Miss.ABSENT], sum(stats.misses.values())) == (1, 0, 1, 1)


def test_a_buffer_that_is_not_page_aligned_serves_too(open_tier: Opener) -> None:
    """Guards direct I/O against assuming whose memory it gets."""
    tier = open_tier(4)
    for offset in (0, 1, 8, 512):
        source = bytearray(BLOCK_BYTES + offset)
        source[offset:] = block(offset)
        assert tier.put(key(offset), memoryview(source)[offset:], digest(offset))
        into = bytearray(BLOCK_BYTES + offset)
        assert tier.get(key(offset), memoryview(into)[offset:]) == digest(offset)
        assert into[offset:] == block(offset)


def test_the_least_recently_used_goes_first(open_tier: Opener) -> None:
    """Guards the order of eviction: a hit and a second put are uses, `contains` is none."""
    changes = Changes()
    tier = open_tier(4, on_change=changes)
    capacity = tier.stats().capacity_blocks
    fill(tier, range(capacity))
    assert read(tier, 0)
    assert put(tier, 1)
    assert tier.contains([key(2)]) == [True]
    fill(tier, [capacity, capacity + 1])
    assert tier.keys() == [key(n) for n in [*range(4, capacity), 0, 1, capacity, capacity + 1]]
    assert tier.stats().evictions[Eviction.QUOTA] == 2
    assert changes.held() == set(tier.keys())


def test_capacity_is_never_exceeded(open_tier: Opener) -> None:
    """Guards the quota over three turnovers."""
    tier = open_tier(4)
    capacity = tier.stats().capacity_blocks
    assert capacity >= 4
    for number in range(3 * capacity):
        fill(tier, [number])
        assert tier.stats().blocks <= capacity
    assert tier.keys() == [key(n) for n in range(2 * capacity, 3 * capacity)]
    assert read(tier, 3 * capacity - 1) and not read(tier, 0)


def test_dropped_is_gone_and_may_come_again(open_tier: Opener) -> None:
    """Guards against a dropped block that is served, and a place that is never used again."""
    changes = Changes()
    tier = open_tier(4, on_change=changes)
    fill(tier, range(4))
    tier.drop([key(1), key(2), key(1), key(99)])
    assert tier.contains([key(n) for n in range(4)]) == [True, False, False, True]
    assert not read(tier, 1)
    fill(tier, [1])
    assert read(tier, 1)
    assert tier.stats().evictions[Eviction.DROPPED] == 2
    assert changes.held() == {key(n) for n in (0, 1, 3)}


def test_wrong_lengths_are_a_bug_of_the_caller(open_tier: Opener) -> None:
    """Guards against a block of another size being kept under a good name."""
    tier = open_tier(4)
    with pytest.raises(ValueError, match="a key has 32 bytes, not 31"):
        tier.put(key(0)[:31], block(0), digest(0))
    with pytest.raises(ValueError, match="a key has 32 bytes, not 0"):
        tier.contains([b""])
    with pytest.raises(ValueError, match="for a block of"):
        tier.put(key(0), block(0)[:-1], digest(0))
    with pytest.raises(ValueError, match="a digest has 16 bytes, not 8"):
        tier.put(key(0), block(0), digest(0)[:8])
    with pytest.raises(ValueError, match="for a block of"):
        tier.get(key(0), memoryview(bytearray(BLOCK_BYTES + 1)))
    assert tier.stats().queries == tier.stats().blocks == 0


def test_closed_it_misses_and_refuses(open_tier: Opener) -> None:
    """Guards the end of a process: a thread that comes late must not crash, nor read unmapped memory."""
    tier = open_tier(4)
    fill(tier, [0])
    tier.close()
    tier.close()
    assert not read(tier, 0)
    assert not put(tier, 1)
    tier.drop([key(0)])
    assert tier.contains([key(0)]) == [False] and tier.keys() == []
    stats = tier.stats()
    assert (stats.misses[Miss.IO_ERROR], stats.refusals[Refusal.CLOSED], stats.capacity_blocks) == (1, 1, 0)


def test_threads_read_write_and_drop_at_once(open_tier: Opener) -> None:
    """Guards against torn blocks, lost counts and deadlocks: every hit is verified, and the sums agree in the end."""
    changes = Changes()
    tier = open_tier(6, on_change=changes)
    keys = tier.stats().capacity_blocks + 6
    failures: list[BaseException] = []
    hits = [0, 0, 0, 0]

    def work(index: int) -> None:
        try:
            for turn in range(150):
                number = (turn * (2 * index + 3) + index) % keys
                if index % 2:
                    hits[index] += read(tier, number)
                else:
                    put(tier, number)
                    hits[index] += read(tier, number)
                if index == 3 and turn % 5 == 0:
                    tier.drop([key(number)])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert failures == []
    stats = tier.stats()
    assert (stats.queries, stats.hits) == (600, sum(hits))
    assert stats.misses[Miss.ABSENT] == stats.queries - stats.hits, stats.misses
    assert changes.held() == set(tier.keys())
    assert stats.stored - sum(stats.evictions.values()) == stats.blocks <= stats.capacity_blocks


def test_any_order_of_calls_agrees_with_a_dictionary(open_tier: Opener) -> None:
    """Guards the whole: what is held, its order and its bytes, against an ordered dictionary, in random orders."""
    opened: list[RecordTier] = []

    class Against(RuleBasedStateMachine):
        @initialize()
        def begin(self) -> None:
            while opened:
                opened.pop().close()
            self.changes = Changes()
            self.tier = open_tier(4, on_change=self.changes)
            opened.append(self.tier)
            self.capacity = self.tier.stats().capacity_blocks
            self.model: dict[bytes, None] = {}  # least recently used first

        numbers = st.integers(0, 12)

        def use(self, number: int) -> None:
            self.model.pop(key(number), None)
            self.model[key(number)] = None

        @rule(number=numbers)
        def put(self, number: int) -> None:
            assert put(self.tier, number)
            self.use(number)
            if len(self.model) > self.capacity:
                del self.model[next(iter(self.model))]

        @rule(number=numbers)
        def get(self, number: int) -> None:
            assert read(self.tier, number) is (key(number) in self.model)
            if key(number) in self.model:
                self.use(number)

        @rule(numbers=st.lists(numbers, max_size=3))
        def drop(self, numbers: list[int]) -> None:
            self.tier.drop([key(number) for number in numbers])
            for number in numbers:
                self.model.pop(key(number), None)

        @invariant()
        def agrees(self) -> None:
            assert self.tier.keys() == list(self.model)
            assert self.changes.held() == set(self.model)
            stats = self.tier.stats()
            assert stats.hits + sum(stats.misses.values()) == stats.queries
            assert stats.stored - sum(stats.evictions.values()) == stats.blocks

    run_state_machine_as_test(
        Against,
        settings=settings(
            max_examples=20, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )
