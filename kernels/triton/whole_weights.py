"""What adapters bring in place of weights of the model: rows of the embedding, norms and logits of the rows that have
such an adapter, written over those of the model.

    out[r]    = embedding[slot of r][token[r]]
    out[r]    = residual[r] / sqrt(mean(residual[r]**2) + eps) * norm[slot of r]       as kernels.triton.norm
    logits[r] = head[slot of r] x[r]                                                  float32 sums in a fixed order

A slot has room for all of them, and flags say which of them its adapter has; other rows are left as they are. All sizes
are fixed, so that a graph may hold the launches, and a row's bits do not depend on its neighbours. Bytes: of the
embedding and norms a row for each row of the step; of a slot's head all, for each 16 rows that hold one of the slot's.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from baton.kernels.triton.launch import cdiv, next_power_of_2, require

EMBEDDING, HEAD, FIRST_NORM = 0, 1, 2
"""Numbers of the flags of a slot; norms follow in the order of a step."""
HEAD_ROWS, HEAD_TILE = 16, 64


@dataclass(frozen=True, slots=True)
class WholeWeights:
    """Of S slots."""

    numbers: torch.Tensor  # [S, vocab * hidden | head rows * hidden | norms * hidden]
    flags: torch.Tensor  # int32 [S, 2 + norms]: 0 where the model's weight is used
    vocab_size: int
    head_rows: int
    """Logits: of a rank its share."""
    hidden_size: int


@triton.jit
def _embed_kernel(
    tokens_ptr, adapters_ptr, numbers_ptr, flags_ptr, out_ptr, slot_size, NUM_FLAGS: tl.constexpr,
    FLAG: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(adapters_ptr + row)
    has = tl.load(flags_ptr + slot * NUM_FLAGS + FLAG, mask=slot >= 0, other=0)
    if has != 0:
        column = tl.arange(0, BLOCK)
        inside = column < WIDTH
        source = numbers_ptr + slot.to(tl.int64) * slot_size + tl.load(tokens_ptr + row).to(tl.int64) * WIDTH
        tl.store(out_ptr + row * WIDTH + column, tl.load(source + column, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["flag", "offset", "eps"])
def _norm_kernel(
    residual_ptr, adapters_ptr, numbers_ptr, flags_ptr, out_ptr, slot_size, flag, offset, eps,
    NUM_FLAGS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(adapters_ptr + row)
    has = tl.load(flags_ptr + slot * NUM_FLAGS + flag, mask=slot >= 0, other=0)
    if has != 0:
        column = tl.arange(0, BLOCK)
        inside = column < WIDTH
        own = numbers_ptr + slot.to(tl.int64) * slot_size + offset
        weight = tl.load(own + column, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(residual_ptr + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        value = x * (1.0 / tl.sqrt(tl.sum(x * x, 0) / WIDTH + eps)) * weight
        tl.store(out_ptr + row * WIDTH + column, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "num_logits"])
def _head_kernel(
    x_ptr, adapters_ptr, numbers_ptr, flags_ptr, logits_ptr, slot_size, offset, num_rows, num_logits,
    NUM_FLAGS: tl.constexpr, FLAG: tl.constexpr, WIDTH: tl.constexpr, TILE_K: tl.constexpr,
    TILE_N: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(1)
    if tl.load(flags_ptr + slot * NUM_FLAGS + FLAG) != 0:
        n = tl.program_id(0) * TILE_N + tl.arange(0, TILE_N)
        place = tl.arange(0, ROWS)
        column = tl.arange(0, TILE_K)
        head = numbers_ptr + slot.to(tl.int64) * slot_size + offset
        for first in tl.range(0, num_rows, ROWS):
            row = first + place
            mine = tl.load(adapters_ptr + row, mask=row < num_rows, other=-1) == slot
            if tl.sum(mine.to(tl.int32), 0) > 0:
                total = tl.zeros([TILE_N, ROWS], tl.float32)
                for k in tl.range(0, WIDTH, TILE_K):
                    weight = tl.load(
                        head + n.to(tl.int64)[:, None] * WIDTH + k + column[None, :],
                        mask=(n < num_logits)[:, None], other=0.0,
                    )  # fmt: skip
                    x = tl.load(
                        x_ptr + row.to(tl.int64)[:, None] * WIDTH + k + column[None, :], mask=mine[:, None], other=0.0
                    )
                    total = tl.dot(weight, x.T, total, input_precision="ieee")
                target = logits_ptr + row.to(tl.int64)[None, :] * num_logits + n[:, None]
                tl.store(target, total.to(logits_ptr.dtype.element_ty), mask=mine[None, :] & (n < num_logits)[:, None])


def embed_own(tokens: torch.Tensor, adapters: torch.Tensor, weights: WholeWeights, out: torch.Tensor) -> None:
    """out [N, hidden], which has rows of the model's embedding; tokens int32 [N]; adapters: slots, int32 [N], below 0:
    none."""
    _check(weights, adapters, out)
    require(len(tokens) == len(out), f"{len(tokens)} tokens for {len(out)} rows")
    if len(out):
        _embed_kernel[(len(out),)](
            tokens, adapters, weights.numbers, weights.flags, out, weights.numbers.shape[1],
            NUM_FLAGS=weights.flags.shape[1], FLAG=EMBEDDING, WIDTH=weights.hidden_size,
            BLOCK=next_power_of_2(weights.hidden_size),
        )  # fmt: skip


def norm_own(
    residual: torch.Tensor, adapters: torch.Tensor, weights: WholeWeights, number: int, eps: float, out: torch.Tensor
) -> None:
    """out [N, hidden], which has the norm of residual [N, hidden] by the model's weights; number: of the norm, in the
    order of a step."""
    _check(weights, adapters, out)
    require(residual.shape == out.shape, f"a residual {tuple(residual.shape)} for {tuple(out.shape)}")
    require(0 <= number < weights.flags.shape[1] - FIRST_NORM, f"norm {number}, slots have {weights.flags.shape[1]}")
    if len(out):
        _norm_kernel[(len(out),)](
            residual, adapters, weights.numbers, weights.flags, out, weights.numbers.shape[1], FIRST_NORM + number,
            (weights.vocab_size + weights.head_rows + number) * weights.hidden_size, eps,
            NUM_FLAGS=weights.flags.shape[1], WIDTH=weights.hidden_size,
            BLOCK=next_power_of_2(weights.hidden_size), num_warps=8,
        )  # fmt: skip


def head_own(x: torch.Tensor, adapters: torch.Tensor, weights: WholeWeights, logits: torch.Tensor) -> None:
    """logits [N, head rows], which are those of the model's head for x [N, hidden]."""
    _check(weights, adapters, x)
    require(tuple(logits.shape) == (len(x), weights.head_rows) and logits.is_contiguous(), "logits of another shape")
    width = weights.hidden_size
    tile_k = next((size for size in (128, 64, 32, 16) if width % size == 0), 0)
    require(tile_k > 0, f"a hidden size of {width} is no multiple of 16")
    if len(x):
        _head_kernel[(cdiv(weights.head_rows, HEAD_TILE), len(weights.flags))](
            x, adapters, weights.numbers, weights.flags, logits, weights.numbers.shape[1], weights.vocab_size * width,
            len(x), weights.head_rows, NUM_FLAGS=weights.flags.shape[1], FLAG=HEAD, WIDTH=width, TILE_K=tile_k,
            TILE_N=HEAD_TILE, ROWS=HEAD_ROWS, num_warps=4,
        )  # fmt: skip


def _check(weights: WholeWeights, adapters: torch.Tensor, rows: torch.Tensor) -> None:
    require(rows.shape == (len(adapters), weights.hidden_size), f"{len(adapters)} rows, but {tuple(rows.shape)}")
    for tensor in (weights.numbers, weights.flags, adapters, rows):
        require(tensor.is_contiguous(), "tensors must be contiguous")
