"""Parts of prompts, laid out as the arrays that the kernels of a step read. Numpy, no device.

Tokens of all chunks stand one behind the other; attention gets a work list that serves all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from baton.kernels.triton.prefill_attention import work_list
from baton.models.batch import Row
from baton.models.cuda.queue import aligned

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


def behind(arrays: ChunkArrays, rows: Sequence[Row], padded: int) -> ChunkArrays:
    """The draws of a step in which these chunks stand behind `padded` tokens, the first of which are those of `rows`:
    the rows' draws, then the chunks'."""
    own = np.array([(number, row.slot, row.start + 1) for number, row in enumerate(rows)], dtype=np.int32)
    chunks = np.stack((arrays.drawn_tokens + np.int32(padded), arrays.drawn_slots, arrays.drawn_positions))
    tokens, slots, positions = np.concatenate((own.T, chunks), axis=1)
    return arrays._replace(drawn_tokens=tokens, drawn_slots=slots, drawn_positions=positions)


@dataclass(frozen=True, slots=True)
class ChunkShape:
    """The sizes of a captured step of parts of prompts."""

    tokens: int
    least_tokens: int
    sequences: int
    table_width: int
    items: int

    def holds(self, arrays: ChunkArrays) -> bool:
        """Items follow: a sequence has a tile more than its tokens fill at most."""
        fits = len(arrays.lengths) <= self.sequences and arrays.tables.shape[1] <= self.table_width
        return fits and self.least_tokens <= len(arrays.tokens) <= self.tokens

    def padded(self, arrays: ChunkArrays, padding_slot: int) -> ChunkArrays:
        """The same step in this shape: tokens that write no key, sequences that no item names, and for the rest of the
        items the last one once more, which writes the same once more. What pads the draws goes to `padding_slot`."""
        tokens, sequences = self.tokens, self.sequences
        tables = np.zeros((sequences, self.table_width), dtype=np.int32)
        tables[: len(arrays.tables), : arrays.tables.shape[1]] = arrays.tables
        again = np.repeat(arrays.work[-1:], self.items - len(arrays.work), axis=0)
        return with_tokens(arrays, tokens)._replace(
            query_starts=_filled(arrays.query_starts, sequences + 1, len(arrays.tokens)),
            lengths=_filled(arrays.lengths, sequences, 0),
            tables=tables,
            work=np.concatenate((arrays.work, again)),
            drawn_tokens=_filled(arrays.drawn_tokens, sequences, 0),
            drawn_slots=_filled(arrays.drawn_slots, sequences, padding_slot),
            drawn_positions=_filled(arrays.drawn_positions, sequences, 1),
        )


def with_tokens(arrays: ChunkArrays, num_tokens: int) -> ChunkArrays:
    """So many, of which those behind the chunks' write no key."""
    return arrays._replace(
        tokens=_filled(arrays.tokens, num_tokens, 0),
        positions=_filled(arrays.positions, num_tokens, 0),
        kv_slots=_filled(arrays.kv_slots, num_tokens, -1),
    )


def _filled(values: np.ndarray, count: int, value: int) -> np.ndarray:
    """int32 [count]: the values, and `value` behind them."""
    filled = np.full(count, value, dtype=np.int32)
    filled[: len(values)] = values
    return filled


def num_tokens_of(rows: Sequence[Row]) -> int:
    """That their step computes."""
    return sum(row.num_new for row in rows)


def decodes(row: Row) -> bool:
    """Whether the row is one token that follows a drawn one; a part of a prompt, however short, is a chunk."""
    return row.num_new == 1 and row.draw is not None and row.draw.num_generated > 0
