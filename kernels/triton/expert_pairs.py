"""What adapters add to products with experts: y[p] += B_e (A_e x), p the row of a token's choice e in the order of
`route`.

A slot has of each expert of a product A_e [parts * rank, K], one behind another, then B_e [N, rank]. A program has one
choice of one token, and one part of the ranks or one tile of N: no row waits for another, and all sums are in float32,
in one order. Choices of tokens without an adapter, and of experts that another rank holds, end at once. Bytes: A_e and
B_e of each choice, of which some come from the L2 cache.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.triton.launch import launch_options, require
from baton.kernels.triton.low_rank import RANK_STEP, AdapterBank, BankSite, ends, part_of
from baton.kernels.triton.route import Routes

VALUES_A_TILE = 8192
"""Of B, in registers."""


class ExpertPairs(NamedTuple):
    """Of one product of T tokens."""

    bank: AdapterBank
    site: BankSite
    """Inputs and ends of one expert."""
    adapters: torch.Tensor  # int32 [T]: slots, below 0: none


class MadePairs(NamedTuple):
    """What a product with experts adds to its rows."""

    values: torch.Tensor  # [P, N]
    adapters: torch.Tensor  # int32 [T]: below 0, the values of the token's rows are not defined and nothing is added


@triton.jit
def _choice(
    pair, ranks_ptr, adapters_ptr, positions_ptr, experts_ptr, site, SITES: tl.constexpr, CHOICES: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):  # fmt: skip
    """Whether something may be added to it, and the slot, rank, row and expert."""
    slot = tl.load(adapters_ptr + pair // CHOICES)
    position = tl.load(positions_ptr + pair)
    there = (slot >= 0) & (position >= 0)
    rank = tl.load(ranks_ptr + slot * SITES + site, mask=there, other=0)
    expert = tl.load(experts_ptr + position // TILE_ROWS, mask=there, other=0)
    return there, slot.to(tl.int64), tl.multiple_of(rank, 16), position.to(tl.int64), expert.to(tl.int64)


@triton.jit(do_not_specialize=["site", "a_offset"])
def _shrink_experts_kernel(
    x_ptr, numbers_ptr, ranks_ptr, adapters_ptr, positions_ptr, experts_ptr, hidden_ptr, site, a_offset,
    SLOT_SIZE: tl.constexpr, SITES: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, CHOICES: tl.constexpr,
    TILE_ROWS: tl.constexpr, MAX_RANK: tl.constexpr, TILE_K: tl.constexpr, RANK_STEP: tl.constexpr,
    GATHERED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    pair = tl.program_id(0)
    part = tl.program_id(1) // (MAX_RANK // RANK_STEP)
    first_r = tl.program_id(1) % (MAX_RANK // RANK_STEP) * RANK_STEP
    _there, slot, rank, position, expert = _choice(
        pair, ranks_ptr, adapters_ptr, positions_ptr, experts_ptr, site, SITES, CHOICES, TILE_ROWS
    )
    if first_r < rank:
        r, column = tl.arange(0, RANK_STEP), tl.arange(0, TILE_K)
        row = pair.to(tl.int64) // CHOICES if GATHERED else position
        matrix = numbers_ptr + slot * SLOT_SIZE + rank.to(tl.int64) * a_offset
        place = matrix + ((expert * PARTS + part) * rank + first_r + r[:, None]) * K + column[None, :]
        total = tl.zeros([RANK_STEP, TILE_K], tl.float32)
        for k in tl.range(0, K, TILE_K):
            x = tl.load(x_ptr + row * K + k + column).to(tl.float32)
            total += tl.load(place + k).to(tl.float32) * x[None, :]
        target = hidden_ptr + (pair.to(tl.int64) * PARTS + part) * MAX_RANK + first_r
        tl.store(target + r, tl.sum(total, 1))


@triton.jit(do_not_specialize=["site", "b_offset"])
def _expand_experts_kernel(
    hidden_ptr, numbers_ptr, ranks_ptr, adapters_ptr, positions_ptr, experts_ptr, out_ptr, site, b_offset,
    SLOT_SIZE: tl.constexpr, SITES: tl.constexpr, N: tl.constexpr, END0: tl.constexpr, END1: tl.constexpr,
    PARTS: tl.constexpr, CHOICES: tl.constexpr, TILE_ROWS: tl.constexpr, MAX_RANK: tl.constexpr,
    TILE_N: tl.constexpr, ADD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    pair, first_n = tl.program_id(0), tl.program_id(1) * TILE_N
    there, slot, rank, position, expert = _choice(
        pair, ranks_ptr, adapters_ptr, positions_ptr, experts_ptr, site, SITES, CHOICES, TILE_ROWS
    )
    if there:
        n, r = first_n + tl.arange(0, TILE_N), tl.arange(0, MAX_RANK)
        matrix = numbers_ptr + slot * SLOT_SIZE + rank.to(tl.int64) * b_offset
        b = tl.load(matrix + (expert * N + n[:, None]) * rank + r[None, :], mask=(r < rank)[None, :], other=0.0)
        source = hidden_ptr + (pair.to(tl.int64) * PARTS + part_of(first_n, END0, END1)) * MAX_RANK
        hidden = tl.load(source + r, mask=r < rank, other=0.0)
        total = tl.sum(b.to(tl.float32) * hidden[None, :], 1)
        place = out_ptr + position * N + n
        if ADD:
            total += tl.load(place).to(tl.float32)
        tl.store(place, total.to(out_ptr.dtype.element_ty))


def add_experts(
    x: torch.Tensor,
    pairs: ExpertPairs,
    routes: Routes,
    hidden: torch.Tensor,
    out: torch.Tensor,
    *,
    gathered: bool,
    add: bool,
    pdl: bool = False,
) -> None:
    """Adds B_e A_e x to out [P, N], or without `add` makes it, in rows of tokens with an adapter.

    x [T, K] if gathered, else [P, K]. hidden: float32, memory for this call alone, of at least T * choices *
    bank.rank_width(site).
    """
    bank, site, adapters = pairs
    (num_tokens, choices), (num_rows, n), k = routes.positions.shape, out.shape, x.shape[1]
    parts, width = len(site.ends), bank.rank_width(site)
    require(k == site.inputs and n == site.ends[-1], f"{k} inputs and {n} outputs, a site of {site}")
    require(num_rows == routes.most_tiles * routes.tile_m, f"{num_rows} rows of experts")
    require(len(x) == (num_tokens if gathered else num_rows), f"x has {len(x)} rows")
    require(len(adapters) == num_tokens, f"{len(adapters)} adapters for {num_tokens} tokens")
    require(hidden.numel() >= num_tokens * choices * width and hidden.dtype == torch.float32, "hidden does not fit")
    for tensor in (x, out, hidden, adapters, bank.numbers, bank.ranks, routes.positions):
        require(tensor.is_contiguous(), "tensors must be contiguous")
    tile_k = next((size for size in (256, 128, 64, 32, 16) if k % size == 0), 0)
    sizes = [size for size in (128, 64, 32, 16) if size * bank.max_rank <= VALUES_A_TILE]
    tile_n = next((size for size in sizes if all(end % size == 0 for end in site.ends)), 0)
    require(tile_k > 0 and tile_n > 0, f"{k} inputs, or outputs {site.ends}, are no multiples of 16")
    if num_tokens == 0:
        return
    places = bank.numbers, bank.ranks, adapters, routes.positions, routes.experts
    constants = {
        "SLOT_SIZE": bank.numbers.shape[1], "SITES": bank.ranks.shape[1], "PARTS": parts, "CHOICES": choices,
        "TILE_ROWS": routes.tile_m, "MAX_RANK": bank.max_rank, "PDL": pdl,
    }  # fmt: skip
    _shrink_experts_kernel[(num_tokens * choices, width // RANK_STEP)](
        x, *places, hidden, site.number, site.a_offset, K=k, TILE_K=tile_k, RANK_STEP=RANK_STEP, GATHERED=gathered,
        **constants, **launch_options(4, pdl),
    )  # fmt: skip
    _expand_experts_kernel[(num_tokens * choices, n // tile_n)](
        hidden, *places, out, site.number, site.b_offset, N=n, **ends(site), TILE_N=tile_n, ADD=add, **constants,
        **launch_options(4, pdl),
    )  # fmt: skip
