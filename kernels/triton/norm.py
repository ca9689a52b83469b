"""Root mean square norm of each row, alone or after adding to the residual.

    added = sum_s x[s], or its norm by weights of its own, rounded
    residual = round(residual + added);  out = residual / sqrt(mean(residual**2) + eps) * weight

x is [N, width], or [S, N, width] partial sums of the matrix product before (split-K), added in the order of s: the
reduction of a split product then needs no launch of its own. Or x is what experts add, a `RoutedSum`. Everything is in
float32 between load and store. One program a row, so a row's bits do not depend on the other rows. `out` may be in
codes, for products of bytes by bytes: `quantise` says how. Where ranks share a model, `added` is the sum over ranks of
what each has, by `rank_words`.
Bytes: x and residual read, residual and out written, (S * size(x) + 3 * size(out)) * N * width.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.reference import LARGEST_CODE
from baton.kernels.triton.launch import launch_options, next_power_of_2, require
from baton.kernels.triton.quantise import CodedRows, check_codes, store_codes
from baton.kernels.triton.rank_words import (
    ExchangePhase,
    RankInbox,
    give_up,
    sum_over_ranks,
    waiting_block,
    waiting_warps,
)
from baton.kernels.triton.routed_sum import RoutedSum, routed_sum

WARPS = 16  # measured on the H200 at widths of 4096: one program reads a whole row, and there are few rows


@triton.jit(do_not_specialize=["num_rows", "first_row", "eps", "scale_stride"])
def _norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    output_weight_ptr,
    out_ptr,
    out_scales_ptr,
    rows_ptr,
    positions_ptr,
    weights_ptr,
    shared_scale_ptr,
    targets_ptr,
    words_ptr,
    counters_ptr,
    lost_ptr,
    num_rows,
    first_row,
    eps,
    scale_stride,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTIALS: tl.constexpr,
    CHOICES: tl.constexpr,
    GATED: tl.constexpr,
    OUTPUT_NORM: tl.constexpr,
    ADD: tl.constexpr,
    CODED: tl.constexpr,
    RUN: tl.constexpr,
    LARGEST: tl.constexpr,
    PDL: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    ROWS: tl.constexpr,
    ROW_WIDTH: tl.constexpr,
    PIECE_BLOCK: tl.constexpr,
    SENDS: tl.constexpr,
    ADDS: tl.constexpr,
    TAKES: tl.constexpr,
    CLOCK: tl.constexpr,
    LIMIT: tl.constexpr,
):
    row = (first_row + tl.program_id(0)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    weight = tl.load(weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if OUTPUT_NORM:
        output_weight = tl.load(output_weight_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    place = row * WIDTH + column
    total = tl.zeros([BLOCK], tl.float32)
    for part in tl.static_range(PARTIALS):
        total += tl.load(x_ptr + part * num_rows.to(tl.int64) * WIDTH + place, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        held = tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        total *= tl.load(shared_scale_ptr + row)
    if CHOICES > 0:
        total += routed_sum(rows_ptr, positions_ptr, weights_ptr, row, column, inside, WIDTH, CHOICES)
    if RANKS > 1:
        total = sum_over_ranks(
            total, tl.program_id(0), column, inside, targets_ptr, words_ptr, counters_ptr, lost_ptr, ROWS, ROW_WIDTH,
            PIECE_BLOCK, RANK, RANKS, SENDS, ADDS, TAKES, CLOCK, LIMIT,
        )  # fmt: skip
    if TAKES:
        if OUTPUT_NORM:
            inner = 1.0 / tl.sqrt(tl.sum(total * total, 0) / WIDTH + eps)
            total = (total * inner * output_weight).to(residual_ptr.dtype.element_ty).to(tl.float32)
        if ADD:
            total += held
            rounded = total.to(residual_ptr.dtype.element_ty)
            tl.store(residual_ptr + place, rounded, mask=inside)
            total = rounded.to(tl.float32)
        scale = 1.0 / tl.sqrt(tl.sum(total * total, 0) / WIDTH + eps)
        value = total * scale * weight
        if CODED:
            store_codes(value, out_ptr, out_scales_ptr, row, scale_stride, WIDTH, BLOCK, RUN, LARGEST)
        else:
            tl.store(out_ptr + place, value.to(out_ptr.dtype.element_ty), mask=inside)


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | CodedRows, *, pdl: bool = False
) -> None:
    """out = norm of the rows of x; x and out [N, width], weight [width], all contiguous."""
    _launch(x, None, weight, eps, out, pdl)


def add_rms_norm(
    x: torch.Tensor | RoutedSum,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | CodedRows,
    *,
    output_norm: torch.Tensor | None = None,
    ranks: RankInbox | None = None,
    pdl: bool = False,
) -> None:
    """As reference.add_rms_norm, into `out`; x [N, width], or partial sums [S, N, width], or what experts add; the
    others [N, width]. output_norm [width]: the norm of x by these weights is added. ranks: x is a rank's part of what
    is added; the others call with theirs."""
    _launch(x, residual, weight, eps, out, pdl, output_norm, ranks)


def _launch(
    x: torch.Tensor | RoutedSum,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    out: torch.Tensor | CodedRows,
    pdl: bool,
    output_norm: torch.Tensor | None = None,
    ranks: RankInbox | None = None,
) -> None:
    coded = isinstance(out, CodedRows)
    values = out.codes if isinstance(out, CodedRows) else out
    num_rows, width = values.shape
    run, stride = check_codes(out, num_rows, width) if isinstance(out, CodedRows) else (0, num_rows)
    routed = x if isinstance(x, RoutedSum) else None
    parts = x.shared if isinstance(x, RoutedSum) else x
    if routed is not None:
        routed.check(num_rows, width)
    if parts is not None:
        require(
            tuple(parts.shape[-2:]) == (num_rows, width), f"x {tuple(parts.shape)} does not fit {(num_rows, width)}"
        )
    require(residual is None or residual.shape == values.shape, "residual and out differ in shape")
    for each in (weight, output_norm):
        require(each is None or tuple(each.shape) == (width,), f"a weight is not [{width}]")
    for tensor in (parts, residual, weight, output_norm, values):
        require(tensor is None or tensor.is_contiguous(), "tensors must be contiguous")
    if num_rows == 0:
        return
    if ranks is not None:
        ranks.check(width, values.dtype if residual is None else residual.dtype)
    block = next_power_of_2(width) if ranks is None else waiting_block(width)
    warps = WARPS if ranks is None else waiting_warps(width, WARPS)

    def launch(first_row: int, count: int, phase: ExchangePhase) -> None:
        _norm_kernel[(count,)](
            values if parts is None else parts,
            values if residual is None else residual,
            weight,
            weight if output_norm is None else output_norm,
            values,
            out.scales if isinstance(out, CodedRows) else values,
            values if routed is None else routed.rows,
            values if routed is None else routed.routes.positions,
            values if routed is None else routed.routes.weights,
            values if routed is None else routed.routes.shared,
            values if ranks is None else ranks.targets,
            values if ranks is None else ranks.words,
            values if ranks is None else ranks.counters,
            values if ranks is None else ranks.lost,
            num_rows,
            first_row,
            eps,
            stride,
            WIDTH=width,
            BLOCK=block,
            PARTIALS=0 if parts is None else parts.shape[0] if parts.dim() == 3 else 1,
            CHOICES=0 if routed is None else routed.routes.positions.shape[1],
            GATED=routed is not None and parts is not None and routed.shared_gated,
            OUTPUT_NORM=output_norm is not None,
            ADD=residual is not None,
            CODED=coded,
            RUN=run,
            LARGEST=LARGEST_CODE[values.dtype] if coded else 0.0,
            PDL=pdl,
            RANK=0 if ranks is None else ranks.rank,
            RANKS=1 if ranks is None else ranks.count,
            ROWS=1 if ranks is None else ranks.rows,
            ROW_WIDTH=1 if ranks is None else ranks.words.shape[3],
            PIECE_BLOCK=block // ranks.count if ranks is not None and ranks.two_steps else 0,
            SENDS=phase.sends,
            ADDS=phase.adds,
            TAKES=phase.takes,
            **({"CLOCK": False, "LIMIT": 0} if ranks is None else give_up(ranks.words)),
            **launch_options(warps, pdl),
        )

    if ranks is None:
        launch(0, num_rows, ExchangePhase(False, False, True))
        return
    for first_row in range(0, num_rows, ranks.rows):
        for phase in ranks.phases():
            ranks.between(phase)
            launch(first_row, min(ranks.rows, num_rows - first_row), phase)
