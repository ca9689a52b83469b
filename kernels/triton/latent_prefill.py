"""Latent attention of the new tokens of several sequences over all their tokens, cached ones included: keys and values
are made of the latents first, once for all heads and queries of a step.

    key[t, h] = key_up[h] latent[t] | rotated key[t];   value[t, h] = value_up[h] latent[t]
    out[n, h] = sum_t softmax_t(scale * query[n, h] . key[t, h]) value[t, h],   t <= position(n)

The context of a step, its sequences behind one another in tiles of 64 tokens, is expanded a slice at a time into
`Expanded`, whose size bounds the memory; with more than one slice the softmax's state of each query waits in float32
for the next. Tiles begin at multiples of 64 tokens of their sequence, whatever the chunk and the slice, so a token's
bits depend on neither. An item of the work list (prefill_attention.work_list) is a program of each slice, which leaves
at once where the slice has nothing for it.

Work: 2 * H * (P + R + V) a query and key, beside 2 * H * (P + V) * L a token of context.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from baton.kernels.triton.latent_pairs import LatentPairs, expand_pairs
from baton.kernels.triton.launch import Launch, cdiv, launch_nothing, launch_options, next_power_of_2, require
from baton.kernels.triton.pool import PagedPool
from baton.kernels.triton.prefill_attention import LOWEST, TILE

BLOCK_M = 128
"""Query tokens of an item of the work list."""
EXPANDING_PROGRAMS = 2  # of a multiprocessor, which take tiles in turn
EXPANDED_COLUMNS, LATENT_STEP = 128, 64  # of a tile of the product


@dataclass(frozen=True, slots=True)
class Expanded:
    """Room for a slice of the context, and for the state of `tokens` queries between slices."""

    keys_values: torch.Tensor  # [slice tokens, H * (P + V)]
    keys: torch.Tensor  # [slice tokens, R]: rotated
    sums: torch.Tensor  # float32 [tokens, H, V]; empty if all contexts fit one slice
    softmax: torch.Tensor  # float32 [tokens, H, 2]: maximum and sum

    @classmethod
    def make(
        cls, slice_tokens: int, tokens: int, heads: int, plain: int, value: int, rotated: int, dtype, device
    ) -> Expanded:
        """slice_tokens: a multiple of 64."""
        return cls(
            torch.zeros(slice_tokens, heads * (plain + value), dtype=dtype, device=device),
            torch.zeros(slice_tokens, rotated, dtype=dtype, device=device),
            torch.zeros(tokens, heads, value, dtype=torch.float32, device=device),
            torch.zeros(tokens, heads, 2, dtype=torch.float32, device=device),
        )


@triton.jit(do_not_specialize=["num_sequences", "first_tile", "slice_tiles", "layer", "unit_rows"])
def _expand_kernel(
    pool_ptr,
    table_ptr,
    length_ptr,
    weight_ptr,
    out_ptr,
    key_ptr,
    num_sequences,
    first_tile,
    slice_tiles,
    layer,
    unit_rows,
    table_stride,
    COLUMNS: tl.constexpr,
    LATENT: tl.constexpr,
    ROTATED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    LAYER_ROWS: tl.constexpr,
    SEQUENCES: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    STEP: tl.constexpr,
):
    sequence = tl.arange(0, SEQUENCES)
    lengths = tl.load(length_ptr + sequence, mask=sequence < num_sequences, other=0)
    counts = tl.cdiv(lengths, TILE)
    ends = tl.cumsum(counts, 0)
    used = tl.minimum(tl.maximum(tl.sum(counts, 0) - first_tile, 0), slice_tiles)
    WIDE: tl.constexpr = (COLUMNS + WIDTH - 1) // WIDTH
    DIM: tl.constexpr = LATENT + ROTATED
    for item in tl.range(tl.program_id(0), used * WIDE, tl.num_programs(0)):
        number = item // WIDE
        column = item % WIDE * WIDTH + tl.arange(0, WIDTH)
        mine = tl.sum((ends <= number + first_tile).to(tl.int32), 0)
        before = tl.sum(tl.where(sequence < mine, counts, 0), 0)
        length = tl.sum(tl.where(sequence == mine, lengths, 0), 0)
        token = (number + first_tile - before) * TILE + tl.arange(0, TILE)
        inside = token < length
        block = tl.load(table_ptr + mine * table_stride + token // BLOCK_TOKENS, mask=inside, other=0).to(tl.int64)
        row = pool_ptr + (block * unit_rows + layer * LAYER_ROWS + token % BLOCK_TOKENS)[:, None] * DIM
        out_row = number.to(tl.int64) * TILE + tl.arange(0, TILE)
        if item % WIDE == 0:
            rest = tl.arange(0, ROTATED)[None, :]
            keys = tl.load(row + LATENT + rest, mask=inside[:, None], other=0.0)
            tl.store(key_ptr + out_row[:, None] * ROTATED + rest, keys)
        sums = tl.zeros([TILE, WIDTH], tl.float32)
        for start in tl.range(0, LATENT, STEP):
            element = start + tl.arange(0, STEP)
            latents = tl.load(row + element[None, :], mask=inside[:, None], other=0.0)
            weight_at = weight_ptr + column[:, None] * LATENT + element[None, :]
            weights = tl.load(weight_at, mask=(column < COLUMNS)[:, None], other=0.0)
            sums = tl.dot(latents, weights.T, sums, input_precision="ieee")
        out = out_ptr + out_row[:, None] * COLUMNS + column[None, :]
        tl.store(out, sums.to(out_ptr.dtype.element_ty), mask=(column < COLUMNS)[None, :])


@triton.jit
def _attend(
    state, plain, rotated, start, end, shift, positions, head, plain_desc, key_desc, value_desc, scale_log2,
    PLAIN: tl.constexpr, VALUE: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The state (maximum, sum, weighted values) after the tiles of tokens start .. end - 1."""
    top, total, sums = state
    for tile in tl.range(start, end, TILE):
        keys = plain_desc.load([tile + shift, head * (PLAIN + VALUE)])
        scores = tl.dot(plain, keys.T, input_precision="ieee")
        scores = tl.dot(rotated, key_desc.load([tile + shift, 0]).T, scores, input_precision="ieee")
        if MASKED:
            token = tile + tl.arange(0, TILE)
            scores = tl.where(token[None, :] <= positions[:, None], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
        weights = tl.exp2(scores * scale_log2 - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        values = value_desc.load([tile + shift, head * (PLAIN + VALUE) + PLAIN])
        sums = tl.dot(weights.to(values.dtype), values, sums * shrink[:, None], input_precision="ieee")
        top = new_top
    return top, total, sums


@triton.jit(do_not_specialize=["num_sequences", "first_tile", "slice_tiles", "scale_log2"])
def _latent_prefill_kernel(
    query_ptr,
    plain_desc,
    key_desc,
    value_desc,
    out_ptr,
    work_ptr,
    query_start_ptr,
    length_ptr,
    sums_ptr,
    softmax_ptr,
    num_sequences,
    first_tile,
    slice_tiles,
    scale_log2,
    HEADS: tl.constexpr,
    PLAIN: tl.constexpr,
    ROTATED: tl.constexpr,
    VALUE: tl.constexpr,
    SEQUENCES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    SLICED: tl.constexpr,
    LOWEST: tl.constexpr,
):
    item = work_ptr + tl.program_id(0) * 3
    sequence = tl.load(item)
    first_new = tl.load(item + 1) * BLOCK_M
    head = tl.load(item + 2)
    query_start = tl.load(query_start_ptr + sequence)
    num_new = tl.load(query_start_ptr + sequence + 1) - query_start
    length = tl.load(length_ptr + sequence)
    each = tl.arange(0, SEQUENCES)
    tiles = tl.cdiv(tl.load(length_ptr + each, mask=each < num_sequences, other=0), TILE)
    before = (tl.sum(tl.where(each < sequence, tiles, 0), 0) - first_tile) * TILE  # where it begins, in the slice
    start = length - num_new + first_new
    last = tl.minimum(start + BLOCK_M, length)
    first = tl.maximum(-before, 0)
    end = tl.minimum(last, slice_tiles * TILE - before)
    if first < end:
        new = first_new + tl.arange(0, BLOCK_M)
        positions = start + tl.arange(0, BLOCK_M)
        inside = (new < num_new)[:, None]
        row = (query_start + new).to(tl.int64) * HEADS + head
        place = query_ptr + row[:, None] * (PLAIN + ROTATED)
        plain = tl.load(place + tl.arange(0, PLAIN)[None, :], mask=inside, other=0.0)
        rotated = tl.load(place + PLAIN + tl.arange(0, ROTATED)[None, :], mask=inside, other=0.0)
        value = tl.arange(0, VALUE)[None, :]
        top = tl.full([BLOCK_M], LOWEST, tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        sums = tl.zeros([BLOCK_M, VALUE], tl.float32)
        if SLICED:  # noqa: SIM102 - a constant
            if first > 0:
                top = tl.load(softmax_ptr + row * 2, mask=new < num_new, other=LOWEST)
                total = tl.load(softmax_ptr + row * 2 + 1, mask=new < num_new, other=0.0)
                sums = tl.load(sums_ptr + row[:, None] * VALUE + value, mask=inside, other=0.0)
        masked_from = tl.minimum(tl.maximum((start + 1) // TILE * TILE, first), end)
        state = _attend(
            (top, total, sums), plain, rotated, first, masked_from, before, positions, head, plain_desc, key_desc,
            value_desc, scale_log2, PLAIN, VALUE, TILE, False,
        )  # fmt: skip
        top, total, sums = _attend(
            state, plain, rotated, masked_from, end, before, positions, head, plain_desc, key_desc, value_desc,
            scale_log2, PLAIN, VALUE, TILE, True,
        )  # fmt: skip
        if SLICED and end < last:
            tl.store(softmax_ptr + row * 2, top, mask=new < num_new)
            tl.store(softmax_ptr + row * 2 + 1, total, mask=new < num_new)
            tl.store(sums_ptr + row[:, None] * VALUE + value, sums, mask=inside)
        else:
            result = (sums / total[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + row[:, None] * VALUE + value, result, mask=inside)


def latent_prefill_attention(
    query: torch.Tensor,
    pool: PagedPool,
    layer: int,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    lengths: torch.Tensor,
    work: torch.Tensor,
    kv_up: torch.Tensor,
    expanded: Expanded,
    num_sms: int,
    out: torch.Tensor,
    *,
    scale: float,
    pairs: LatentPairs | None = None,
) -> Callable[[int, torch.Tensor], None]:
    """Fills out [N, H, V]; query [N, H, P + R], a pool of one unit of one plane of L + R, kv_up [H, P + V, L].

    block_tables int32 [S, blocks of the longest]; query_starts int32 [S + 1], where each sequence's new tokens begin in
    query; lengths int32 [S], tokens in all, the new ones included, whose rows are in the pool. work: the work list for
    BLOCK_M tokens, on the device. pairs: what adapters change of kv_up, of the new tokens. How many slices there are
    follows from the width of the tables.
    Returns what does the same for another layer and its kv_up, in a fraction of the host's time.
    """
    num_tokens, heads, dim = query.shape
    latent, value = kv_up.shape[2], out.shape[2]
    plain, rotated, num_sequences = kv_up.shape[1] - value, pool.head_dim - latent, len(lengths)
    require(pool.tensor.shape[3] == 1 and pool.num_units == 1, "the pool is not of one unit of one plane")
    require(query.shape[:2] == out.shape[:2] and len(kv_up) == heads, "query, kv_up and out differ in heads")
    require(dim == plain + rotated, f"queries have {dim} elements, not {plain} + {rotated}")
    for size in (plain, rotated, value):
        require(size >= 16 and size & (size - 1) == 0, f"{size} elements: not a power of two from 16 on")
    require(query.dtype == kv_up.dtype == out.dtype, "query, kv_up and out differ in dtype")
    pool.require_reads(query)
    require(query_starts.shape == (num_sequences + 1,), "query_starts needs one more than the sequences")
    require(block_tables.shape[0] == num_sequences and block_tables.stride(1) == 1, "tables need a row a sequence")
    require(work.dim() == 2 and work.shape[1] == 3, "work is not [items, 3]")
    for integers in (block_tables, query_starts, lengths, work):
        require(integers.dtype == torch.int32, "tables, starts, lengths and work must be int32")
    for tensor in (query, kv_up, out, query_starts, lengths, work):
        require(tensor.is_contiguous(), "tensors must be contiguous")
    columns = heads * (plain + value)
    slice_tokens = len(expanded.keys)
    require(expanded.keys_values.shape == (slice_tokens, columns), f"expanded keys and values are not of {columns}")
    require(slice_tokens >= TILE and slice_tokens % TILE == 0, f"a slice of {slice_tokens} tokens is not made of tiles")
    most_tiles = num_sequences * cdiv(block_tables.shape[1] * pool.block_tokens, TILE)
    slices = cdiv(most_tiles * TILE, slice_tokens)
    require(slices == 1 or len(expanded.sums) >= num_tokens, "no room for the state between slices")
    if work.shape[0] == 0:
        return launch_nothing
    sequences = next_power_of_2(num_sequences)
    boxes = [
        TensorDescriptor.from_tensor(tensor, [TILE, width])
        for tensor, width in ((expanded.keys_values, plain), (expanded.keys, rotated), (expanded.keys_values, value))
    ]
    launches = []
    for number in range(slices):
        first_tile, slice_tiles = number * slice_tokens // TILE, slice_tokens // TILE
        expand = Launch(
            _expand_kernel,
            (EXPANDING_PROGRAMS * num_sms,),
            pool.tensor,
            block_tables,
            lengths,
            kv_up,
            expanded.keys_values,
            expanded.keys,
            num_sequences,
            first_tile,
            slice_tiles,
            layer,
            pool.unit_rows,
            block_tables.stride(0),
            COLUMNS=columns,
            LATENT=latent,
            ROTATED=rotated,
            BLOCK_TOKENS=pool.block_tokens,
            LAYER_ROWS=pool.layer_rows,
            SEQUENCES=sequences,
            TILE=TILE,
            WIDTH=min(EXPANDED_COLUMNS, next_power_of_2(columns)),
            STEP=min(LATENT_STEP, latent),
            **launch_options(4, False, 4),
        )
        attend = Launch(
            _latent_prefill_kernel,
            (work.shape[0],),
            query,
            *boxes,
            out,
            work,
            query_starts,
            lengths,
            expanded.sums,
            expanded.softmax,
            num_sequences,
            first_tile,
            slice_tiles,
            scale * math.log2(math.e),
            HEADS=heads,
            PLAIN=plain,
            ROTATED=rotated,
            VALUE=value,
            SEQUENCES=sequences,
            BLOCK_M=BLOCK_M,
            TILE=TILE,
            SLICED=len(expanded.sums) > 0,  # one kernel for all that a runner computes
            LOWEST=LOWEST,
            **launch_options(8, False, 3),
        )
        launches.append((expand, first_tile, attend))

    def of_layer(layer: int, kv_up: torch.Tensor) -> None:
        pool.require_layer(layer)
        for expand, first_tile, attend in launches:
            expand(layer=layer, weight_ptr=kv_up)
            if pairs is not None:
                expand_pairs(
                    pool, layer, block_tables, query_starts, lengths, expanded.keys_values, pairs, first_tile,
                    EXPANDING_PROGRAMS * num_sms, rotated,
                )  # fmt: skip
            attend()

    of_layer(layer, kv_up)
    return of_layer
