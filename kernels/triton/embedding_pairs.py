"""What adapters add to embeddings of tokens: out[row] += B A[token of row], each row with the matrices of its adapter.

A slot holds A of the embedding by tokens, [vocab, rank], so that a row reads one run of it, then B [hidden, rank], both
packed by the adapter's own rank. Items of rows are those of `low_rank`, which some programs for each tile of B go
through in turn; a row's bits do not depend on its neighbours. Bytes: B of each adapter in the step, once, and of A a
run for each row.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from baton.kernels.triton.adapter_rows import COLUMNS, ITEM_ROWS, AdapterRows
from baton.kernels.triton.launch import require
from baton.kernels.triton.low_rank import AdapterBank, BankSite, load_item

PROGRAMS = 64
"""That go through the items, for each tile of B, at most."""


@triton.jit(do_not_specialize=["site", "a_offset", "b_offset"])
def _embed_ranks_kernel(
    tokens_ptr, numbers_ptr, ranks_ptr, order_ptr, items_ptr, out_ptr, site, a_offset, b_offset,
    SLOT_SIZE: tl.constexpr, SITES: tl.constexpr, N: tl.constexpr, MAX_RANK: tl.constexpr, TILE_N: tl.constexpr,
    ITEM_ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(1) * TILE_N + tl.arange(0, TILE_N)
    r = tl.arange(0, MAX_RANK)
    num_items = tl.load(items_ptr + 3)
    for number in tl.range(tl.program_id(0), num_items, tl.num_programs(0), num_stages=1):
        slot, rank, row, there = load_item(
            items_ptr, order_ptr, ranks_ptr, number, num_items, site, SITES, ITEM_ROWS, COLUMNS
        )
        if rank > 0:
            slot_ptr, own = numbers_ptr + slot * SLOT_SIZE, (r < rank)[None, :]
            b_place = slot_ptr + rank.to(tl.int64) * b_offset + n[:, None] * rank + r[None, :]
            b = tl.load(b_place, mask=own, other=0.0)
            token = tl.load(tokens_ptr + row, mask=there, other=0)
            a_place = slot_ptr + rank.to(tl.int64) * a_offset + token[:, None] * rank + r[None, :]
            a = tl.load(a_place, mask=there[:, None] & own, other=0.0)
            target = out_ptr + row.to(tl.int64)[None, :] * N + n[:, None]
            total = tl.load(target, mask=there[None, :], other=0.0).to(tl.float32)
            total = tl.dot(b, a.T, total, input_precision="ieee")
            tl.store(target, total.to(out_ptr.dtype.element_ty), mask=there[None, :])


def embed_pairs(tokens: torch.Tensor, bank: AdapterBank, site: BankSite, rows: AdapterRows, out: torch.Tensor) -> None:
    """Adds to out [M, hidden], rows of the embedding of tokens, int32 [M]; inputs of the site are the vocabulary."""
    num_rows, n = out.shape
    require(len(tokens) == len(rows.adapters) == num_rows, f"{len(tokens)} tokens for {num_rows} rows")
    tile_n = next((size for size in (128, 64, 32, 16) if n % size == 0), 0)
    require(site.ends == (n,) and tile_n > 0, f"{n} outputs, a site of {site}")
    for tensor in (tokens, bank.numbers, bank.ranks, out):
        require(tensor.is_contiguous(), "tensors must be contiguous")
    if len(rows.items):
        _embed_ranks_kernel[(min(len(rows.items), PROGRAMS), n // tile_n)](
            tokens, bank.numbers, bank.ranks, rows.order, rows.items, out, site.number, site.a_offset, site.b_offset,
            SLOT_SIZE=bank.numbers.shape[1], SITES=bank.ranks.shape[1], N=n, MAX_RANK=bank.max_rank, TILE_N=tile_n,
            ITEM_ROWS=ITEM_ROWS, COLUMNS=COLUMNS,
        )  # fmt: skip
