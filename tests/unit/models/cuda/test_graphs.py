"""The ladder of captured steps, the memory plan, and the line of work that is late: bookkeeping without a model."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.models.batch import Draw, Row
from baton.models.cuda.chunks import ChunkShape, lay_out, with_tokens
from baton.models.cuda.graphs import DecodeGraphs, lengths_up_to, sizes_up_to
from baton.models.cuda.memory import CONTEXT_BYTES, GIB, GRAPHS_BYTES, GpuMemory, plan_blocks, unit_padding
from baton.models.cuda.prefill_pieces import piece_sizes
from baton.models.cuda.queue import BUFFERS, Upload
from baton.models.cuda.slots import Slots
from baton.node.errors import InvariantBroken, SettingsError
from baton.node.messages.control import SamplingSpec
from baton.testing.late_queue import LateQueue


@given(st.integers(1, 600), st.integers(1, 200_000))
def test_every_step_has_a_graph(max_rows, max_tokens):
    """Guards against a step that no rung of the ladder holds, and against rungs that run far too many rows."""
    sizes, lengths = sizes_up_to(max_rows), lengths_up_to(max_tokens, 2048, 4)
    assert list(sizes) == sorted(set(sizes)) and sizes[-1] == max_rows
    assert list(lengths) == sorted(set(lengths)) and lengths[-1] == max_tokens
    graphs = DecodeGraphs(LateQueue().capture, sizes, lengths, lambda *_: lambda: None)
    for rows in range(1, max_rows + 1):
        assert rows <= graphs.size_for(rows) < max(2 * rows, rows + 65)


def test_the_graph_that_runs_is_the_smallest_that_holds_the_step():
    """Guards against a graph for shorter rows than the step has: their last tokens would not be seen."""
    ran: list[tuple[int, int]] = []
    graphs = DecodeGraphs(LateQueue().capture, (1, 4, 8), (10, 100), lambda *key: lambda: ran.append(key))
    seen: list[tuple[int, int]] = []
    graphs.capture_all(lambda done, total: seen.append((done, total)))
    assert ran[0] == (8, 100) and len(ran) == 6 and seen[-1] == (6, 6)
    ran.clear()
    for key in ((1, 10), (2, 11), (5, 3)):
        graphs.graph_for(*key)()
    assert ran == [(1, 10), (4, 100), (8, 10)]


def pool_bytes(total: int, free: int, own: int, utilization: float) -> int:
    """The planned pool, with blocks of one MiB."""
    return plan_blocks(GpuMemory(total, free, own), utilization, 1 << 20) << 20


def test_a_pool_is_what_a_workers_share_leaves():
    """Guards against a pool that leaves no room for graphs, and a start that fails with a negative number."""
    rest = GRAPHS_BYTES + CONTEXT_BYTES
    assert pool_bytes(100 * GIB, 80 * GIB, 20 * GIB, 0.9) == 70 * GIB - rest
    with pytest.raises(SettingsError, match="gpu-memory-utilization"):
        pool_bytes(100 * GIB, 80 * GIB, 20 * GIB, 0.2)


def test_workers_that_start_together_plan_the_same_pools():
    """Guards against a worker that takes what another one of the same GPU has not yet allocated (`scripts/serve` on one
    GPU: the prefill worker took all, and decode failed)."""
    early = pool_bytes(100 * GIB, 68 * GIB, 16 * GIB, 0.45)  # both models are loaded, no pool is allocated
    late = pool_bytes(100 * GIB, 68 * GIB - early - GRAPHS_BYTES, 16 * GIB, 0.45)
    assert early == late <= 29 * GIB
    assert 2 * (early + 16 * GIB + GRAPHS_BYTES) < 90 * GIB


def test_a_pool_is_never_larger_than_what_is_free():
    """Guards against a start that fails where a foreign program holds a part of the GPU."""
    assert pool_bytes(100 * GIB, 30 * GIB, 20 * GIB, 0.9) == 25 * GIB - GRAPHS_BYTES
    with pytest.raises(SettingsError, match=r"6\.0 GiB are free"):
        pool_bytes(100 * GIB, 6 * GIB, 1 * GIB, 0.9)


def test_no_unit_is_a_multiple_of_five_layers_apart():
    """Guards against the distance at which few of an H100's memory stacks are read, and against memory for nothing."""
    assert [unit_padding(layers, 128, 128) for layers in (1, 5, 32, 36, 40, 80)] == [0, 128, 0, 0, 128, 128]
    assert [unit_padding(layers, 132, 128) for layers in (4, 5)] == [0, 132], "scales behind the data"
    assert [unit_padding(layers, 65 * 512, 64 * 512) for layers in (4, 5)] == [64 * 512] * 2


def test_buffers_are_not_written_again_before_they_were_copied():
    """Guards against numbers of a later step in an earlier one: nothing has run when all buffers have had a turn."""
    queue = LateQueue()
    upload, seen = Upload(queue, 8), []
    for number in range(2 * BUFFERS + 1):
        (there,) = upload.send((np.full(5, number, dtype=np.int32),))
        queue.enqueue(lambda there=there: seen.append(there.tolist()))
    queue.mark().wait()
    assert seen == [[number] * 5 for number in range(2 * BUFFERS + 1)]
    with pytest.raises(InvariantBroken, match="9 numbers"):
        upload.send((np.zeros(9, dtype=np.int32),))


def test_memory_is_cleared_in_order_with_what_is_sent():
    """Guards masks, whose memory is made beside running steps, against zeros that a GPU writes behind them."""
    queue = LateQueue()
    upload = Upload(queue, 8)
    upload.there.fill_(7)
    upload.send((np.arange(4, dtype=np.int32),))
    queue.mark().wait()
    assert upload.there.tolist() == [0, 1, 2, 3, 0, 0, 0, 0]


@given(st.lists(st.tuples(st.integers(0, 2), st.booleans(), st.integers(0, 3)), max_size=30))
def test_slots_agree_with_what_was_sent(steps):
    """Guards against a block table with blocks of the slot's earlier owner, or without its newest."""
    slots, tables, device = Slots(3, 40, "cpu"), {0: [1], 1: [2], 2: [3]}, {}
    fresh = 10
    draw = Draw(SamplingSpec(max_tokens=9), (), 1, 1)
    begun = set()
    for slot, anew, growth in steps:
        if anew or slot not in begun:
            tables[slot], begun = [fresh], begun | {slot}
            anew = True
        tables[slot] = tables[slot] + [fresh + 1 + more for more in range(growth)]
        if len(tables[slot]) > 40:
            continue
        fresh += 5
        places, blocks = slots.changes([Row([7] if anew else [], 3, tables[slot], draw, slot)])
        device.update(zip(places.tolist(), blocks.tolist(), strict=True))
        assert [device[slot * 40 + place] for place in range(len(tables[slot]))] == tables[slot]


@pytest.mark.parametrize(
    ("max_tokens", "largest"), [(8, None), (16, 16), (100, 64), (1024, 1024), (1100, 1024), (8192, 2048)]
)
def test_steps_in_pieces_are_padded_by_less_than_a_tile(max_tokens, largest):
    """Guards against a size that the step's memory does not hold, and against padding that costs more than launches."""
    sizes = piece_sizes(max_tokens)
    assert list(sizes) == sorted(set(sizes)) and (sizes[-1] if sizes else None) == largest
    assert all(after - before <= 128 for before, after in itertools.pairwise(sizes))


def test_padding_of_a_step_writes_no_key():
    arrays = lay_out([Row([7, 8, 9], 0, [5], None)], 16, 4, 64)
    padded = with_tokens(arrays, 5)
    assert padded.tokens.tolist() == [7, 8, 9, 0, 0] and padded.kv_slots.tolist() == [80, 81, 82, -1, -1]
    assert padded.positions.tolist() == [0, 1, 2, 0, 0] and padded.work is arrays.work


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 70), st.booleans()), min_size=1, max_size=6))
def test_chunks_lie_where_their_tokens_belong(shapes):
    """Guards against a token in another's block, at another's position, or a draw after the wrong token."""
    draw = Draw(SamplingSpec(max_tokens=9), (), 1, 0)
    rows, block, first = [], 16, 0
    for number, (count, start, draws) in enumerate(shapes):
        blocks = list(range(first, first := first + 9))
        rows.append(Row([number] * count, start, blocks, draw if draws else None, number))
    arrays = lay_out(rows, block, 4, 64)
    token = 0
    for number, row in enumerate(rows):
        assert arrays.query_starts[number] == token and arrays.lengths[number] == row.start + row.num_new
        for place in range(row.start, row.start + row.num_new):
            assert arrays.tokens[token] == number and arrays.positions[token] == place
            assert arrays.kv_slots[token] == row.blocks[place // block] * block + place % block
            token += 1
        used = -(-arrays.lengths[number] // block)
        assert arrays.tables[number, :used].tolist() == row.blocks[:used]
    drawn = list(zip(arrays.drawn_tokens, arrays.drawn_slots, arrays.drawn_positions, strict=True))
    assert drawn == [
        (arrays.query_starts[number + 1] - 1, number, row.start + row.num_new)
        for number, row in enumerate(rows)
        if row.draw
    ]
    assert {tuple(item[:2]) for item in arrays.work.tolist()} == {
        (number, tile) for number, row in enumerate(rows) for tile in range(-(-row.num_new // 64))
    }
    assert len(arrays.work) % 4 == 0, "each tile once for every head"


def test_a_step_in_a_larger_shape_is_the_same_step():
    """Guards against padding that writes a key, is attended to, or leaves a tile of a prompt out."""
    draw = Draw(SamplingSpec(max_tokens=9), (), 1, 0)
    rows = [Row([1] * 70, 30, [3, 4, 5, 6, 7, 8, 9], None, 0), Row([2] * 5, 0, [10], draw, 7)]
    arrays = lay_out(rows, 16, 4, 64)
    shape = ChunkShape(tokens=128, least_tokens=75, sequences=4, table_width=32, items=(2 + 4) * 4)
    assert shape.holds(arrays) and not shape.holds(lay_out([Row([1] * 129, 0, list(range(9)), None)], 16, 4, 64))
    assert not shape.holds(lay_out([Row([1] * 20, 0, [number, 9], None) for number in range(5)], 16, 4, 64))
    assert not shape.holds(lay_out([Row([1] * 74, 0, list(range(5)), None)], 16, 4, 64))  # it would be mostly padding
    assert not replace(shape, table_width=8).holds(arrays), "its tables would be cut off"
    padded = shape.padded(arrays, padding_slot=99)
    assert [len(each) for each in padded] == [128, 128, 128, 5, 4, 4, 24, 4, 4, 4]
    assert padded.kv_slots[75:].max() == -1 and padded.kv_slots[:75].tolist() == arrays.kv_slots.tolist()
    assert padded.tokens[:75].tolist() == arrays.tokens.tolist()
    assert {tuple(item) for item in padded.work.tolist()} == {tuple(item) for item in arrays.work.tolist()}
    assert padded.query_starts.tolist() == [0, 70, 75, 75, 75] and padded.lengths.tolist() == [100, 5, 0, 0]
    assert padded.drawn_slots.tolist() == [7, 99, 99, 99] and padded.drawn_tokens[0] == 74
