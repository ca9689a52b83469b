"""worker.pending_prefixes: which sequences wait for a block that another computes."""

from __future__ import annotations

from baton.kvtransfer.blocks.hashing import block_hashes
from baton.kvtransfer.blocks.manager import BlockManager
from baton.tests.unit.worker.bench import BLOCK, ROOT, sequence_of
from baton.worker.pending_prefixes import PendingPrefixes, work_left

OTHER = tuple(range(500, 520))


def test_a_sequence_waits_for_its_first_missing_block_only() -> None:
    """Guards against a second computation of a prefix, and against a wait that spares nothing."""
    manager = BlockManager(16)
    pending = PendingPrefixes(manager)
    pending.add(sequence_of(manager, "a", 3 * BLOCK))
    assert pending.awaited_by(sequence_of(manager, "same", 3 * BLOCK))
    assert pending.awaited_by(sequence_of(manager, "longer", 9 * BLOCK))
    assert not pending.awaited_by(sequence_of(manager, "too short to share a block", BLOCK))
    other = {"token_ids": OTHER, "prompt_len": 20, "block_hashes": block_hashes(ROOT, OTHER, BLOCK)}
    assert not pending.awaited_by(sequence_of(manager, "other", 20, **other))


def test_computed_blocks_are_not_pending() -> None:
    """Guards against a wait for what a sequence has passed already: its block may have been evicted since."""
    manager = BlockManager(16)
    pending, first = PendingPrefixes(manager), sequence_of(manager, "a", 3 * BLOCK)
    first.num_computed = BLOCK
    pending.add(first)
    second = sequence_of(manager, "b", 3 * BLOCK)
    assert not pending.awaited_by(second), "its first block is neither here nor computed by another"
    first.table.grow(BLOCK)
    first.table.publish(first.token_ids, BLOCK)
    assert pending.awaited_by(second), "the first block is here, the second one is computed"


def test_no_sequence_waits_for_a_lower_priority() -> None:
    """Guards against an urgent request that waits for one that everything else goes before."""
    manager = BlockManager(16)
    pending = PendingPrefixes(manager)
    pending.add(sequence_of(manager, "a", 3 * BLOCK, priority=1))
    assert not pending.awaited_by(sequence_of(manager, "urgent", 3 * BLOCK, priority=2))
    assert pending.awaited_by(sequence_of(manager, "equal", 3 * BLOCK, priority=1))
    assert pending.awaited_by(sequence_of(manager, "patient", 3 * BLOCK, priority=0))


def test_work_in_common_counts_once() -> None:
    """Guards the router's view of a queue: with each prefix counted again, it would send siblings to other workers."""
    manager = BlockManager(16)
    started = sequence_of(manager, "a", 10 * BLOCK)
    started.table.grow(10 * BLOCK)
    started.num_computed = 3 * BLOCK
    started.table.publish(started.token_ids, 3 * BLOCK)
    same, longer = sequence_of(manager, "b", 10 * BLOCK), sequence_of(manager, "c", 12 * BLOCK + 1)
    alike = {"token_ids": OTHER, "prompt_len": 20, "block_hashes": block_hashes(ROOT, OTHER, BLOCK)}
    others = [sequence_of(manager, name, 20, **alike) for name in ("d", "e")]
    assert work_left(manager, [started], []) == 7 * BLOCK
    assert work_left(manager, [started], [same]) == 7 * BLOCK + BLOCK, "the block of the token that draws is its own"
    assert work_left(manager, [started], [same, longer]) == 7 * BLOCK + BLOCK + 2 * BLOCK + 1
    assert work_left(manager, [], others) == 20 + BLOCK
