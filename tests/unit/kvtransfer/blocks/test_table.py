"""kvtransfer.blocks.table: prefixes are shared, full blocks are published, everything is freed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.kvtransfer.blocks.hashing import block_hashes, cache_salt, root_hash
from baton.kvtransfer.blocks.manager import BlockManager, OutOfBlocks
from baton.kvtransfer.blocks.table import BlockTable

ROOT = b"r" * 32
BLOCK = 4


def _table(manager: BlockManager, tokens: list[int], known_hashes: bool = True) -> BlockTable:
    return BlockTable(manager, ROOT, BLOCK, block_hashes(ROOT, tokens, BLOCK) if known_hashes else ())


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(0, 40), st.booleans())
def test_a_sequence_hits_the_prefix_of_an_equal_one(tokens: list[int], limit: int, known_hashes: bool) -> None:
    """Guards the prefix cache: full blocks only, up to the limit, with given or computed hashes."""
    manager = BlockManager(16)
    first = _table(manager, tokens, known_hashes)
    first.grow(len(tokens))
    first.publish(tokens, len(tokens))
    blocks = list(first.blocks)
    first.release()
    second = _table(manager, tokens)
    cached = second.take_prefix(min(limit, len(tokens)))
    assert cached == min(limit, len(tokens)) // BLOCK * BLOCK
    assert second.blocks == blocks[: cached // BLOCK]
    second.release()
    manager.check()
    assert manager.num_available == 16


@given(st.lists(st.integers(0, 1), min_size=1, max_size=20), st.integers(0, 5))
def test_equal_prompts_of_different_salts_share_no_block(tokens: list[int], known: int) -> None:
    """Guards blocks of generated tokens too: a worker names them, from the root where the prompt fills no block. A
    sequence that was preempted finds its own again."""
    manager = BlockManager(64)
    prompt = tokens[: known * BLOCK]
    roots = [root_hash(ROOT, cache_salt(salt)) for salt in ("a", "b", "")]
    for root in roots:
        tables = [BlockTable(manager, root, BLOCK, block_hashes(root, part, BLOCK)) for part in (prompt, tokens)]
        assert tables[1].take_prefix(len(tokens)) == 0
        tables[0].grow(len(tokens))
        tables[0].publish(tokens, len(tokens))
        tables[0].release()
        assert tables[0].take_prefix(len(tokens)) == tables[1].take_prefix(len(tokens)) == len(tokens) // BLOCK * BLOCK
        tables[0].release()
        tables[1].release()
    manager.check()


def test_growth_is_all_or_nothing() -> None:
    """Guards against leaked blocks when the pool is exhausted while a table grows."""
    manager = BlockManager(3)
    table = _table(manager, [1] * 8)
    table.grow(8)
    with pytest.raises(OutOfBlocks):
        table.grow(17)
    assert len(table.blocks) == 2
    table.grow(12)
    assert len(table.blocks) == 3 and table.blocks_lacking(12) == 0
    table.release()
    manager.check()


def test_only_computed_tokens_are_published() -> None:
    """Guards against sharing blocks whose KV is not computed yet."""
    manager, tokens = BlockManager(8), list(range(12))
    table = _table(manager, tokens)
    table.grow(12)
    table.publish(tokens, 7)
    assert manager.peek(block_hashes(ROOT, tokens, BLOCK)) == 1


def test_a_lease_outlives_the_sequence() -> None:
    """Guards hand-over: blocks that the I/O thread still reads are not allocated again."""
    manager = BlockManager(2)
    table = _table(manager, [1] * 8)
    table.grow(8)
    table.lease(b"leg")
    assert table.blocks == [] and manager.num_available == 0
    assert manager.end_lease(b"leg")
    assert manager.num_available == 2
    manager.check()


def test_quarantine_holds_only_blocks_that_may_be_written() -> None:
    """Guards cancellation: the cached prefix is released at once, the transfer's blocks only after it has ended."""
    manager, tokens = BlockManager(4), [1] * 16
    first = _table(manager, tokens)
    first.grow(8)
    first.publish(tokens, 8)
    first.release()
    second = _table(manager, tokens)
    assert second.take_prefix(16) == 8
    second.grow(16)
    second.quarantine_from(2, b"transfer")
    assert manager.usage().quarantined == 2 and manager.num_available == 2
    assert manager.end_quarantine(b"transfer")
    manager.check()
    assert manager.num_available == 4
