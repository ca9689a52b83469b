"""Log probabilities of given tokens, their ranks, and the likeliest tokens, from the raw logits of some rows.

    logprob[v] = logits[v] - log(sum over w of exp(logits[w])),  rank[v] = 1 + number of w with logits[w] > logits[v]

A program of the first kernel finds the sum, the rank's part and the likeliest tokens of one block, the second puts them
together in a fixed order; of equals the lowest id comes first. Bytes: the logits once. Rows of a step come in parts;
`first` is where a part's results go, no offset of a pointer, since kernels are compiled anew for other alignments.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl

from baton.kernels.triton.launch import cdiv, next_power_of_2, require
from baton.kernels.triton.logprobs import MOST, PADDED
from baton.kernels.triton.sampling_rows import BLOCK, WARPS


@dataclass(frozen=True, slots=True)
class PromptLogprobRows:
    """The results of a step, and what the two kernels share of one part."""

    values: torch.Tensor  # float32 [results]
    ranks: torch.Tensor  # int32 [results]
    top: torch.Tensor  # float32 [results, MOST]
    top_ids: torch.Tensor  # int32 [results, MOST]
    sums: torch.Tensor  # float32 [rows, blocks, 2]: the largest, and the sum of exp(x - largest)
    likelier: torch.Tensor  # int32 [rows, blocks]
    block_top: torch.Tensor  # float32 [rows, blocks, MOST]
    block_ids: torch.Tensor  # int32 [rows, blocks, MOST]

    @classmethod
    def make(cls, num_results: int, num_rows: int, vocab_size: int, device: str) -> PromptLogprobRows:
        """For parts of up to num_rows rows."""

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        blocks, most = cdiv(vocab_size, BLOCK), MOST.value
        return cls(
            values=zeros(num_results),
            ranks=zeros(num_results, dtype=torch.int32),
            top=zeros(num_results, most),
            top_ids=zeros(num_results, most, dtype=torch.int32),
            sums=zeros(num_rows, blocks, 2),
            likelier=zeros(num_rows, blocks, dtype=torch.int32),
            block_top=zeros(num_rows, blocks, most),
            block_ids=zeros(num_rows, blocks, most, dtype=torch.int32),
        )

    @property
    def size_bytes(self) -> int:
        tensors = (getattr(self, each.name) for each in fields(self))
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@triton.jit(do_not_specialize=["first", "wanted"])
def _block_kernel(
    logits_ptr, target_ptr, sum_ptr, likelier_ptr, top_ptr, id_ptr, first, wanted,
    VOCAB: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    token = block * BLOCK + at
    target = tl.load(target_ptr + first + row).to(tl.int64)
    own = tl.load(logits_ptr + row * VOCAB + target).to(tl.float32)
    x = tl.load(logits_ptr + row * VOCAB + token, mask=token < VOCAB, other=float("-inf")).to(tl.float32)
    largest = tl.max(x, 0)
    place = row * tl.num_programs(1) + block
    tl.store(sum_ptr + place * 2, largest)
    tl.store(sum_ptr + place * 2 + 1, tl.sum(tl.exp(x - largest), 0))
    tl.store(likelier_ptr + place, tl.sum((x > own).to(tl.int32), 0))
    for number in range(0, wanted):
        value, best = tl.max(x, 0, return_indices=True)
        tl.store(top_ptr + place * MOST + number, value)
        tl.store(id_ptr + place * MOST + number, block * BLOCK + best)
        x = tl.where(at == best, float("-inf"), x)


@triton.jit(do_not_specialize=["first", "wanted"])
def _row_kernel(
    logits_ptr, target_ptr, sum_ptr, likelier_ptr, block_top_ptr, block_id_ptr,
    value_ptr, rank_ptr, top_ptr, top_id_ptr, first, wanted,
    VOCAB: tl.constexpr, BLOCKS: tl.constexpr, BLOCKS_PADDED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    result = first + row
    block = tl.arange(0, BLOCKS_PADDED)
    maxima = tl.load(sum_ptr + (row * BLOCKS + block) * 2, mask=block < BLOCKS, other=float("-inf"))
    sums = tl.load(sum_ptr + (row * BLOCKS + block) * 2 + 1, mask=block < BLOCKS, other=0.0)
    largest = tl.max(maxima, 0)
    total = largest + tl.log(tl.sum(sums * tl.exp(maxima - largest), 0))
    target = tl.load(target_ptr + result).to(tl.int64)
    tl.store(value_ptr + result, tl.load(logits_ptr + row * VOCAB + target).to(tl.float32) - total)
    tl.store(
        rank_ptr + result, 1 + tl.sum(tl.load(likelier_ptr + row * BLOCKS + block, mask=block < BLOCKS, other=0), 0)
    )
    flat = tl.arange(0, BLOCKS_PADDED * PADDED)  # in the order of ids, where values are equal
    inside = (flat // PADDED < BLOCKS) & (flat % PADDED < wanted)
    source = (row * BLOCKS + flat // PADDED) * MOST + flat % PADDED
    x = tl.load(block_top_ptr + source, mask=inside, other=float("-inf"))
    for number in range(0, wanted):
        value, best = tl.max(x, 0, return_indices=True)
        tl.store(top_ptr + result * MOST + number, value - total)
        found = tl.load(block_id_ptr + (row * BLOCKS + best // PADDED) * MOST + best % PADDED)
        tl.store(top_id_ptr + result * MOST + number, found)
        x = tl.where(flat == best, float("-inf"), x)


def prompt_logprobs(
    logits: torch.Tensor, targets: torch.Tensor, first: int, num_top: int, out: PromptLogprobRows
) -> None:
    """Writes results first .. first + rows - 1 of `out`; raw logits [rows, V], targets int32 of all results."""
    num_rows, vocab_size = logits.shape
    blocks = cdiv(vocab_size, BLOCK)
    require(logits.is_contiguous() and targets.is_contiguous(), "tensors must be contiguous")
    require(0 <= num_top <= MOST.value, "too many likeliest tokens")
    require(first + num_rows <= min(len(targets), len(out.values)), "the results do not fit")
    require(out.sums.shape[0] >= num_rows and out.sums.shape[1] == blocks, "the rows do not fit")
    if num_rows == 0:
        return
    scratch = out.sums, out.likelier, out.block_top, out.block_ids
    _block_kernel[(num_rows, blocks)](
        logits, targets, *scratch, first, num_top, VOCAB=vocab_size, BLOCK=BLOCK, num_warps=WARPS
    )
    _row_kernel[(num_rows,)](
        logits, targets, *scratch, out.values, out.ranks, out.top, out.top_ids, first, num_top,
        VOCAB=vocab_size, BLOCKS=blocks, BLOCKS_PADDED=next_power_of_2(blocks), num_warps=4,
    )  # fmt: skip
