"""Parts of prompts, laid out as the arrays that the kernels of a step read. Numpy, no device.

Tokens of all chunks stand one behind the other; attention gets a work list that serves all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kernels.triton.prefill_attention import work_list
from models.batch import Row
from models.cuda.upload import aligned

TABLE_WIDTH = 16
"""Tables are a multiple of it wide: kernels are compiled for such strides, and again for others."""


class ChunkArrays(NamedTuple):
    """int32; N tokens of S chunks, of which D draw."""

    tokens: np.ndarray  # [N]
    positions: np.ndarray  # [N]
    kv_slots: np.ndarray  # [N]
    query_starts: np.ndarray  # [S + 1]
    lengths: np.ndarray  # [S]
    tables: np.ndarray  # [S, blocks of the longest, rounded up]
    work: np.ndarray  # [items, 3]
    drawn_tokens: np.ndarray  # [D]: number of the token that a draw follows
    drawn_slots: np.ndarray  # [D]
    drawn_positions: np.ndarray  # [D]: the place that the new token gets in its sequence


def lay_out(rows: Sequence[Row], block_tokens: int, num_heads: int, tile: int) -> ChunkArrays:
    """`tile`: tokens of one item of the work list."""
    counts = [len(row.token_ids) for row in rows]
    lengths = [row.start + count for row, count in zip(rows, counts, strict=True)]
    starts = np.cumsum([0, *counts], dtype=np.int32)
    used = [-(-length // block_tokens) for length in lengths]
    tables = np.zeros((len(rows), aligned(max(used), TABLE_WIDTH)), dtype=np.int32)
    for row, table, count in zip(rows, tables, used, strict=True):
        table[:count] = row.blocks[:count]
    positions = np.concatenate(
        [np.arange(row.start, length, dtype=np.int32) for row, length in zip(rows, lengths, strict=True)]
    )
    blocks = tables[np.repeat(np.arange(len(rows)), counts), positions // block_tokens]
    drawing = [index for index, row in enumerate(rows) if row.draw is not None]
    return ChunkArrays(
        tokens=np.fromiter((token for row in rows for token in row.token_ids), np.int32, len(positions)),
        positions=positions,
        kv_slots=blocks * block_tokens + positions % block_tokens,
        query_starts=starts,
        lengths=np.array(lengths, dtype=np.int32),
        tables=tables,
        work=work_list(counts, lengths, num_heads, tile).numpy(),
        drawn_tokens=np.array([starts[index + 1] - 1 for index in drawing], dtype=np.int32),
        drawn_slots=np.array([rows[index].slot for index in drawing], dtype=np.int32),
        drawn_positions=np.array([lengths[index] for index in drawing], dtype=np.int32),
    )
