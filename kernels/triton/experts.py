"""Products of many experts with the few rows that chose each: y[p] = x[t(p)] W_e^T, rows p in the order of `route`.

W is [E * N, K], expert e from row e * N on. A tile of rows belongs to one expert, and each program multiplies one tile
by TILE_N rows of its W, the large operand of the warpgroup's matrix instruction, as in `linear`. So only the experts
that some token chose are read. Programs are launched for `most_tiles`; what a tile is they read on the device, and
those past the last tile end at once. Tiles of one expert follow one another: its W comes from the L2 cache again.
fused: W_e is [gate; up], [2 N, K], and y = silu(gate) * up, or what `expert_gate` says. A bias is added before.
added: [P, N] ([P, 2 N] when fused) that is added before the gate, to rows of tokens with an adapter (`expert_pairs`).
gathered: x lies by token; else in the order of experts, a tile's rows one after another. One token: W streams through
registers, as in `linear`.
K is summed in steps of 16 in one order whatever the tiles, so a row's bits depend on that row alone. With pdl a product
that does not gather asks for its first columns of W early: which experts they are, the kernel before has waited for.
Bytes: W of the experts that were chosen, N * K * element size each (twice that when fused).
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from baton.kernels.clamped_gate import ClampedGate
from baton.kernels.triton.expert_gate import expert_gate
from baton.kernels.triton.expert_pairs import MadePairs
from baton.kernels.triton.launch import launch_options, require
from baton.kernels.triton.linear import prefetch, row_product
from baton.kernels.triton.linear_policy import Tiles
from baton.kernels.triton.route import Routes


@triton.jit
def _experts_rows_kernel(
    x_desc, weight_desc, x_ptr, weight_ptr, bias_ptr, added_ptr, adapters_ptr, tokens_ptr, experts_ptr, sizes_ptr,
    num_tiles_ptr, out_ptr, N: tl.constexpr, K: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr,
    TILE_M: tl.constexpr, FUSED: tl.constexpr, GATHERED: tl.constexpr, PREFETCH: tl.constexpr, BIASED: tl.constexpr,
    ADDED: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    tile, first_n = tl.program_id(0), tl.program_id(1) * TILE_N
    if PDL and GATHERED:
        gdc_wait()
        gdc_launch_dependents()
    if tile >= tl.load(num_tiles_ptr):
        return
    ROWS: tl.constexpr = 2 * N if FUSED else N
    first_row = tl.load(experts_ptr + tile) * ROWS + first_n
    if PDL and not GATHERED:
        gdc_launch_dependents()
        if PREFETCH > 0:
            prefetch(weight_ptr + first_row.to(tl.int64) * K, K, TILE_N, PREFETCH)
        gdc_wait()
    size = tl.load(sizes_ptr + tile)
    m, n, column = tl.arange(0, TILE_M), first_n + tl.arange(0, TILE_N), tl.arange(0, TILE_K)
    first_m = tile * TILE_M
    if GATHERED:
        token = tl.load(tokens_ptr + first_m + m, mask=m < size, other=0)
        x_place = x_ptr + token.to(tl.int64)[:, None] * K + column[None, :]
    total = tl.zeros([TILE_N, TILE_M], tl.float32)
    up = total
    for k in tl.range(0, K, TILE_K):
        x = tl.load(x_place + k) if GATHERED else x_desc.load([first_m, k])
        total = tl.dot(weight_desc.load([first_row, k]), x.T, total, input_precision="ieee")
        if FUSED:
            up = tl.dot(weight_desc.load([first_row + N, k]), x.T, up, input_precision="ieee")
    if BIASED:
        bias_place = bias_ptr + first_row + tl.arange(0, TILE_N)
        total += tl.load(bias_place).to(tl.float32)[:, None]
        if FUSED:
            up += tl.load(bias_place + N).to(tl.float32)[:, None]
    if ADDED:
        adds = (tl.load(adapters_ptr + token, mask=m < size, other=-1) >= 0)[None, :]
        added_place = added_ptr + (first_m + m).to(tl.int64)[None, :] * ROWS + n[:, None]
        total += tl.load(added_place, mask=adds, other=0.0).to(tl.float32)
        if FUSED:
            up += tl.load(added_place + N, mask=adds, other=0.0).to(tl.float32)
    if FUSED:
        total = expert_gate(total, up, LIMIT, ALPHA)
    place = out_ptr + (first_m + m).to(tl.int64)[None, :] * N + n[:, None]
    tl.store(place, total.to(out_ptr.dtype.element_ty), mask=(m < size)[None, :])


@triton.jit
def _experts_row_kernel(
    x_ptr, weight_ptr, bias_ptr, added_ptr, adapters_ptr, experts_ptr, num_tiles_ptr, out_ptr, N: tl.constexpr,
    K: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, FUSED: tl.constexpr, GATHERED: tl.constexpr,
    BIASED: tl.constexpr, ADDED: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One token: a tile has one row."""
    tile = tl.program_id(1)
    n, column = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N), tl.arange(0, TILE_K)
    if PDL and GATHERED:
        gdc_wait()
    if PDL:
        gdc_launch_dependents()
    if tile >= tl.load(num_tiles_ptr):
        return
    ROWS: tl.constexpr = 2 * N if FUSED else N
    first_row = tl.load(experts_ptr + tile).to(tl.int64) * ROWS
    place = weight_ptr + (first_row + n)[:, None] * K + column[None, :]
    weight = tl.load(place, eviction_policy="evict_first")
    up_place = place + N * K if FUSED else place
    up_weight = tl.load(up_place, eviction_policy="evict_first") if FUSED else weight
    if PDL and not GATHERED:
        gdc_wait()
    x_row = x_ptr if GATHERED else x_ptr + tile * K
    result, up = row_product(x_row, place, up_place, weight, up_weight, K, TILE_K, FUSED)
    if BIASED:
        result += tl.load(bias_ptr + first_row + n).to(tl.float32)
    if ADDED:
        adds = (n >= 0) & (tl.load(adapters_ptr) >= 0)
        added_place = added_ptr + tile.to(tl.int64) * ROWS + n
        result += tl.load(added_place, mask=adds, other=0.0).to(tl.float32)
        if FUSED:
            up += tl.load(added_place + N, mask=adds, other=0.0).to(tl.float32)
    if FUSED:
        if BIASED:
            up += tl.load(bias_ptr + first_row + N + n).to(tl.float32)
        result = expert_gate(result, up, LIMIT, ALPHA)
    tl.store(out_ptr + tile.to(tl.int64) * N + n, result.to(out_ptr.dtype.element_ty))


def experts(
    x: torch.Tensor,
    weight: torch.Tensor,
    routes: Routes,
    tiles: Tiles,
    out: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    clamped: ClampedGate | None = None,
    fused: bool = False,
    gathered: bool = False,
    added: MadePairs | None = None,
    pdl: bool = False,
) -> None:
    """Fills the rows of out [most_tiles * tile_m, N] that some token has.

    weight [E, N, K] ([E, 2 N, K] when fused); x [T, K] if gathered, else [most_tiles * tile_m, K]. The tiles must
    divide N and K, and have one split; tile_m 0: of one token. bias: as many as W has rows, in their order; clamped: of
    the gate, when fused. added: only where x is gathered.
    """
    k, n = weight.shape[2], weight.shape[1] // (2 if fused else 1)
    num_rows = routes.most_tiles * routes.tile_m
    require(x.shape[1] == k and tuple(out.shape) == (num_rows, n), f"out {tuple(out.shape)} is not {(num_rows, n)}")
    require(len(x) == (len(routes.positions) if gathered else num_rows), f"x has {len(x)} rows")
    require(n % tiles.tile_n == 0 and k % tiles.tile_k == 0, f"{tiles} do not divide [{n}, {k}]")
    require(tiles.splits == 1 and routes.tile_m == max(tiles.tile_m, 1), f"{tiles} for tiles of {routes.tile_m} rows")
    require(x.dtype == weight.dtype, "x and the weight differ in type")
    require(bias is None or bias.numel() == weight[..., 0].numel(), "not a bias of each row of the weight")
    for tensor in (x, weight, out, bias):
        require(tensor is None or tensor.is_contiguous(), "tensors must be contiguous")
    constants = {
        "BIASED": bias is not None,
        "ADDED": added is not None,
        "LIMIT": 0.0 if clamped is None else clamped.limit,
        "ALPHA": 1.0 if clamped is None else clamped.alpha,
    }
    bias = weight if bias is None else bias
    values, adapters = (weight, routes.tokens) if added is None else added
    require(added is None or (gathered and tuple(values.shape) == (num_rows, weight.shape[1])), "added does not fit")
    require(added is None or len(adapters) == len(x), "added of other tokens")
    if num_rows == 0:
        return
    if tiles.tile_m == 0:
        require(len(routes.positions) == 1, "these tiles are for one token")
        _experts_row_kernel[(n // tiles.tile_n, routes.most_tiles)](
            x, weight, bias, values, adapters, routes.experts, routes.num_tiles, out, N=n, K=k, TILE_N=tiles.tile_n,
            TILE_K=tiles.tile_k, FUSED=fused, GATHERED=gathered, PDL=pdl, **constants,
            **launch_options(tiles.warps, pdl, 1),
        )  # fmt: skip
        return
    weight_desc = TensorDescriptor.from_tensor(weight.view(-1, k), [tiles.tile_n, tiles.tile_k])
    x_desc = weight_desc if gathered else TensorDescriptor.from_tensor(x, [tiles.tile_m, tiles.tile_k])
    _experts_rows_kernel[(routes.most_tiles, n // tiles.tile_n)](
        x_desc, weight_desc, x, weight, bias, values, adapters, routes.tokens, routes.experts, routes.sizes,
        routes.num_tiles, out, N=n, K=k, TILE_N=tiles.tile_n, TILE_K=tiles.tile_k, TILE_M=tiles.tile_m, FUSED=fused,
        GATHERED=gathered, PREFETCH=tiles.prefetch, PDL=pdl, **constants,
        **launch_options(tiles.warps, pdl, tiles.stages),
    )  # fmt: skip
