"""The smallest value that min_p, top_k and top_p leave of each prepared row: without a sort, exact to the last bit.

    floor = max x + log min_p
    after top_k: t_k = the smallest t >= floor with  |{x > t}| < top_k
    after top_p: t_p = the smallest t >= t_k with  mass{x > t} < top_p * mass{x >= t_k},  mass of x = exp(x - max x)

Both searches are one: the smallest t at which a falling sum of weights (1, or the mass) is below a target. Floats in
the order of their bits are integers, so each pass cuts the interval (low, high] of 2**32 of them at 16 places, and
after eight passes it holds one. A program sums the weights above each place over one block of tokens; the next launch
adds the blocks in a fixed order and narrows the interval, each program for itself: no atomics, no synchronisation, the
same launches whatever the data. What equals the threshold is kept, as in kernels.reference. Sums of counts are exact;
masses are float32, so a top_p can differ from the CPU's where the sum is within rounding of it.

Rows that have no such filter end a pass at once. Bytes: a prepared row once a pass, mostly out of the L2 cache.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from baton.kernels.triton.launch import cdiv, next_power_of_2, require
from baton.kernels.triton.sampling_rows import (
    BLOCK,
    COLUMNS,
    LOG_MIN_P,
    PREPARED,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    WARPS,
    Prepared,
    SlotTables,
    table_float,
)

PLACES = tl.constexpr(16)
PASSES = 8  # 16**8 == 2**32
STATE = tl.constexpr(4)  # low, high, total as bits of a float32 (below 0: not known yet), unused


@dataclass(frozen=True, slots=True)
class FilterScratch:
    """What a pass leaves to the next; two of each, in turns."""

    state: torch.Tensor  # int64 [2, rows, STATE]
    sums: torch.Tensor  # float32 [2, rows, blocks, PLACES]
    thresholds: torch.Tensor  # float32 [rows]: the result

    @classmethod
    def make(cls, num_rows: int, vocab_size: int, device: str) -> FilterScratch:
        blocks = cdiv(vocab_size, BLOCK)
        return cls(
            torch.zeros(2, num_rows, STATE.value, dtype=torch.int64, device=device),
            torch.zeros(2, num_rows, blocks, PLACES.value, dtype=torch.float32, device=device),
            torch.zeros(num_rows, dtype=torch.float32, device=device),
        )


@triton.jit
def ordered(bits):
    """int32 bits of a float32 to an int32 of the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _largest(largest_ptr, row, BLOCKS: tl.constexpr, BLOCKS_PADDED: tl.constexpr):
    block = tl.arange(0, BLOCKS_PADDED)
    return tl.max(tl.load(largest_ptr + row * BLOCKS + block, mask=block < BLOCKS, other=float("-inf")), 0)


@triton.jit
def _narrowed(state_ptr, sum_ptr, top_k, top_p, MASS: tl.constexpr, BLOCKS: tl.constexpr, BLOCKS_PADDED: tl.constexpr):
    """(low, high, total) of a row after the pass that left this state and these sums."""
    low, high = tl.load(state_ptr), tl.load(state_ptr + 1)
    total = tl.load(state_ptr + 2).to(tl.int32).to(tl.float32, bitcast=True)
    block, number = tl.arange(0, BLOCKS_PADDED)[:, None], tl.arange(0, PLACES)[None, :]
    parts = tl.load(sum_ptr + block * PLACES + number, mask=block < BLOCKS, other=0.0)
    sums = tl.sum(parts, 0)  # [PLACES], falling
    first = tl.sum(tl.where(tl.arange(0, PLACES) == 0, sums, 0.0), 0)
    total = tl.where(total < 0.0, first, total)
    if MASS:
        target = top_p * total
    else:
        target = top_k.to(tl.float32)
    above = tl.sum((sums >= target).to(tl.int64), 0)
    step = (high - low + PLACES - 1) // PLACES
    open_ = high - low > 1
    narrow_high = tl.where(above == 0, low + 1, tl.minimum(low + above * step, high))
    narrow_low = tl.where(above == 0, low, tl.minimum(low + (above - 1) * step, high - 1))
    return tl.where(open_, narrow_low, low), tl.where(open_, narrow_high, high), total


@triton.jit
def _base(
    largest, log_min_p, top_k, state_ptr, sum_ptr, MASS: tl.constexpr, VOCAB: tl.constexpr, BLOCKS: tl.constexpr,
    BLOCKS_PADDED: tl.constexpr,
):  # fmt: skip
    """The ordered threshold that a search starts from: the floor, or for masses what top_k found. int64"""
    base = ordered((largest + log_min_p).to(tl.int32, bitcast=True)).to(tl.int64)
    if MASS:  # noqa: SIM102 - a constant: what is behind it is compiled only for masses
        if (top_k > 0) & (top_k < VOCAB):
            _, base, _ = _narrowed(state_ptr, sum_ptr, top_k, 0.0, False, BLOCKS, BLOCKS_PADDED)
    return base


@triton.jit
def _pass_kernel(
    value_ptr, largest_ptr, slot_ptr, table_ptr, old_state_ptr, old_sum_ptr, state_ptr, sum_ptr,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, BLOCKS_PADDED: tl.constexpr,
    MASS: tl.constexpr, FIRST: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    entry = table_ptr + slot * COLUMNS
    top_k, top_p = tl.load(entry + TOP_K), table_float(table_ptr, slot, TOP_P)
    wanted = (tl.load(entry + PREPARED) != 0) & (table_float(table_ptr, slot, TEMPERATURE) > 0.0)
    if MASS:
        wanted = wanted & (top_p < 1.0)
    else:
        wanted = wanted & (top_k > 0) & (top_k < VOCAB)
    if wanted == 0:
        return
    largest = _largest(largest_ptr, row, BLOCKS, BLOCKS_PADDED)
    old_state_ptr, old_sum_ptr = old_state_ptr + row * STATE, old_sum_ptr + row * BLOCKS * PLACES
    if FIRST:
        log_min_p = table_float(table_ptr, slot, LOG_MIN_P)
        base = _base(largest, log_min_p, top_k, old_state_ptr, old_sum_ptr, MASS, VOCAB, BLOCKS, BLOCKS_PADDED)
        low, high = base - 1, ordered(largest.to(tl.int32, bitcast=True)).to(tl.int64)
        total = tl.full([], -1.0, tl.float32)
    else:
        low, high, total = _narrowed(old_state_ptr, old_sum_ptr, top_k, top_p, MASS, BLOCKS, BLOCKS_PADDED)
    if block == 0:
        tl.store(state_ptr + row * STATE, low)
        tl.store(state_ptr + row * STATE + 1, high)
        tl.store(state_ptr + row * STATE + 2, total.to(tl.int32, bitcast=True).to(tl.int64))
    if (high - low > 1) | FIRST:
        token = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(value_ptr + row * VOCAB + token, mask=token < VOCAB, other=float("-inf"))
        key = ordered(x.to(tl.int32, bitcast=True))
        weight = tl.exp(x - largest) if MASS else tl.where(token < VOCAB, 1.0, 0.0)
        step = (high - low + PLACES - 1) // PLACES
        for number in tl.static_range(PLACES):
            place = tl.minimum(low + number * step, high).to(tl.int32)
            above = tl.sum(tl.where(key > place, weight, 0.0), 0)
            tl.store(sum_ptr + (row * BLOCKS + block) * PLACES + number, above)


@triton.jit
def _threshold_kernel(
    largest_ptr, slot_ptr, table_ptr, state_ptr, sum_ptr, out_ptr,
    VOCAB: tl.constexpr, BLOCKS: tl.constexpr, BLOCKS_PADDED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + row).to(tl.int64)
    entry = table_ptr + slot * COLUMNS
    if tl.load(entry + PREPARED) == 0:
        return
    if table_float(table_ptr, slot, TEMPERATURE) == 0.0:
        tl.store(out_ptr + row, float("-inf"))
        return
    top_k, top_p = tl.load(entry + TOP_K), table_float(table_ptr, slot, TOP_P)
    largest = _largest(largest_ptr, row, BLOCKS, BLOCKS_PADDED)
    state_ptr, sum_ptr = state_ptr + row * STATE, sum_ptr + row * BLOCKS * PLACES
    log_min_p = table_float(table_ptr, slot, LOG_MIN_P)
    if top_p < 1.0:
        _, found, _ = _narrowed(state_ptr, sum_ptr, top_k, top_p, True, BLOCKS, BLOCKS_PADDED)
    else:
        found = _base(largest, log_min_p, top_k, state_ptr, sum_ptr, True, VOCAB, BLOCKS, BLOCKS_PADDED)
    tl.store(out_ptr + row, ordered(found.to(tl.int32)).to(tl.float32, bitcast=True))


def thresholds(prepared: Prepared, slots: torch.Tensor, tables: SlotTables, scratch: FilterScratch) -> None:
    """Writes scratch.thresholds of the prepared rows among the first len(slots); slots int32 [rows]."""
    num_rows, vocab_size = slots.shape[0], prepared.values.shape[1]
    blocks = cdiv(vocab_size, BLOCK)
    require(slots.is_contiguous() and slots.dim() == 1, "slots must be flat and contiguous")
    require(scratch.sums.shape[1] >= num_rows and scratch.sums.shape[2] == blocks, "the scratch does not fit")
    require(prepared.values.shape[0] >= num_rows, "slots must be as many as prepared rows, or fewer")
    if num_rows == 0:
        return
    sizes = {"VOCAB": vocab_size, "BLOCKS": blocks, "BLOCKS_PADDED": next_power_of_2(blocks)}
    turn = 1
    for mass in (False, True):
        for number in range(PASSES):
            old, turn = turn, 1 - turn
            _pass_kernel[(num_rows, blocks)](
                prepared.values, prepared.largest, slots, tables.table, scratch.state[old], scratch.sums[old],
                scratch.state[turn], scratch.sums[turn], BLOCK=BLOCK, MASS=mass, FIRST=number == 0, num_warps=WARPS,
                **sizes,
            )  # fmt: skip
    _threshold_kernel[(num_rows,)](
        prepared.largest, slots, tables.table, scratch.state[turn], scratch.sums[turn], scratch.thresholds,
        num_warps=1, **sizes,
    )  # fmt: skip
