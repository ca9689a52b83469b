"""Exchanges of ranks inside kernels, interpreted: every rank gets the same bits, for any number of ranks."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels import reference
from baton.kernels.triton.norm import add_rms_norm
from baton.models.cuda.peers import DevicePeers, InboxShape, RankMemory
from baton.models.partition import Rank
from baton.node.errors import PeerLost
from baton.testing.device_ranks import OneAtATime
from baton.tests.unit.kernels.interpreter_bf16 import install

if not torch.cuda.is_available():
    install()

WIDTH, VOCABULARY, ROWS = 32, 67, 1


def shapes(count: int, dtype: torch.dtype) -> tuple[InboxShape, ...]:
    words, share = torch.int32 if dtype == torch.bfloat16 else torch.int64, -(-VOCABULARY // count)
    return InboxShape(ROWS, WIDTH, words, sums=True), InboxShape(2, 1, torch.int64), InboxShape(1, share, words)


def connected(count: int, dtype: torch.dtype, turns: OneAtATime) -> list[DevicePeers]:
    layouts = [RankMemory(Rank(index, count), shapes(count, dtype)) for index in range(count)]
    memories = [torch.zeros(layout.size_bytes, dtype=torch.uint8) for layout in layouts]
    peers = [DevicePeers(*pair, VOCABULARY, turns.meet) for pair in zip(layouts, memories, strict=True)]
    for each in peers:
        each.reserve(3, dtype)
        each.connect([memory.data_ptr() for memory in memories])
    return peers


@pytest.mark.parametrize(("count", "dtype"), [(2, torch.bfloat16), (4, torch.float32)])
def test_all_ranks_get_the_same_sums_and_logits(count, dtype):
    """Guards against pieces of another rank, words of the exchange before, rows that an inbox has no place for, and a
    vocabulary that the number of ranks does not divide."""
    turns = OneAtATime(count)
    peers = connected(count, dtype, turns)
    parts, residual = torch.randn(count, 2, 3, WIDTH), torch.randn(3, WIDTH).to(dtype)
    weight, logits = torch.randn(WIDTH).to(dtype), torch.randn(3, VOCABULARY).to(dtype)

    def run(index: int) -> list[torch.Tensor]:
        """Three exchanges of either kind, one after the other by the one row of an inbox."""
        own, out = residual.clone(), torch.empty(3, WIDTH, dtype=dtype)
        add_rms_norm(parts[index], own, weight, 1e-5, out, ranks=peers[index].sums)
        share = peers[index].rank.vocabulary(VOCABULARY)
        whole = peers[index].whole(logits[:, share.start : share.stop].contiguous())
        peers[index].meet()
        return [own, out, whole]

    with ThreadPoolExecutor(count) as threads:
        running = [threads.submit(turns.run, lambda index=index: run(index)) for index in range(count)]
        first, *others = [each.result() for each in running]
    assert all(torch.equal(one, two) for other in others for one, two in zip(first, other, strict=True))
    sums = [part.sum(0).to(dtype).float() for part in parts]
    own = residual.float() + sum(sums)
    expected = [own, reference.rms_norm(own, weight.float(), 1e-5)]
    error = 1e-5 if dtype == torch.float32 else 0.05  # two roundings more
    torch.testing.assert_close([each.float() for each in first[:2]], expected, rtol=error, atol=error)
    assert torch.equal(first[2], logits)


@pytest.mark.parametrize(("count", "stopped"), [(2, False), (4, True)], ids=["by the clock", "by rank 0"])
def test_a_rank_that_waits_in_vain_says_so(count, stopped):
    """Guards against a kernel that spins for ever where another rank is gone, and a step whose tokens are used; and
    against steps that cannot be tried before ranks know one another."""
    layout = RankMemory(Rank(0, count), shapes(count, torch.float32))
    memories = [torch.zeros(layout.size_bytes, dtype=torch.uint8) for _ in range(count)]
    peers, values = DevicePeers(layout, memories[0], VOCABULARY), torch.ones(2, WIDTH)
    peers.reserve(1, torch.float32)
    share = len(peers.rank.vocabulary(VOCABULARY))

    def add() -> None:
        add_rms_norm(values, values.clone(), torch.ones(WIDTH), 1e-5, values, ranks=peers.sums)
        peers.bring()

    for _ in range(3):
        add()
        peers.meet()  # by itself
        peers.whole(torch.zeros(1, share))
        peers.check()
    peers.connect([memory.data_ptr() for memory in memories])
    peers.check()
    if stopped:
        peers.give_up()
    add()
    with pytest.raises(PeerLost, match="does not take part"):
        peers.check()
