"""kvtransfer.blocks.events: numbers without gaps, nothing said twice, bounded memory; and what a manager notes."""

from __future__ import annotations

import random

from baton.kvtransfer.blocks.events import EventLog
from baton.kvtransfer.blocks.manager import BlockManager
from baton.node.messages.base import MAX_EVENT_BLOCKS, encode
from baton.node.messages.control import KvEvents, KvSnapshot, TierChange
from baton.node.messages.wire import decode

A, B, C = (letter * 32 for letter in (b"a", b"b", b"c"))


def test_a_batch_tells_the_difference_and_no_more() -> None:
    """Guards the size of batches: what came and went between two of them is nobody's business."""
    log = EventLog()
    gpu, disk = log.journal("gpu"), log.journal("disk")
    gpu.stored(A)
    gpu.stored(B)
    gpu.removed(B)
    disk.stored(A)
    assert log.flush() == [KvEvents(seq=1, changes=(TierChange("gpu", (A,)), TierChange("disk", (A,))))]
    gpu.removed(A)
    gpu.stored(A)
    assert log.flush() == [] and log.seq == 1
    gpu.removed(A)
    gpu.stored(C)
    assert log.flush() == [KvEvents(seq=2, changes=(TierChange("gpu", (C,), (A,)),))]


def test_replay_gives_the_rest_or_all() -> None:
    """Guards both answers to a gap, and that a proxy that lacks nothing gets nothing."""
    log = EventLog(keep_blocks=2)
    batches = []
    for block_hash in (A, B, C):
        log.journal("gpu").stored(block_hash)
        batches += log.flush()
    assert log.replay(2) == batches[1:] and log.replay(3) == batches[2:] and log.replay(4) == []
    assert log.replay(1) == [KvSnapshot(seq=3, part=0, parts=1, changes=(TierChange("gpu", (A, B, C)),))]
    empty = EventLog()
    empty.journal("gpu").stored(A)
    empty.journal("gpu").removed(A)
    assert empty.flush() == [] and empty.replay(1) == []


def test_messages_stay_within_their_bounds() -> None:
    """Guards against a batch or a snapshot that the proxy must refuse, and so would never get."""
    log = EventLog(keep_blocks=0)
    hashes = [number.to_bytes(32, "big") for number in range(MAX_EVENT_BLOCKS * 2 + 5)]
    for block_hash in hashes:
        log.journal("gpu").stored(block_hash)
    batches = log.flush()
    parts = log.replay(1)
    assert len(batches) == len(parts) == 3
    for message in [*batches, *parts]:
        assert decode(encode(message)) == message
    told = [each for part in parts for change in part.changes for each in change.stored]
    assert sorted(told) == hashes


def test_a_manager_notes_exactly_what_can_be_matched() -> None:
    """Guards the events against the truth: after any history, what was told is what `match` would find."""
    rng, log = random.Random(7), EventLog()
    manager = BlockManager(6, log.journal("gpu"))
    names = [bytes([number]) * 32 for number in range(10)]
    told: set[bytes] = set()
    owned: list[int] = []
    for _ in range(3000):
        match rng.randrange(5):
            case 0 if manager.num_available:
                owned += manager.allocate(1)
            case 1 if owned:
                block = rng.choice(owned)
                if block not in manager._hash_of:
                    manager.publish(block, rng.choice(names))
                else:
                    manager.publish(block, manager._hash_of[block])
            case 2 if owned:
                manager.release([owned.pop(rng.randrange(len(owned)))])
            case 3:
                owned += manager.match([rng.choice(names)])
            case 4 if rng.random() < 0.05:
                manager.release(manager.allocate(manager.num_available))
        for batch in log.flush():
            for change in batch.changes:
                assert not told & set(change.stored) and set(change.removed) <= told, "said twice"
                told = (told | set(change.stored)) - set(change.removed)
        assert told == {name for name in names if manager.peek([name])}
    assert log.seq > 100
