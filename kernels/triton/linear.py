"""y = x W^T (+ b) for the few rows of a decode step, where the time is that of reading W once.

W is [N, K] as in the checkpoint, x [M, K]. Two kernels; `linear_policy` says which and with which tiles.
  * Several rows: a tile of W is the large operand of the warpgroup's matrix instruction and x the narrow one (operands
    exchanged), so that 16 rows cost one narrow product. With splits > 1 the float32 parts [splits, M, N] are left to
    the kernel that reads them (norm, rope_and_write), which adds them in order: no launch, no atomics.
  * One row: W streams through registers.
fused: W is [gate; up], [2 N, K], and y = silu(gate) * up (or gelu_tanh), so that the wide product never reaches memory.
added: what adapters add to x W^T, of which `low_rank` made the first half; the first split adds it.
K is summed in steps of 16 in one order whatever the tiles, so with one number of splits a row's bits are the same for
every M (checked on an H200). With pdl the first columns of W are asked for before the kernel before has ended: weights
do not depend on it. Bytes: W, N * K * element size (twice that when fused).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from baton.kernels.triton.activation import activated
from baton.kernels.triton.launch import launch_options, require
from baton.kernels.triton.linear_policy import Tiles
from baton.kernels.triton.low_rank import AddedProduct, add_low_rank, ends, load_hidden, part_of, row_low_rank


@triton.jit
def prefetch(ptr, stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Asks the L2 cache for ROWS x COLUMNS elements of 16 bits, one instruction each 128 bytes."""
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, COLUMNS // 64)[None, :]
    address = (ptr + row * stride + column * 64).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [address], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit(do_not_specialize=["num_rows", "site", "b_offset"])
def _linear_rows_kernel(
    x_desc, weight_desc, weight_ptr, bias_ptr, out_ptr, hidden_ptr, numbers_ptr, ranks_ptr, adapters_ptr, groups_ptr,
    num_rows, site, b_offset, N: tl.constexpr, K: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
    TILE_M: tl.constexpr, SPLITS: tl.constexpr, FUSED: tl.constexpr, GELU: tl.constexpr, BIAS: tl.constexpr,
    PREFETCH: tl.constexpr, ADDED: tl.constexpr, SLOT_SIZE: tl.constexpr, SITES: tl.constexpr, PARTS: tl.constexpr,
    WIDTH: tl.constexpr, MAX_RANK: tl.constexpr, END0: tl.constexpr, END1: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    first_m = tl.program_id(0) * TILE_M
    first_n = tl.program_id(1) * TILE_N
    split = tl.program_id(2)
    first_k = split * (K // SPLITS)
    if PDL:
        gdc_launch_dependents()
        if PREFETCH > 0:
            prefetch(weight_ptr + first_n.to(tl.int64) * K + first_k, K, TILE_N, PREFETCH)
            if FUSED:
                prefetch(weight_ptr + (N + first_n).to(tl.int64) * K + first_k, K, TILE_N, PREFETCH)
        gdc_wait()
    total = tl.zeros([TILE_N, TILE_M], tl.float32)
    n = first_n + tl.arange(0, TILE_N)
    m = first_m + tl.arange(0, TILE_M)
    if FUSED:
        up = tl.zeros([TILE_N, TILE_M], tl.float32)
        for k in tl.range(first_k, first_k + K // SPLITS, TILE_K):
            x = x_desc.load([first_m, k])
            total = tl.dot(weight_desc.load([first_n, k]), x.T, total, input_precision="ieee")
            up = tl.dot(weight_desc.load([N + first_n, k]), x.T, up, input_precision="ieee")
        if ADDED:
            total = add_low_rank(
                total, hidden_ptr, numbers_ptr, ranks_ptr, adapters_ptr, groups_ptr, m, num_rows, n, 0, site, b_offset,
                SLOT_SIZE, SITES, PARTS, WIDTH, MAX_RANK,
            )  # fmt: skip
            up = add_low_rank(
                up, hidden_ptr, numbers_ptr, ranks_ptr, adapters_ptr, groups_ptr, m, num_rows, N + n, 1, site, b_offset,
                SLOT_SIZE, SITES, PARTS, WIDTH, MAX_RANK,
            )  # fmt: skip
        total = activated(total, GELU) * up
    else:
        for k in tl.range(first_k, first_k + K // SPLITS, TILE_K):
            x = x_desc.load([first_m, k])
            total = tl.dot(weight_desc.load([first_n, k]), x.T, total, input_precision="ieee")
        if BIAS:  # noqa: SIM102 - known when compiling, the next one is not
            if split == 0:
                total += tl.load(bias_ptr + n).to(tl.float32)[:, None]
        if ADDED:  # noqa: SIM102 - as above
            if split == 0:
                total = add_low_rank(
                    total, hidden_ptr, numbers_ptr, ranks_ptr, adapters_ptr, groups_ptr, m, num_rows, n,
                    part_of(first_n, END0, END1), site, b_offset, SLOT_SIZE, SITES, PARTS, WIDTH, MAX_RANK,
                )  # fmt: skip
    place = out_ptr + split.to(tl.int64) * num_rows * N + m[None, :].to(tl.int64) * N + n[:, None]
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=(m < num_rows)[None, :])


@triton.jit
def row_product(x_ptr, place, up_place, weight, up_weight, K: tl.constexpr, TILE_K: tl.constexpr, FUSED: tl.constexpr):
    """Of one row x [K] with the rows of W whose columns `place` points to, and with those of `up_place`; [TILE_N] each.
    weight and up_weight: their first blocks. One block is always on its way: the next is asked for before the last is
    used. Without FUSED the second is without meaning."""
    column = tl.arange(0, TILE_K)
    total = tl.zeros(weight.shape, tl.float32)
    up = tl.zeros(weight.shape, tl.float32)
    for k in tl.range(0, K, TILE_K, num_stages=1, loop_unroll_factor=2):
        following = tl.where(k + TILE_K < K, k + TILE_K, 0)
        used = weight.to(tl.float32)
        weight = tl.load(place + following, eviction_policy="evict_first")
        x = tl.load(x_ptr + k + column).to(tl.float32)
        total += used * x[None, :]
        if FUSED:
            used = up_weight.to(tl.float32)
            up_weight = tl.load(up_place + following, eviction_policy="evict_first")
            up += used * x[None, :]
    return tl.sum(total, 1), tl.sum(up, 1)


@triton.jit(do_not_specialize=["site", "b_offset"])
def _linear_row_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, hidden_ptr, numbers_ptr, ranks_ptr, adapters_ptr, site, b_offset,
    N: tl.constexpr, K: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, FUSED: tl.constexpr,
    GELU: tl.constexpr, BIAS: tl.constexpr, ADDED: tl.constexpr, SLOT_SIZE: tl.constexpr, SITES: tl.constexpr,
    PARTS: tl.constexpr, WIDTH: tl.constexpr, MAX_RANK: tl.constexpr, END0: tl.constexpr, END1: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
    column = tl.arange(0, TILE_K)
    place = weight_ptr + n[:, None].to(tl.int64) * K + column[None, :]
    weight = tl.load(place, eviction_policy="evict_first")
    up_place = place + N * K if FUSED else place
    up_weight = tl.load(up_place, eviction_policy="evict_first") if FUSED else weight
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if ADDED:
        slot = tl.load(adapters_ptr)
        one = tl.arange(0, 1)
        part = part_of(tl.program_id(0) * TILE_N, END0, END1)
        hidden = load_hidden(hidden_ptr, one, one == 0, 1, 0 if FUSED else part, PARTS, WIDTH, MAX_RANK)
        added = row_low_rank(hidden, numbers_ptr, ranks_ptr, slot, n, site, b_offset, SLOT_SIZE, SITES, MAX_RANK)
        if FUSED:
            hidden = load_hidden(hidden_ptr, one, one == 0, 1, 1, PARTS, WIDTH, MAX_RANK)
            up_added = row_low_rank(
                hidden, numbers_ptr, ranks_ptr, slot, N + n, site, b_offset, SLOT_SIZE, SITES, MAX_RANK
            )
    result, other = row_product(x_ptr, place, up_place, weight, up_weight, K, TILE_K, FUSED)
    if ADDED:
        result += added
    if FUSED:
        if ADDED:
            other += up_added
        result = activated(result, GELU) * other
    if BIAS:
        result += tl.load(bias_ptr + n).to(tl.float32)
    tl.store(out_ptr + n, result.to(out_ptr.dtype.element_ty))


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    tiles: Tiles,
    out: torch.Tensor,
    *,
    fused: bool = False,
    gelu: bool = False,
    added: AddedProduct | None = None,
    pdl: bool = False,
) -> None:
    """Fills out [M, N], or [splits, M, N] float32; x [M, K], weight [N, K] ([2 N, K] when fused), bias [N] or None.

    The tiles must divide N and K / splits, and with `added` its parts. A fused product has one split and no bias; its
    activation is silu, or with `gelu` gelu_tanh.
    """
    num_rows, k = x.shape
    n = weight.shape[0] // (2 if fused else 1)
    shape = (num_rows, n) if tiles.splits == 1 and out.dim() == 2 else (tiles.splits, num_rows, n)
    require(weight.shape[1] == k and tuple(out.shape) == shape, f"out {tuple(out.shape)} is not {shape}")
    require(tiles.splits == 1 or out.dtype == torch.float32, "parts of a sum must be float32")
    require(n % tiles.tile_n == 0 and k % (tiles.splits * tiles.tile_k) == 0, f"{tiles} do not divide [{n}, {k}]")
    require(not fused or (tiles.splits == 1 and bias is None), "a fused product has one split and no bias")
    require(bias is None or bias.shape == (n,), "bias is not [N]")
    for tensor in (x, weight, out, bias):
        require(tensor is None or tensor.is_contiguous(), "tensors must be contiguous")
    if num_rows == 0:
        return
    sums = weight if bias is None else bias
    hidden, numbers, ranks, adapters, groups, site, b_offset, constants = _added(added, x, weight, tiles)
    if tiles.tile_m == 0:
        require(num_rows == 1 and tiles.splits == 1, "these tiles are for one row")
        _linear_row_kernel[(n // tiles.tile_n,)](
            x, weight, sums, out, hidden, numbers, ranks, adapters, site, b_offset, N=n, K=k, TILE_N=tiles.tile_n,
            TILE_K=tiles.tile_k, FUSED=fused, GELU=gelu, BIAS=bias is not None, **constants, PDL=pdl,
            **launch_options(tiles.warps, pdl, 1),
        )  # fmt: skip
        return
    _linear_rows_kernel[(triton.cdiv(num_rows, tiles.tile_m), n // tiles.tile_n, tiles.splits)](
        TensorDescriptor.from_tensor(x, [tiles.tile_m, tiles.tile_k]),
        TensorDescriptor.from_tensor(weight, [tiles.tile_n, tiles.tile_k]),
        weight, sums, out, hidden, numbers, ranks, adapters, groups, num_rows, site, b_offset, N=n, K=k,
        TILE_N=tiles.tile_n, TILE_K=tiles.tile_k, TILE_M=tiles.tile_m, SPLITS=tiles.splits, FUSED=fused, GELU=gelu,
        BIAS=bias is not None, PREFETCH=tiles.prefetch, **constants, PDL=pdl,
        **launch_options(tiles.warps, pdl, tiles.stages),
    )  # fmt: skip


def _added(
    added: AddedProduct | None, x: torch.Tensor, weight: torch.Tensor, tiles: Tiles
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, int, dict[str, int]]:
    """The arguments of a launch that stand for what adapters add; without it, tensors that nothing reads."""
    if added is None:
        names = ("ADDED", "SLOT_SIZE", "SITES", "PARTS", "WIDTH", "MAX_RANK", "END0", "END1")
        return x, x, x, x, x, 0, 0, dict.fromkeys(names, 0)
    bank, site, rows, hidden = added.bank, added.site, added.rows, added.hidden
    require(len(rows.adapters) == len(x) == hidden.shape[1], "what adapters add is of other rows")
    require(site.inputs == x.shape[1] and site.ends[-1] == len(weight), "what adapters add is of another product")
    require(all(end % tiles.tile_n == 0 for end in site.ends), f"{tiles} do not divide parts that end at {site.ends}")
    constants = {
        "ADDED": 1,
        "SLOT_SIZE": bank.numbers.shape[1],
        "SITES": bank.ranks.shape[1],
        "PARTS": len(hidden),
        "WIDTH": hidden.shape[2],
        "MAX_RANK": bank.max_rank,
        **ends(site),
    }
    return hidden, bank.numbers, bank.ranks, rows.adapters, rows.groups, site.number, site.b_offset, constants
