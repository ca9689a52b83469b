"""The CPU's attention against the obvious one, over pools whose blocks lie anywhere."""

import pytest
import torch

from baton import kernels
from baton.kernels.cpu.attention import QUERY_SLICE
from baton.kernels.reference import paged_attention

LAYERS, KV_HEADS, HEAD_DIM = 3, 2, 8
SCORES = [kernels.Scores(HEAD_DIM**-0.5), kernels.Scores(0.7, 1.5)]


def make_pool(num_blocks: int, block_tokens: int) -> torch.Tensor:
    shape = (num_blocks, KV_HEADS, LAYERS, 2, block_tokens, HEAD_DIM)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def piece_ids(tables: list[list[int]], layer: int) -> torch.Tensor:
    """Key blocks of all rows, head by head, then their value blocks."""
    units = [block * KV_HEADS + head for table in tables for head in range(KV_HEADS) for block in table]
    keys = torch.tensor(units) * 2 * LAYERS + 2 * layer
    return torch.cat((keys, keys + 1))


def additive(seen: torch.Tensor) -> torch.Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[:, None, None, :]


@pytest.mark.parametrize("num_heads", [2, 6])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("block_tokens", [4, 16])
@pytest.mark.parametrize("scores", SCORES)
def test_decode_attention(num_heads, window, block_tokens, scores):
    """Guards against heads that read another head's keys, padding that is seen, and rows of a group exchanged."""
    pool = make_pool(40, block_tokens)
    lengths = [31, 17, 30, 1]
    width = -(-max(lengths) // block_tokens)
    shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(2)).tolist()
    tables = [shuffled[row * width : (row + 1) * width] for row in range(4)]
    places, ends = torch.arange(width * block_tokens)[None, :], torch.tensor(lengths)[:, None]
    full = places < ends
    windowed = full if window is None else full & (places >= ends - window)
    prefix = torch.tensor([99, 98, 97])  # ids of another group before this one's
    ids = torch.cat((prefix, piece_ids(tables, 1)))
    group = kernels.DecodeGroup(2, 4, 3, len(ids) - 3, additive(full), additive(windowed))
    query = torch.randn(7, num_heads, HEAD_DIM, generator=torch.Generator().manual_seed(3))
    out = torch.full_like(query, 9.0)
    kernels.decode_attention(query, kernels.PlainKv(pool), ids, group, window is not None, scores, KV_HEADS, out)
    for row, length in enumerate(lengths):
        table = torch.tensor(tables[row])
        expected = paged_attention(query[2 + row][None], pool, 1, table, length - 1, window, scores)
        torch.testing.assert_close(out[2 + row][None], expected, rtol=1e-4, atol=1e-5)
    assert bool((out[[0, 1, 6]] == 9.0).all()), "rows of other groups are not touched"


@pytest.mark.parametrize(
    ("start", "num_new"), [(0, 1), (0, 29), (3, 1), (16, 13), (7, QUERY_SLICE + 5), (0, QUERY_SLICE + 5)]
)
@pytest.mark.parametrize("window", [None, 6, 40])
@pytest.mark.parametrize("scores", SCORES)
def test_chunk_attention(start, num_new, window, scores):
    """Guards against a mask that is off by one at the start, at a slice of queries, or at the window's edge."""
    block_tokens = 4
    count = -(-(start + num_new) // block_tokens)
    pool = make_pool(count + 5, block_tokens)
    table = torch.randperm(count + 5, generator=torch.Generator().manual_seed(4))[:count]
    query = torch.randn(num_new, 4, HEAD_DIM, generator=torch.Generator().manual_seed(5))
    out = torch.empty_like(query)
    ids = piece_ids([table.tolist()], 2)
    kernels.chunk_attention(query, kernels.PlainKv(pool), ids, start, window, scores, KV_HEADS, out)
    expected = paged_attention(query, pool, 2, table, start, window, scores)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_write_kv_puts_every_token_in_its_slots_and_nothing_else():
    """Guards against keys and values exchanged, and against tokens that overwrite each other."""
    pool = torch.zeros(2, 1, 1, 2, 5, 3)
    slots = pool.view(20, 3)
    slot_ids = torch.tensor([[[3, 13], [7, 17]], [[9, 19], [0, 10]], [[4, 14], [8, 18]]])
    kv = torch.arange(1.0, 37.0).view(3, 2, 6)
    kernels.PlainKv(pool).write(slot_ids, kv)
    expected = torch.zeros(20, 3)
    for token in range(3):
        for part in range(2):
            for head in range(2):
                expected[slot_ids[token, part, head]] = kv[token, part, 3 * head : 3 * head + 3]
    assert torch.equal(slots, expected)


def test_gathers_keep_their_memory():
    """Guards against an allocation a layer."""
    pool = make_pool(10, 4)
    kv, pieces = kernels.PlainKv(pool), pool.view(-1, 4 * HEAD_DIM)
    large = kv.gather(torch.tensor([2, 4, 3, 5]))
    address = large.data_ptr()
    assert torch.equal(large, pieces[2:6][[0, 2, 1, 3]])
    assert kv.gather(torch.tensor([8, 9])).data_ptr() == address
