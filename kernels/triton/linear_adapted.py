"""y = x W^T (+ b) + B t of one row of x, where t = A x is made beside it: `low_rank` with `beside`.

W streams through registers as in `linear`; B of the row's adapter is asked for behind the first block of it. The kernel
begins once x is there and waits for t behind the sum alone, so that one launch lies between x and y, not two.
fused: as in `linear`. Bytes: W, and max_rank / K of it once more.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.triton.activation import activated
from baton.kernels.triton.launch import launch_options, require
from baton.kernels.triton.linear import row_product
from baton.kernels.triton.linear_policy import Tiles
from baton.kernels.triton.low_rank import AddedProduct, ends, part_of


@triton.jit
def _added_to_tile(hidden_ptr, b, rank, part, PARTS: tl.constexpr, WIDTH: tl.constexpr, MAX_RANK: tl.constexpr):
    """B t, [TILE_N]: the parts of K in order."""
    r = tl.arange(0, MAX_RANK)
    place = hidden_ptr + part * MAX_RANK + r
    total = tl.load(place, mask=r < rank, other=0.0)
    for number in tl.static_range(1, PARTS):
        total += tl.load(place + number * WIDTH, mask=r < rank, other=0.0)
    return tl.sum(b.to(tl.float32) * total.to(b.dtype).to(tl.float32)[None, :], 1)


@triton.jit(do_not_specialize=["site", "b_offset"])
def _linear_adapted_row_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, hidden_ptr, numbers_ptr, ranks_ptr, adapters_ptr, site, b_offset,
    N: tl.constexpr, K: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, FUSED: tl.constexpr,
    GELU: tl.constexpr, BIAS: tl.constexpr, SLOT_SIZE: tl.constexpr, SITES: tl.constexpr, END0: tl.constexpr,
    END1: tl.constexpr, PARTS: tl.constexpr, WIDTH: tl.constexpr, MAX_RANK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Slots, ranks and matrices were written before the chain of early launches began."""
    if PDL:
        gdc_launch_dependents()
    first_n = tl.program_id(0) * TILE_N
    n = first_n + tl.arange(0, TILE_N)
    place = weight_ptr + n[:, None].to(tl.int64) * K + tl.arange(0, TILE_K)[None, :]
    weight = tl.load(place, eviction_policy="evict_first")
    up_place = place + N * K if FUSED else place
    up_weight = tl.load(up_place, eviction_policy="evict_first") if FUSED else weight
    slot = tl.load(adapters_ptr)
    rank = tl.multiple_of(tl.load(ranks_ptr + slot * SITES + site, mask=slot >= 0, other=0), 16)
    r = tl.arange(0, MAX_RANK)
    b_place = numbers_ptr + slot.to(tl.int64) * SLOT_SIZE + rank.to(tl.int64) * b_offset
    b_place += n[:, None] * rank + r[None, :]
    b = tl.load(b_place, mask=(r < rank)[None, :], other=0.0)
    if FUSED:
        up_b = tl.load(b_place + N * rank, mask=(r < rank)[None, :], other=0.0)
    result, other = row_product(x_ptr, place, up_place, weight, up_weight, K, TILE_K, FUSED)
    if PDL:
        gdc_wait()
    result += _added_to_tile(hidden_ptr, b, rank, part_of(first_n, END0, END1), PARTS, WIDTH, MAX_RANK)
    if FUSED:
        other += _added_to_tile(hidden_ptr, up_b, rank, part_of(N + first_n, END0, END1), PARTS, WIDTH, MAX_RANK)
        result = activated(result, GELU) * other
    if BIAS:
        result += tl.load(bias_ptr + n).to(tl.float32)
    tl.store(out_ptr + n, result.to(out_ptr.dtype.element_ty))


def linear_adapted_row(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tiles: Tiles,
    out: torch.Tensor,
    added: AddedProduct,
    *,
    fused: bool = False,
    gelu: bool = False,
    pdl: bool = False,
) -> None:
    """Fills out [1, N]; x [1, K], weight [N, K] ([2 N, K] when fused), bias [N] or None. pdl: `added` is beside."""
    k, n = weight.shape[1], out.shape[1]
    bank, site, hidden = added.bank, added.site, added.hidden
    require(tuple(x.shape) == (1, k) and tuple(out.shape) == (1, n), f"{x.shape[0]} rows, and {out.shape[0]}")
    require(len(weight) == site.ends[-1] == n * (2 if fused else 1) and k == site.inputs, "a site of another product")
    require(tiles.tile_m == 0 and k % tiles.tile_k == 0, f"{tiles} are not for one row of {k}")
    require(all(end % tiles.tile_n == 0 for end in site.ends), f"{tiles} do not divide parts that end at {site.ends}")
    require(hidden.shape[1:] == (1, bank.rank_width(site)), "t of other rows")
    require(not fused or (bias is None and len(site.ends) == 2), "a fused product is of gate and up, without a bias")
    require(bias is None or bias.shape == (n,), "bias is not [N]")
    require(added.beside or not pdl, "what is added is not made beside")
    for tensor in (x, weight, out, bias):
        require(tensor is None or tensor.is_contiguous(), "tensors must be contiguous")
    _linear_adapted_row_kernel[(n // tiles.tile_n,)](
        x, weight, weight if bias is None else bias, out, hidden, bank.numbers, bank.ranks, added.rows.adapters,
        site.number, site.b_offset, N=n, K=k, TILE_N=tiles.tile_n, TILE_K=tiles.tile_k, FUSED=fused, GELU=gelu,
        BIAS=bias is not None, SLOT_SIZE=bank.numbers.shape[1], SITES=bank.ranks.shape[1], **ends(site),
        PARTS=hidden.shape[0], WIDTH=bank.rank_width(site), MAX_RANK=bank.max_rank, PDL=pdl,
        **launch_options(tiles.warps, pdl, 1),
    )  # fmt: skip
