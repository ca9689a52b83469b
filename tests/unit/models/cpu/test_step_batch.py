"""The layout of a step: every token once, every block where its row says, groups that hold what they promise."""

from itertools import product

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.models.batch import Draw, Row
from baton.models.cpu.step_batch import GROUP_BYTES, PADDING_BYTES, PoolShape, lay_out
from baton.node.messages.control import SamplingSpec

DRAW = Draw(SamplingSpec(max_tokens=1), (), 0, 0)
BLOCK_TOKENS = 4
NUM_LAYERS = 3
NUM_UNITS = 2


@st.composite
def steps(draw: st.DrawFn) -> list[Row]:
    sizes = draw(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20) | st.just(1)), min_size=1, max_size=12))
    rows, next_block = [], 0
    for number, (start, count) in enumerate(sizes):
        width = -(-(start + count) // BLOCK_TOKENS) + draw(st.integers(0, 2))
        blocks = list(range(next_block, next_block + width))[::-1]
        next_block += width
        draws = DRAW if draw(st.booleans()) else None
        rows.append(Row([1000 * number + i for i in range(count)], start, blocks, draws))
    return rows


def piece(block: int, unit: int, layer: int, part: int) -> int:
    return ((block * NUM_UNITS + unit) * NUM_LAYERS + layer) * 2 + part


@settings(max_examples=60)
@given(rows=steps(), token_kib=st.sampled_from([1, 64, 700]))
def test_layout_agrees_with_the_rows(rows: list[Row], token_kib: int) -> None:
    """Guards against a token that is lost, stands twice, or is written to or read from another row's block."""
    shape = PoolShape(NUM_UNITS, range(NUM_UNITS), NUM_LAYERS, BLOCK_TOKENS, token_kib << 10)
    step = lay_out(rows, shape, None, torch.float32)
    # Each token names its row and its place in it, from which follows where everything about it must be.
    assert sorted(step.token_ids.tolist()) == sorted(token for row in rows for token in row.token_ids)
    for index, token in enumerate(step.token_ids.tolist()):
        row, position = rows[token // 1000], rows[token // 1000].start + token % 1000
        assert int(step.positions[index]) == position
        for layer in range(NUM_LAYERS):
            block = row.blocks[position // BLOCK_TOKENS]
            expected = [
                [piece(block, unit, layer, part) * BLOCK_TOKENS + position % BLOCK_TOKENS for unit in range(NUM_UNITS)]
                for part in (0, 1)
            ]
            assert step.slot_ids[layer, index].tolist() == expected

    served = np.zeros(len(step.token_ids), dtype=int)
    for group in step.groups:
        ids = step.piece_ids[:, group.first_id : group.first_id + group.num_ids]
        ids = ids.view(NUM_LAYERS, 2, group.num_rows, NUM_UNITS, -1)
        for place in range(group.num_rows):
            served[group.first_row + place] += 1
            row = rows[int(step.token_ids[group.first_row + place]) // 1000]
            total = row.start + 1
            width = -(-total // BLOCK_TOKENS)
            for layer, part, unit in product(range(NUM_LAYERS), (0, 1), range(NUM_UNITS)):
                found = ids[layer, part, place, unit].tolist()
                assert found[:width] == [piece(block, unit, layer, part) for block in row.blocks[:width]]
                assert set(found[width:]) <= {piece(row.blocks[0], unit, layer, part)}, "padding is the row's own"
            assert (group.mask[place, 0, 0] == 0).nonzero().flatten().tolist() == list(range(total))
        if group.num_rows > 1:
            members = step.token_ids[group.first_row :][: group.num_rows].tolist()
            blocks = [-(-(rows[token // 1000].start + 1) // BLOCK_TOKENS) for token in members]
            block_bytes = BLOCK_TOKENS * shape.token_bytes
            assert group.num_rows * max(blocks) * block_bytes <= GROUP_BYTES
            assert sum(max(blocks) - count for count in blocks) * block_bytes <= PADDING_BYTES
    for chunk in step.chunks:
        served[chunk.first_token : chunk.first_token + chunk.num_tokens] += 1
        row = rows[int(step.token_ids[chunk.first_token]) // 1000]
        assert (chunk.start, chunk.num_tokens) == (row.start, len(row.token_ids))
        width = -(-(row.start + len(row.token_ids)) // BLOCK_TOKENS)
        ids = step.piece_ids[1, chunk.first_id : chunk.first_id + chunk.num_ids].tolist()
        assert ids == [
            piece(block, unit, 1, part) for part in (0, 1) for unit in range(NUM_UNITS) for block in row.blocks[:width]
        ]
    assert served.tolist() == [1] * len(served)

    lasts = step.token_ids if step.kept_tokens is None else step.token_ids[step.kept_tokens]
    assert lasts.tolist() == [rows[index].token_ids[-1] for index in step.drawn_rows]
    assert sorted(step.drawn_rows) == [index for index, row in enumerate(rows) if row.draw is not None]


@given(length=st.integers(1, 40), window=st.integers(1, 12))
def test_window_mask_shows_the_last_tokens(length: int, window: int) -> None:
    """Guards against a window that is one token too long or too short in decode."""
    shape = PoolShape(NUM_UNITS, range(NUM_UNITS), NUM_LAYERS, BLOCK_TOKENS, 64)
    step = lay_out([Row([5], length - 1, list(range(20)), DRAW)], shape, window, torch.float32)
    seen = (step.groups[0].window_mask[0, 0, 0] == 0).nonzero().flatten().tolist()
    assert seen == list(range(max(0, length - window), length))
