"""Log probabilities of the drawn and of the likeliest tokens, under the model: from the raw logits.

    logprob[v] = logits[v] - log(sum over w of exp(logits[w]))

For rows whose slot's NUM_TOP is 0 or more. A program of the first kernel finds the sum and the likeliest tokens of one
block, the second puts them together in a fixed order; of equals the lowest id comes first. Bytes: the logits once.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from baton.kernels.triton.launch import cdiv, next_power_of_2, require
from baton.kernels.triton.sampling_rows import BLOCK, COLUMNS, NUM_TOP, WARPS, SlotTables

MOST = tl.constexpr(20)
PADDED = tl.constexpr(32)


@dataclass(frozen=True, slots=True)
class LogprobRows:
    """The results, of rows that want them; and what the two kernels share."""

    drawn: torch.Tensor  # float32 [rows]
    top: torch.Tensor  # float32 [rows, MOST]
    top_ids: torch.Tensor  # int32 [rows, MOST]
    sums: torch.Tensor  # float32 [rows, blocks, 2]: the largest, and the sum of exp(x - largest)
    values: torch.Tensor  # float32 [rows, blocks, MOST]
    ids: torch.Tensor  # int32 [rows, blocks, MOST]

    @classmethod
    def make(cls, num_rows: int, vocab_size: int, device: str) -> LogprobRows:
        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        blocks, most = cdiv(vocab_size, BLOCK), MOST.value
        return cls(
            drawn=zeros(num_rows),
            top=zeros(num_rows, most),
            top_ids=zeros(num_rows, most, dtype=torch.int32),
            sums=zeros(num_rows, blocks, 2),
            values=zeros(num_rows, blocks, most),
            ids=zeros(num_rows, blocks, most, dtype=torch.int32),
        )


@triton.jit
def _block_kernel(
    logits_ptr, slot_ptr, table_ptr, sum_ptr, value_ptr, id_ptr, VOCAB: tl.constexpr, BLOCK: tl.constexpr
):
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    wanted = tl.load(table_ptr + tl.load(slot_ptr + row).to(tl.int64) * COLUMNS + NUM_TOP)
    if wanted < 0:
        return
    at = tl.arange(0, BLOCK)
    token = block * BLOCK + at
    x = tl.load(logits_ptr + row * VOCAB + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
    largest = tl.max(x, 0)
    place = row * tl.num_programs(1) + block
    tl.store(sum_ptr + place * 2, largest)
    tl.store(sum_ptr + place * 2 + 1, tl.sum(tl.exp(x - largest), 0))
    for number in range(0, wanted):
        value, best = tl.max(x, 0, return_indices=True)
        tl.store(value_ptr + place * MOST + number, value)
        tl.store(id_ptr + place * MOST + number, block * BLOCK + best)
        x = tl.where(at == best, float("-inf"), x)


@triton.jit
def _row_kernel(
    logits_ptr, slot_ptr, table_ptr, drawn_ptr, sum_ptr, value_ptr, id_ptr, drawn_out_ptr, top_ptr, top_id_ptr,
    VOCAB: tl.constexpr, BLOCKS: tl.constexpr, BLOCKS_PADDED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    wanted = tl.load(table_ptr + tl.load(slot_ptr + row).to(tl.int64) * COLUMNS + NUM_TOP)
    if wanted < 0:
        return
    block = tl.arange(0, BLOCKS_PADDED)
    maxima = tl.load(sum_ptr + (row * BLOCKS + block) * 2, mask=block < BLOCKS, other=float("-inf"))
    sums = tl.load(sum_ptr + (row * BLOCKS + block) * 2 + 1, mask=block < BLOCKS, other=0.0)
    largest = tl.max(maxima, 0)
    total = largest + tl.log(tl.sum(sums * tl.exp(maxima - largest), 0))
    token = tl.load(drawn_ptr + row).to(tl.int64)
    tl.store(drawn_out_ptr + row, tl.load(logits_ptr + row * VOCAB + token).to(tl.float32) - total)
    flat = tl.arange(0, BLOCKS_PADDED * PADDED)  # in the order of ids, where values are equal
    inside = (flat // PADDED < BLOCKS) & (flat % PADDED < wanted)
    source = (row * BLOCKS + flat // PADDED) * MOST + flat % PADDED
    x = tl.load(value_ptr + source, mask=inside, other=float("-inf"))
    for number in range(0, wanted):
        value, best = tl.max(x, 0, return_indices=True)
        tl.store(top_ptr + row * MOST + number, value - total)
        found = tl.load(id_ptr + (row * BLOCKS + best // PADDED) * MOST + best % PADDED)
        tl.store(top_id_ptr + row * MOST + number, found)
        x = tl.where(flat == best, float("-inf"), x)


def logprobs(
    logits: torch.Tensor, slots: torch.Tensor, drawn: torch.Tensor, tables: SlotTables, out: LogprobRows
) -> None:
    """Writes drawn, top and top_ids of the rows that want them; raw logits [rows, V], slots int32, drawn [rows]."""
    num_rows, vocab_size = logits.shape
    blocks = cdiv(vocab_size, BLOCK)
    require(logits.is_contiguous() and slots.is_contiguous() and drawn.is_contiguous(), "tensors must be contiguous")
    require(slots.shape == drawn.shape == (num_rows,), "slots and drawn tokens need one a row")
    require(out.sums.shape[0] >= num_rows and out.sums.shape[1] == blocks, "the results do not fit")
    if num_rows == 0:
        return
    _block_kernel[(num_rows, blocks)](
        logits, slots, tables.table, out.sums, out.values, out.ids, VOCAB=vocab_size, BLOCK=BLOCK, num_warps=WARPS
    )
    _row_kernel[(num_rows,)](
        logits, slots, tables.table, drawn, out.sums, out.values, out.ids, out.drawn, out.top, out.top_ids,
        VOCAB=vocab_size, BLOCKS=blocks, BLOCKS_PADDED=next_power_of_2(blocks), num_warps=4,
    )  # fmt: skip
