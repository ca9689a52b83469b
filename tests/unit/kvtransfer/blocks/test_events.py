"""kvtransfer.blocks.events: numbers without gaps, no duplicates, bounded memory; and the manager's journal."""

from __future__ import annotations

import random

from baton.kvtransfer.blocks.events import EventLog
from baton.kvtransfer.blocks.manager import BlockManager
from baton.node.messages.base import MAX_EVENT_BLOCKS, encode
from baton.node.messages.control import KvEvents, KvSnapshot, TierChange
from baton.node.messages.wire import decode

A, B, C = (letter * 32 for letter in (b"a", b"b", b"c"))


def test_a_batch_holds_only_net_changes() -> None:
    """Guards the size of batches: blocks that came and went between two batches are left out."""
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
    """Guards both answers to a gap, and against an answer to a proxy that lacks nothing."""
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
    """Guards against a batch or snapshot out of bounds, which the proxy would reject again and again."""
    log = EventLog(keep_blocks=0)
    hashes = [number.to_bytes(32, "big") for number in range(MAX_EVENT_BLOCKS * 2 + 5)]
    for block_hash in hashes:
        log.journal("gpu").stored(block_hash)
    batches = log.flush()
    parts = log.replay(1)
    assert len(batches) == len(parts) == 3
    for message in [*batches, *parts]:
        assert decode(encode(message)) == message
    published = [each for part in parts for change in part.changes for each in change.stored]
    assert sorted(published) == hashes


def test_a_managers_journal_equals_what_match_finds() -> None:
    """Guards events against divergence: after any history, they describe exactly what `match` finds."""
    rng, log = random.Random(7), EventLog()
    manager = BlockManager(6, log.journal("gpu"))
    names = [bytes([number]) * 32 for number in range(10)]
    published: set[bytes] = set()
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
                assert not published & set(change.stored) and set(change.removed) <= published, "published twice"
                published = (published | set(change.stored)) - set(change.removed)
        assert published == {name for name in names if manager.peek([name])}
    assert log.seq > 100
