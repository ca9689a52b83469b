"""Rows of a step grouped by adapter, on the device: a stable counting sort by one program.

    adapters[i] = table[index[i]]                      the slot of row i's adapter, below 0: none
    order                                              numbers of the rows with adapters, sorted by slot, then by number
    items                                              (slot, first place in `order`, rows): up to ITEM_ROWS rows each

All sizes are fixed, so that a graph may hold what follows; the first item has the number of items, too. `laid_out` is
the same on the host, for rows of which the host knows everything. Bytes: some 40 a row.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from baton.kernels.triton.launch import next_power_of_2, require

ITEM_ROWS = 16
"""The narrow side of a matrix instruction."""
COLUMNS = 4
"""Numbers of an item; the last is of use in the first item."""
MOST_ROWS, AT_ONCE = 1024, 16


@dataclass(frozen=True, slots=True)
class AdapterRows:
    """What the kernels of adapters read of M rows, int32."""

    adapters: torch.Tensor  # [M]
    order: torch.Tensor  # [M]
    items: torch.Tensor  # [most items, COLUMNS]

    @classmethod
    def make(cls, num_rows: int, num_slots: int, device: str) -> AdapterRows:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        items = most_items(num_rows, num_slots)
        return cls(zeros(num_rows), zeros(num_rows), zeros(items, COLUMNS))

    def first(self, num_rows: int, num_slots: int) -> AdapterRows:
        """The first rows, in the same memory."""
        items = self.items[: most_items(num_rows, num_slots)]
        return AdapterRows(self.adapters[:num_rows], self.order[:num_rows], items)


def most_items(num_rows: int, num_slots: int) -> int:
    """Items of so many rows at most."""
    return min(num_rows, min(num_rows, num_slots) + num_rows // ITEM_ROWS)


class AdapterArrays(NamedTuple):
    """An AdapterRows on the host."""

    adapters: np.ndarray
    order: np.ndarray
    items: np.ndarray


def laid_out(adapters: np.ndarray, num_items: int) -> AdapterArrays:
    """Of rows with adapters in these slots, int32 [M]; with room for so many items."""
    order = np.argsort(adapters, kind="stable").astype(np.int32)
    order = order[np.count_nonzero(adapters < 0) :]
    slots, starts, counts = np.unique(adapters[order], return_index=True, return_counts=True)
    items = np.zeros((num_items, COLUMNS), dtype=np.int32)
    found = [
        (slot, start + done, min(ITEM_ROWS, count - done))
        for slot, start, count in zip(slots.tolist(), starts.tolist(), counts.tolist(), strict=True)
        for done in range(0, count, ITEM_ROWS)
    ]
    if found:
        items[: len(found), :3] = found
        items[0, 3] = len(found)
    padded = np.zeros(len(adapters), dtype=np.int32)
    padded[: len(order)] = order
    return AdapterArrays(adapters.astype(np.int32), padded, items)


@triton.jit
def _slot_of(index_ptr, table_ptr, row, num_rows):
    """Of rows past the last -1."""
    index = tl.load(index_ptr + row, mask=row < num_rows, other=0)
    return tl.load(table_ptr + index, mask=row < num_rows, other=-1)


@triton.jit(do_not_specialize=["num_rows", "num_items"])
def _group_rows_kernel(
    index_ptr, table_ptr, adapters_ptr, order_ptr, items_ptr, begins_ptr, num_rows, num_items, BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr, ITEM_ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    NEVER: tl.constexpr = 1 << 30
    row = tl.arange(0, BLOCK)
    slot = _slot_of(index_ptr, table_ptr, row, num_rows)
    tl.store(adapters_ptr + row, slot, mask=row < num_rows)
    adapted = slot >= 0
    lower = tl.zeros([BLOCK], tl.int32)  # rows of lower slots
    within = tl.zeros([BLOCK], tl.int32)  # rows of the same slot before this one
    same = tl.zeros([BLOCK], tl.int32)
    for first in tl.range(0, num_rows, AT_ONCE):
        other = first + tl.arange(0, AT_ONCE)
        of_other = _slot_of(index_ptr, table_ptr, other, num_rows)[None, :]
        equal = of_other == slot[:, None]
        lower += tl.sum(((of_other >= 0) & (of_other < slot[:, None])).to(tl.int32), 1)
        same += tl.sum(equal.to(tl.int32), 1)
        within += tl.sum((equal & (other[None, :] < row[:, None])).to(tl.int32), 1)
    place = lower + within
    begins = adapted & (within % ITEM_ROWS == 0)
    tl.store(order_ptr + place, row, mask=adapted)
    tl.store(begins_ptr + row, tl.where(begins, place, NEVER), mask=row < num_rows)
    tl.store(items_ptr + row * COLUMNS + 2, tl.zeros([BLOCK], tl.int32), mask=row < num_items)
    tl.store(items_ptr + 3, tl.sum(begins.to(tl.int32), 0))
    tl.debug_barrier()  # what others of this program wrote is read below
    item = tl.zeros([BLOCK], tl.int32)  # items that begin before this row's place
    for first in tl.range(0, num_rows, AT_ONCE):
        other = first + tl.arange(0, AT_ONCE)
        begun = tl.load(begins_ptr + other, mask=other < num_rows, other=NEVER)[None, :]
        item += tl.sum((begun < place[:, None]).to(tl.int32), 1)
    tl.store(items_ptr + item * COLUMNS, slot, mask=begins)
    tl.store(items_ptr + item * COLUMNS + 1, place, mask=begins)
    tl.store(items_ptr + item * COLUMNS + 2, tl.minimum(same - within, ITEM_ROWS), mask=begins)


def group_rows(index: torch.Tensor, table: torch.Tensor, begins: torch.Tensor, out: AdapterRows) -> None:
    """Fills `out` for M rows; index and table int32, begins int32 [M] or more: memory for this call alone."""
    num_rows, num_items = len(index), len(out.items)
    require(num_rows <= MOST_ROWS, f"{num_rows} rows are grouped, at most {MOST_ROWS} can be")
    require(len(out.adapters) == len(out.order) == num_rows and len(begins) >= num_rows, "memory of other sizes")
    for tensor in (index, table, begins, out.adapters, out.order, out.items):
        require(tensor.dtype == torch.int32 and tensor.is_contiguous(), "rows must be int32 and contiguous")
    if num_rows == 0:
        return
    _group_rows_kernel[(1,)](
        index, table, out.adapters, out.order, out.items, begins, num_rows, num_items,
        BLOCK=max(16, next_power_of_2(num_rows)), AT_ONCE=AT_ONCE, ITEM_ROWS=ITEM_ROWS, COLUMNS=COLUMNS,
        num_warps=8,
    )  # fmt: skip
