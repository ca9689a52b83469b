"""Blocks on their way into the arena: who waits for them is bounded."""

from __future__ import annotations

import pytest

from baton.kvtransfer.blocks.events import NullJournal
from baton.kvtransfer.store import loads as module
from baton.kvtransfer.store.arena_index import ArenaIndex, Holder, Key
from baton.kvtransfer.store.loads import Loads, PeerWaits, WorkerWaits
from baton.kvtransfer.store.lower import NoLowerTier
from baton.kvtransfer.store.peers import Peers
from baton.node.messages.store import PeerGet

BLOCK_BYTES = 16
KEY = Key(b"n" * 32, b"h" * 32)
PEER = "peer"


@pytest.fixture
def loads() -> Loads:
    """Of an arena in which one block is missing that a peer has."""
    index = ArenaIndex(1, 4 * BLOCK_BYTES, NullJournal())
    index.register(KEY.namespace, BLOCK_BYTES)
    memory = memoryview(bytearray(4 * BLOCK_BYTES))
    peers = Peers((PEER,), lambda *_: True)
    return Loads(index, lambda offset, size: memory[offset : offset + size], NoLowerTier(), peers)


def test_a_waiter_that_asks_again_waits_once(loads: Loads) -> None:
    """Guards memory, and the answers, against a worker or a store that repeats its request while a block is loaded."""
    worker = WorkerWaits(Holder("w", 1), 0)
    for _ in range(3):
        assert loads.want(KEY, worker, PEER, 0.0)
        get = PeerGet(namespace=KEY.namespace, hash=KEY.hash, offset=0, size_bytes=BLOCK_BYTES)
        assert loads.want(KEY, PeerWaits("other", get), None, 0.0)
    assert [type(each) for each in loads.end(KEY, b"digest")] == [WorkerWaits, PeerWaits]


def test_waiters_of_one_block_are_bounded(loads: Loads, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guards memory: further ones learn at once that it cannot be had."""
    monkeypatch.setattr(module, "MAX_WAITERS", 2)
    waiters = [WorkerWaits(Holder("w", number), 0) for number in range(3)]
    assert [loads.want(KEY, each, PEER, 0.0) for each in waiters] == [True, True, False]
    assert loads.want(KEY, waiters[0], PEER, 0.0) and loads.end(KEY, b"") == waiters[:2]
