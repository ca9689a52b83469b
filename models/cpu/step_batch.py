"""The tensors of one step, laid out from its rows; N tokens, L layers. Decides the order of rows in the step.

Rows of one token come first, ordered by length and cut into groups that one gathered attention serves; chunks follow.
All index arithmetic is done here once, in numpy, so that a layer only picks its row of an index tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from baton.kernels import DecodeGroup
from baton.models.batch import Row
from baton.models.cpu.adapters import NO_SLOT

# A group costs a fixed time (two calls a layer, about 40 us), and padding costs a copy and a read. Measured on two
# cores of an EPYC: up to GROUP_BYTES of keys and values of a layer the copy is still in cache when attention reads
# it, and a new group pays for itself when it saves PADDING_BYTES.
GROUP_BYTES = 2 << 20
PADDING_BYTES = 384 << 10


@dataclass(frozen=True, slots=True)
class PoolShape:
    """[num_blocks, kv_heads, layers, planes, block_tokens, head_dim] as far as indices need it."""

    num_units: int
    """Key heads."""
    units: range
    """Those that this rank writes and reads."""
    num_layers: int
    block_tokens: int
    token_bytes: int
    """The rank's keys and values of one token in one layer."""
    num_planes: int = 2
    """Keys and values; 1: both are made of one row."""


@dataclass(frozen=True, slots=True)
class ChunkSpan:
    """One chunk: tokens first_token .. first_token + num_tokens - 1 of the step, `start` tokens are before them."""

    first_token: int
    num_tokens: int
    start: int
    first_id: int
    num_ids: int


class ScoredSpan(NamedTuple):
    """Tokens that a row wants log probabilities of."""

    row: int
    targets: torch.Tensor  # int64 [n]
    num_top: int


@dataclass(frozen=True, slots=True)
class StepBatch:
    """One step, on the device."""

    token_ids: torch.Tensor  # int64 [N]
    positions: torch.Tensor  # int64 [N]
    slot_ids: (
        torch.Tensor
    )  # int64 [L, N, planes, units]: where keys and values go, rows of the pool as [slots, head_dim]
    piece_ids: (
        torch.Tensor
    )  # int64 [L, P]: what attention gathers, rows of the pool as [pieces, one unit's keys or values]
    groups: tuple[DecodeGroup, ...]
    chunks: tuple[ChunkSpan, ...]
    drawn_rows: tuple[int, ...]
    """Which of the given rows draw a token, in the order of the logits."""
    kept_tokens: torch.Tensor | None
    """int64 [drawn + scored]: the tokens behind which logits are wanted: the last of each row that draws, then those
    that `scored` tokens follow. None: all tokens, in order, draw."""
    firsts: tuple[int, ...] = ()
    """The place of the first token of each given row."""
    scored: tuple[ScoredSpan, ...] = ()
    adapter_slots: np.ndarray | None = None
    """[N]: of each token, NO_SLOT for none; None: no row of the step has an adapter."""
    entering: torch.Tensor | None = None
    """[N, hidden]: the residual that the stage before has left; None in the first stage."""

    def kept_slots(self, count: int) -> np.ndarray | None:
        """The slots of the first `count` kept tokens."""
        if self.adapter_slots is None:
            return None
        kept = self.adapter_slots if self.kept_tokens is None else self.adapter_slots[self.kept_tokens.numpy()]
        return kept[:count]


def lay_out(rows: Sequence[Row], shape: PoolShape, window: int | None, dtype: torch.dtype) -> StepBatch:
    """The step's tensors; `window` is the model's sliding window, which gives decode groups their second mask."""
    decode = [index for index, row in enumerate(rows) if len(row.token_ids) == 1]
    decode.sort(key=lambda index: -rows[index].start)
    order = decode + [index for index, row in enumerate(rows) if len(row.token_ids) > 1]
    lengths = np.array([len(rows[index].token_ids) for index in order])
    starts = np.array([rows[index].start for index in order])
    firsts = np.cumsum(lengths) - lengths
    positions = np.arange(lengths.sum()) + np.repeat(starts - firsts, lengths)
    token_ids = np.fromiter((token for index in order for token in rows[index].token_ids), np.int64, lengths.sum())
    tables = [_table(rows[index], shape.block_tokens) for index in order]

    piece_ids, groups, first_id = [], [], 0
    for first, end in _cut([len(table) for table in tables[: len(decode)]], shape):
        ids = _padded_ids(tables[first:end], shape)
        masks = _masks(starts[first:end] + 1, len(tables[first]) * shape.block_tokens, window, dtype)
        groups.append(DecodeGroup(first, end - first, first_id, ids.size, *masks))
        piece_ids.append(ids)
        first_id += ids.size
    chunks = []
    for number in range(len(decode), len(order)):
        ids = _padded_ids(tables[number : number + 1], shape)
        chunks.append(ChunkSpan(int(firsts[number]), int(lengths[number]), int(starts[number]), first_id, ids.size))
        piece_ids.append(ids)
        first_id += ids.size

    drawn = [number for number, index in enumerate(order) if rows[index].draw is not None]
    kept = (firsts + lengths - 1)[drawn]
    firsts_of = dict(zip(order, firsts.tolist(), strict=True))
    scored = [(index, firsts_of[index], row.targets) for index, row in enumerate(rows) if row.targets is not None]
    if scored:
        followed = [np.arange(len(each.token_ids)) + first + each.offset for _, first, each in scored]
        kept = np.concatenate((kept, *followed))
    layers, planes = np.arange(shape.num_layers), shape.num_planes
    return StepBatch(
        token_ids=torch.from_numpy(token_ids),
        positions=torch.from_numpy(positions),
        slot_ids=torch.from_numpy(
            _slots(tables, positions, lengths, shape)[None] + layers[:, None, None, None] * planes * shape.block_tokens
        ),
        piece_ids=torch.from_numpy(np.concatenate(piece_ids)[None] + planes * layers[:, None]),
        groups=tuple(groups),
        chunks=tuple(chunks),
        drawn_rows=tuple(order[number] for number in drawn),
        kept_tokens=torch.from_numpy(kept) if scored or len(kept) < len(positions) else None,
        firsts=tuple(firsts_of[index] for index in range(len(rows))),
        scored=tuple(
            ScoredSpan(index, torch.tensor(each.token_ids, dtype=torch.int64), each.num_top)
            for index, _, each in scored
        ),
        adapter_slots=_adapter_slots([rows[index] for index in order], lengths),
    )


def _adapter_slots(rows: Sequence[Row], lengths: np.ndarray) -> np.ndarray | None:
    """Of each token of rows with these lengths."""
    if all(row.adapter is None for row in rows):
        return None
    slots = [NO_SLOT if row.adapter is None else row.adapter for row in rows]
    return np.repeat(np.array(slots, dtype=np.int64), lengths)


def _table(row: Row, block_tokens: int) -> np.ndarray:
    """The row's block ids as far as it has tokens."""
    count = -(-(row.start + len(row.token_ids)) // block_tokens)
    return np.array(row.blocks[:count], dtype=np.int64)


def _slots(tables: list[np.ndarray], positions: np.ndarray, lengths: np.ndarray, shape: PoolShape) -> np.ndarray:
    """Layer 0's slots of every token's key and value in each of the rank's units, [N, planes, units]."""
    offsets = np.cumsum([len(table) for table in tables]) - [len(table) for table in tables]
    blocks = np.concatenate(tables)[np.repeat(offsets, lengths) + positions // shape.block_tokens]
    units = blocks[:, None] * shape.num_units + np.array(shape.units)
    first = units * (shape.num_planes * shape.num_layers * shape.block_tokens)
    keys = first + (positions % shape.block_tokens)[:, None]
    return np.stack([keys + plane * shape.block_tokens for plane in range(shape.num_planes)], axis=1)


def _padded_ids(tables: list[np.ndarray], shape: PoolShape) -> np.ndarray:
    """Layer 0's pieces of some rows, keys then values, row by row and unit by unit; each padded to the first's length.

    The padding is the row's own first block: what a mask hides must be finite, and of the same sequence.
    """
    width = len(tables[0])
    ids = np.stack([np.concatenate((table, np.full(width - len(table), table[0]))) for table in tables])
    units = ids[:, None, :] * shape.num_units + np.array(shape.units)[:, None]  # [rows, units, width]
    keys = units.ravel() * (shape.num_planes * shape.num_layers)
    return np.concatenate([keys + plane for plane in range(shape.num_planes)])


def _cut(widths: Sequence[int], shape: PoolShape) -> list[tuple[int, int]]:
    """Cuts rows, given by their number of blocks in falling order, into groups [first, end)."""
    block_bytes = shape.block_tokens * shape.token_bytes
    groups, first, padding = [], 0, 0
    for end in range(1, len(widths)):
        padding += (widths[first] - widths[end]) * block_bytes
        if padding > PADDING_BYTES or (end + 1 - first) * widths[first] * block_bytes > GROUP_BYTES:
            groups.append((first, end))
            first, padding = end, 0
    return [*groups, (first, len(widths))] if widths else []


def _masks(
    lengths: np.ndarray, width: int, window: int | None, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Additive masks [rows, 1, 1, width] of rows that hold `lengths` tokens: all of them, and the window's."""
    places, ends = np.arange(width, dtype=np.int64)[None, :], lengths[:, None]
    hidden = places >= ends

    def additive(hide: np.ndarray) -> torch.Tensor:
        mask = np.where(hide, np.float32("-inf"), np.float32(0.0))
        return torch.from_numpy(mask)[:, None, None, :].to(dtype)

    full = additive(hidden)
    return full, full if window is None else additive(hidden | (places < ends - window))
