"""The inputs of a decode step, gathered on the GPU from what it keeps for each slot; and bringing that up to date.

    token[r] = given[r] if given[r] >= 0 else last[slot[r]]        the token to compute: given, or drawn last
    at[r] = max(position[r], 0);  length[r] = position[r] + 1
    kv_slot[r] = tables[slot[r], at // block_tokens] * block_tokens + at % block_tokens
    table[r, :used] = tables[slot[r], :used],  used = ceil(length / block_tokens)

A position below 0 is a row of padding: length 0, kv_slot -1, token 0. `set_entries` scatters; the indices of one call
differ, but for the slot that padding shares and no kernel reads. Bytes: the tables in use, twice.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from baton.kernels.triton.launch import cdiv, require

COPIED, SCATTERED = 256, 256


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What the kernels of a step read, int32; a view of the first rows serves a smaller step."""

    tokens: torch.Tensor  # [rows]
    positions: torch.Tensor  # [rows]; 0 for padding
    lengths: torch.Tensor  # [rows]
    kv_slots: torch.Tensor  # [rows]
    tables: torch.Tensor  # [rows, blocks of the longest sequence]

    @classmethod
    def make(cls, num_rows: int, table_width: int, device: str) -> StepInputs:
        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return cls(zeros(num_rows), zeros(num_rows), zeros(num_rows), zeros(num_rows), zeros(num_rows, table_width))

    def first(self, num_rows: int) -> StepInputs:
        """The first rows, in the same memory."""
        return StepInputs(
            self.tokens[:num_rows],
            self.positions[:num_rows],
            self.lengths[:num_rows],
            self.kv_slots[:num_rows],
            self.tables[:num_rows],
        )


@triton.jit
def _gather_kernel(
    slot_ptr,
    position_ptr,
    given_ptr,
    last_ptr,
    tables_ptr,
    token_out_ptr,
    position_out_ptr,
    length_out_ptr,
    kv_slot_out_ptr,
    table_out_ptr,
    tables_stride,
    table_out_stride,
    BLOCK_TOKENS: tl.constexpr,
    COPIED: tl.constexpr,
):
    row = tl.program_id(0)
    slot = tl.load(slot_ptr + row)
    position = tl.load(position_ptr + row)
    given = tl.load(given_ptr + row)
    kept = tl.load(last_ptr + slot)
    there = position >= 0
    at = tl.maximum(position, 0)
    tl.store(token_out_ptr + row, tl.where(there, tl.where(given >= 0, given, kept), 0))
    tl.store(position_out_ptr + row, at)
    tl.store(length_out_ptr + row, position + 1)
    table = tables_ptr + slot.to(tl.int64) * tables_stride
    block = tl.load(table + at // BLOCK_TOKENS)
    tl.store(kv_slot_out_ptr + row, tl.where(there, block * BLOCK_TOKENS + at % BLOCK_TOKENS, -1))
    used = tl.cdiv(position + 1, BLOCK_TOKENS)
    for start in tl.range(0, used, COPIED):
        column = start + tl.arange(0, COPIED)
        blocks = tl.load(table + column, mask=column < used, other=0)
        tl.store(table_out_ptr + row.to(tl.int64) * table_out_stride + column, blocks, mask=column < used)


@triton.jit(do_not_specialize=["count"])
def _scatter_kernel(target_ptr, index_ptr, value_ptr, count, SCATTERED: tl.constexpr):
    place = tl.program_id(0) * SCATTERED + tl.arange(0, SCATTERED)
    inside = place < count
    index = tl.load(index_ptr + place, mask=inside, other=0)
    value = tl.load(value_ptr + place, mask=inside, other=0)
    tl.store(target_ptr + index, value.to(target_ptr.dtype.element_ty), mask=inside)


def gather_inputs(
    slots: torch.Tensor,
    positions: torch.Tensor,
    given: torch.Tensor,
    last: torch.Tensor,
    tables: torch.Tensor,
    block_tokens: int,
    out: StepInputs,
) -> None:
    """slots, positions, given int32 [rows]; last int32 [slots]; tables int32 [slots, blocks of the longest]."""
    num_rows = slots.shape[0]
    require(positions.shape == given.shape == out.tokens.shape == (num_rows,), "a value a row is needed")
    require(tables.shape[0] == last.shape[0] and tables.shape[1] <= out.tables.shape[1], "tables do not fit")
    for tensor in (slots, positions, given, last, tables):
        require(tensor.dtype == torch.int32 and tensor.stride(-1) == 1, "inputs must be int32 and contiguous")
    if num_rows == 0:
        return
    _gather_kernel[(num_rows,)](
        slots,
        positions,
        given,
        last,
        tables,
        out.tokens,
        out.positions,
        out.lengths,
        out.kv_slots,
        out.tables,
        tables.stride(0),
        out.tables.stride(0),
        BLOCK_TOKENS=block_tokens,
        COPIED=COPIED,
        num_warps=4,
    )


def set_entries(target: torch.Tensor, index: torch.Tensor, value: torch.Tensor) -> None:
    """target[index[i]] = value[i]; target is one-dimensional, index int32 [n], value [n]."""
    require(target.dim() == 1 and target.is_contiguous(), "the target must be flat")
    require(index.shape == value.shape and index.dtype == torch.int32, "an int32 index for each value is needed")
    count = index.shape[0]
    if count:
        _scatter_kernel[(cdiv(count, SCATTERED),)](target, index, value, count, SCATTERED=SCATTERED, num_warps=4)
