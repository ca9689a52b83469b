"""Exchanges between ranks over shared memory: all ranks get the same bits, and none waits for one that is gone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from itertools import chain
from typing import Any

import pytest
import torch
import torch.distributed as dist

from baton.models.adapters.adapter import Adapter, LayerAdapter, LowRank
from baton.models.adapters.flat import Directory, flatten, view
from baton.models.batch import Draw, PromptTargets, Row
from baton.models.partition import Rank
from baton.node.errors import InvariantBroken, PeerLost
from baton.node.messages.control import SamplingSpec
from baton.worker.ranks.exchange import SLOT_BYTES, ProcessPeers, memory_bytes
from baton.worker.ranks.links import RankLink, pair
from baton.worker.ranks.records import FillRecord, encode_fill
from baton.worker.stages.adapters import fill_as_first

COUNT = 3
GREEDY = Draw(SamplingSpec(max_tokens=9, temperature=0.0), (), 0, 0)
RANDOM = Draw(SamplingSpec(max_tokens=9, temperature=0.7, seed=1 << 62), (1, 2, 3), 1, 2)
FILTERED = Draw(SamplingSpec(max_tokens=9, top_p=0.5, seed=3), (1, 2, 3), 1, 2)


@pytest.fixture
def links() -> Iterator[list[list[RankLink]]]:
    ends: list[list[RankLink]] = [[] for _ in range(COUNT)]
    for one in range(COUNT):
        for other in range(one + 1, COUNT):
            own, theirs = pair(one, other)
            ends[one].append(own)
            ends[other].append(theirs)
    yield ends
    for link in chain(*ends):
        link.close()


@pytest.fixture
def group(links: list[list[RankLink]]) -> list[ProcessPeers]:
    memory = torch.zeros(memory_bytes(COUNT), dtype=torch.uint8)
    return [ProcessPeers(Rank(index, COUNT), 100, memory, links[index], meet_s=60.0) for index in range(COUNT)]


def together(*calls: Callable[[], Any]) -> list[Any]:
    """What the ranks' calls give, each made in a thread."""
    with ThreadPoolExecutor(COUNT) as threads:
        return [made.result() for made in [threads.submit(call) for call in calls]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_ranks_get_the_same_bits(group, dtype):
    """Guards against sums in another order at each rank, parts larger than a slot, and slots written while they are
    read: many exchanges follow one another."""
    width = 1000
    for rows in (1, 7, 3 * SLOT_BYTES // (4 * width), 2, 1):
        parts = [torch.randn(rows, width).to(dtype) for _ in range(COUNT)]
        sums = together(*(partial(peers.sum, part) for peers, part in zip(group, parts, strict=True)))
        expected = (parts[0].float() + parts[1] + parts[2]).to(dtype)
        assert all(torch.equal(each, expected) for each in sums)


def test_sums_are_those_of_gloo(group):
    """Guards against a sum that is the same at all ranks, and wrong: another library's over sockets is the check."""
    store, options = dist.HashStore(), dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    options._timeout = timedelta(seconds=60)
    parts = [torch.randn(7, 1000) for _ in range(COUNT)]
    expected = [part.clone() for part in parts]

    def by_gloo(rank: int) -> None:
        dist.ProcessGroupGloo(store, rank, COUNT, options).allreduce([expected[rank]]).wait()

    together(*(partial(by_gloo, rank) for rank in range(COUNT)))
    sums = together(*(partial(peers.sum, part) for peers, part in zip(group, parts, strict=True)))
    for found, wanted in zip(sums, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_parts_of_different_widths_lie_side_by_side(group):
    """Guards against a vocabulary that the number of ranks does not divide."""
    widths = [5, 4, 6]
    parts = [torch.randn(3, width) for width in widths]
    found = together(*(partial(peers.gather, part, widths) for peers, part in zip(group, parts, strict=True)))
    assert all(torch.equal(each, torch.cat(parts, -1)) for each in found)


def test_ranks_get_the_rows_without_what_only_the_first_needs(group):
    """Guards against ranks that draw another token, or compute other rows; and records that fit no slot."""
    long = tuple(range(1 << 20, (1 << 20) + SLOT_BYTES // 4))  # of 5 bytes each
    rows = [
        Row((7,), 31, [4, 5], GREEDY, slot=3),
        Row((8,), 9, (6,), RANDOM, slot=1, most_drafts=2, adapter=3),
        Row((9,), 0, [7], FILTERED),
        Row(long, 0, long[:1000], None, targets=PromptTargets(1, [3, 4], 2)),
    ]
    _, *received = together(lambda: group[0].begin(rows), *(peers.begun for peers in group[1:]))
    for found in received:
        assert [(row.token_ids, row.start, tuple(row.blocks)) for row in found] == [
            (row.token_ids, row.start, tuple(row.blocks)) for row in rows
        ]
        greedy, random, filtered, nothing = (row.draw and row.draw.sampling for row in found)
        assert greedy.temperature == 0.0 and (random.temperature, random.seed) == (0.7, 1 << 62)
        assert nothing is None and filtered.logprobs, "drawn by rank 0 alone"
        assert [row.adapter for row in found] == [None, 3, None, None]
        assert found[1].draw.history == () and found[3].targets == PromptTargets(1, [3, 4], 2)


def test_an_adapter_reaches_all_ranks_without_a_copy(group):
    """Guards against other numbers at another rank, and memory that goes while a rank still computes with it."""
    pair = LowRank(torch.randn(2, 5), torch.randn(7, 2), torch.randn(7))
    adapter = Adapter(bytes(32), (LayerAdapter(), LayerAdapter(qkv=(None, pair, None))), whole_head=torch.randn(3, 5))
    made = []

    def allocate(size_bytes):
        made.append(group[0].allocate(size_bytes))
        return made[0].tensor

    _, directory = flatten(adapter, torch.float32, allocate)
    _, *received = together(lambda: group[0].fill(4, made[0], directory), *(peers.begun for peers in group[1:]))
    made[0].tensor[:4].view(torch.float32).fill_(0.5)
    pair.a[0, 0] = 0.5
    made.clear()
    for filled in received:
        found = view(filled.tensor, torch.float32, filled.directory)
        assert (filled.slot, found.digest, found.layers[0].qkv) == (4, bytes(32), ())
        assert found.layers[1].qkv[0] is None and torch.equal(found.whole_head, adapter.whole_head)
        assert all(map(torch.equal, found.layers[1].qkv[1].tensors, pair.tensors))


def test_an_adapter_that_went_before_a_rank_mapped_it_is_left_out(group):
    """Guards against a worker that ends since a request was cancelled: its adapter has left the slot, and memory, while
    another stage, with its ranks, is steps behind."""
    memory = group[0].allocate(4)
    record = FillRecord(4, memory.pid, memory.shared, Directory(bytes(32), 0, (), None, None, {}))
    del memory
    rows = [Row((7,), 31, [4, 5], GREEDY)]

    def lead():
        group[0].tell(encode_fill(record))
        group[0].begin(rows)

    _, *received = together(lead, *(peers.begun for peers in group[1:]))
    assert [found[0].token_ids for found in received] == [(7,)] * 2
    slots = NoAdapters()
    fill_as_first(slots, record)
    assert not slots.filled


class NoAdapters:
    """Slots that are never filled."""

    filled = False

    def fill(self, slot, adapter):
        self.filled = True


def test_a_rank_that_has_ended_is_noticed_at_once(group, links):
    """Guards against ranks that wait for the dead."""
    for link in links[2]:
        link.close()
    with pytest.raises(PeerLost, match="rank 2 has ended"):
        together(lambda: group[0].sum(torch.ones(1, 1)), lambda: group[1].sum(torch.ones(1, 1)))


def test_a_wait_has_an_end(links):
    """Guards against a group that hangs with one of its ranks."""
    memory = torch.zeros(memory_bytes(COUNT), dtype=torch.uint8)
    peers = ProcessPeers(Rank(0, COUNT), 100, memory, links[0], meet_s=0.01)
    with pytest.raises(PeerLost, match="rank 1 has not answered"):
        peers.sum(torch.ones(1, 1))


def test_ranks_out_of_step_are_a_bug(group):
    """Guards against sums of parts that belong to different layers."""
    together(*(partial(peers.sum, torch.ones(1, 1)) for peers in group))
    group[2]._phase += 1
    with pytest.raises(InvariantBroken, match="rank 2 is at exchange 2"):
        together(*(partial(peers.sum, torch.ones(1, 1)) for peers in group))
