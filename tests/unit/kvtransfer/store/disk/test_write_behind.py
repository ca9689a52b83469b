"""Guards the queue before the disk: its bound, its counts, and that each accepted block is let go exactly once."""

from __future__ import annotations

import threading
from collections import Counter

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from baton.kvtransfer.blocks.checksum import sum64, xxh3
from baton.kvtransfer.store.disk.records import Block
from baton.kvtransfer.store.disk.tier import RecordTier
from baton.kvtransfer.store.disk.write_behind import Drop, WriteBehind, WriteBehindThread
from baton.testing.memory_records import memory_tier
from baton.tests.unit.kvtransfer.store.disk.tier_checks import BLOCK_BYTES, block, key


def new_tier(blocks: int = 8) -> RecordTier:
    return memory_tier(blocks * BLOCK_BYTES, BLOCK_BYTES)


def offered(number: int) -> Block:
    return Block(block(number), xxh3(block(number)))


def written(tier: RecordTier, number: int) -> bool:
    """Whether the tier gives the block back, with the digest that came with it."""
    into = memoryview(bytearray(BLOCK_BYTES))
    digest = tier.get(key(number), into)
    return digest == xxh3(into) and into == block(number)


class Offers:
    """Offers blocks by number, and counts how often each was let go."""

    def __init__(self, queue: WriteBehind, tier: RecordTier) -> None:
        self.queue = queue
        self.tier = tier
        self.done: Counter[int] = Counter()

    def __call__(self, number: int, data: memoryview | None = None) -> bool:
        made = offered(number) if data is None else Block(data, offered(number).digest)
        return self.queue.offer(self.tier, key(number), made, xxh3, lambda: self.done.update([number]))


def test_blocks_are_written_in_their_order_and_let_go() -> None:
    """Guards against a lost block, and a view that is held for ever."""
    queue, tier = WriteBehind(8 * BLOCK_BYTES), new_tier()
    offer = Offers(queue, tier)
    assert all(offer(number) for number in range(3))
    assert (queue.stats().depth_blocks, queue.stats().depth_bytes) == (3, 3 * BLOCK_BYTES)
    assert queue.step() and tier.keys() == [key(0)] and offer.done == {0: 1}
    assert queue.step() and queue.step() and not queue.step()
    assert tier.keys() == [key(0), key(1), key(2)] and offer.done == {0: 1, 1: 1, 2: 1}
    stats = queue.stats()
    assert (stats.depth_blocks, stats.depth_bytes, stats.written, sum(stats.drops.values())) == (0, 0, 3, 0)


def test_a_full_queue_drops_the_newest() -> None:
    """Guards the bound in bytes: a slow disk must not take the host's memory, nor its arena."""
    queue, tier = WriteBehind(2 * BLOCK_BYTES + 1), new_tier()
    offer = Offers(queue, tier)
    assert [offer(number) for number in range(4)] == [True, True, False, False]
    assert queue.stats().drops[Drop.QUEUE_FULL] == 2
    assert queue.step() and offer(2)
    assert queue.step() and queue.step()
    assert tier.keys() == [key(0), key(1), key(2)] and sorted(offer.done) == [0, 1, 2]


def test_a_block_waits_once() -> None:
    """Guards against writing a popular block again and again while it waits."""
    queue, tier = WriteBehind(8 * BLOCK_BYTES), new_tier()
    offer = Offers(queue, tier)
    assert offer(5) and not offer(5)
    assert queue.stats().drops[Drop.QUEUED] == 1
    assert queue.step() and offer(5)


def test_a_spoiled_block_is_not_written() -> None:
    """Guards against a block that changed in memory and would be served later with a digest that fits."""
    queue, tier = WriteBehind(8 * BLOCK_BYTES), new_tier()
    offer = Offers(queue, tier)
    assert offer(0, block(1))
    assert queue.step()
    assert not written(tier, 0) and offer.done == {0: 1}
    assert queue.stats().drops[Drop.SPOILED] == 1 and queue.stats().written == 0


def test_a_block_is_checked_the_way_its_digest_was_made() -> None:
    """Guards the disk of workers with a GPU: their digests are no xxh3, and all would be spoiled."""
    queue, tier = WriteBehind(8 * BLOCK_BYTES), new_tier()
    for number in range(2):
        made = Block(block(0), sum64(block(number)))
        assert queue.offer(tier, key(number), made, sum64, lambda: None) and queue.step()
    assert tier.keys() == [key(0)] and queue.stats().drops[Drop.SPOILED] == 1


def test_what_the_tier_refuses_is_counted() -> None:
    """Guards against a disk that fails in silence."""
    queue, tier = WriteBehind(8 * BLOCK_BYTES), new_tier()
    offer = Offers(queue, tier)
    tier.close()
    assert offer(0) and queue.step()
    assert queue.stats().drops[Drop.REFUSED] == 1 and offer.done == {0: 1}


def test_closing_writes_what_waits() -> None:
    """Guards the thread: what was accepted in time is on the disk after an end in order."""
    queue, tier = WriteBehind(8 * BLOCK_BYTES), new_tier()
    offer = Offers(queue, tier)
    thread = WriteBehindThread(queue)
    assert all(offer(number) for number in range(8))
    assert thread.close(within_s=60.0)
    assert set(tier.keys()) == {key(number) for number in range(8)}
    assert offer.done == dict.fromkeys(range(8), 1)
    assert not offer(9) and queue.stats().drops[Drop.CLOSED] == 1


def test_closing_at_once_lets_everything_go() -> None:
    """Guards against an end that hangs on a slow disk, and against views that are never let go."""
    in_write, go_on = threading.Event(), threading.Event()

    class Slow:
        """A tier whose disk takes its time."""

        name, block_bytes = "slow", BLOCK_BYTES

        def put(self, slow_key: bytes, data: memoryview, digest: bytes) -> bool:
            in_write.set()
            return go_on.wait(60)

    slow = WriteBehind(8 * BLOCK_BYTES)
    let_go: list[int] = []
    for number in range(3):
        assert slow.offer(Slow(), key(number), offered(number), xxh3, lambda: let_go.append(1))  # type: ignore[arg-type]
    thread = WriteBehindThread(slow)
    assert in_write.wait(60)
    assert not thread.close(within_s=0.0)
    assert slow.stats().depth_blocks == 3
    go_on.set()
    assert thread.close(within_s=60.0)
    stats = slow.stats()
    assert (len(let_go), stats.depth_blocks, stats.depth_bytes) == (3, 0, 0)
    assert stats.written + stats.drops[Drop.CLOSED] == 3


def test_any_order_of_calls_keeps_the_sums() -> None:
    """Guards the books: depth, bound and counts agree with a list, and nothing is let go twice."""

    class Against(RuleBasedStateMachine):
        def __init__(self) -> None:
            super().__init__()
            self.tier = new_tier(4)
            self.queue = WriteBehind(3 * BLOCK_BYTES)
            self.offer = Offers(self.queue, self.tier)
            self.waiting: list[int] = []
            self.accepted: Counter[int] = Counter()
            self.dropped = self.written = 0

        @rule(number=st.integers(0, 6))
        def offers(self, number: int) -> None:
            room = len(self.waiting) < 3 and number not in self.waiting
            assert self.offer(number) is room
            self.dropped += not room
            if room:
                self.waiting.append(number)
                self.accepted[number] += 1

        @rule()
        def steps(self) -> None:
            assert self.queue.step() is bool(self.waiting)
            if self.waiting:
                assert written(self.tier, self.waiting.pop(0))
                self.written += 1

        @rule()
        def drops_all(self) -> None:
            self.queue.drop_all()
            self.dropped += len(self.waiting)
            self.waiting.clear()

        @invariant()
        def agrees(self) -> None:
            stats = self.queue.stats()
            assert stats.depth_blocks == len(self.waiting) and stats.depth_bytes == len(self.waiting) * BLOCK_BYTES
            assert stats.depth_bytes <= stats.max_bytes
            assert (stats.written, sum(stats.drops.values())) == (self.written, self.dropped)
            assert self.offer.done + Counter(self.waiting) == self.accepted

    run_state_machine_as_test(
        Against,
        settings=settings(
            max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )
