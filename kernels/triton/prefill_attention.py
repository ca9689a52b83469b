"""Causal attention of the new tokens of several sequences over all their tokens in the paged pool (cached prefix and
chunked prefill included): the portable kernel, for every head_dim and block size.

    out[n, h] = sum_t softmax_t(scale * query[n, h] . key[t, h // group]) value[t, h // group],  t <= position(n)
    with sinks the softmax has one term more, exp(sink[h]), in its denominator alone

Softmax with a running maximum and sum (Dao et al., FlashAttention, 2022; Milakov, Gimelshein, 2018), float32, base 2. A
program does one item of the work list: BLOCK_M tokens of one sequence and one head. The keys that all of its tokens see
come first, without a mask; the tiles on the diagonal follow. Tiles of keys begin at multiples of TILE tokens from the
sequence's start whatever the chunk, so a token's bits do not depend on how its prompt was cut into chunks.

Of 8-bit floats with scales the products are those of the stored numbers, which the query's dtype holds exactly; the
scales of keys multiply scores, and those of values the weights.

Work: 4 * H * D * (seen keys) operations; bytes are small beside it. Blocks of 64 tokens and more arrive by TMA. The
pool must be finite everywhere: what lies past a sequence's end in its last tile is multiplied by 0, not skipped.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from baton.kernels.triton.launch import Launch, launch_nothing, launch_options, next_power_of_2, require
from baton.kernels.triton.pool import STATIC_SCALES, TOKEN_SCALES, PagedPool
from baton.kernels.triton.softcap import bounded, limit_log2

TILE = 64
# The maximum before the first key. Finite, so that a row that sees nothing yet has weights exp2(-inf - LOWEST) = 0. If
# hidden scores were finite too, a fused multiply-add would leave a huge rest of score * scale - maximum: exp2 of it.
LOWEST = -1.0e30


def block_m(head_dim: int) -> int:
    """Query tokens a program: what leaves the accumulator in registers."""
    return 128 if head_dim <= 128 else 64


def work_list(query_lengths: Sequence[int], lengths: Sequence[int], num_heads: int, tokens: int) -> torch.Tensor:
    """int32 [items, 3] on the CPU: sequence, tile of `tokens` query tokens, head. One list serves all layers of a step.

    The longest items first, so that the last wave is short; heads next to each other, so that those of a group read the
    same keys from the cache at the same time. lengths: tokens in all, the new ones included.
    """
    tiles = [
        (length - num_new + min((tile + 1) * tokens, num_new), sequence, tile)
        for sequence, (num_new, length) in enumerate(zip(query_lengths, lengths, strict=True))
        for tile in range(-(-num_new // tokens))
    ]
    tiles.sort(key=lambda item: -item[0])
    places = torch.tensor([item[1:] for item in tiles], dtype=torch.int32).view(-1, 2).repeat_interleave(num_heads, 0)
    heads = torch.arange(num_heads, dtype=torch.int32).repeat(len(tiles))
    return torch.cat((places, heads[:, None]), 1)


@triton.jit
def _attend_tiles(
    state, query, start, end, positions, table_ptr, pool_desc, pool_ptr, scale_ptr, first_row, block_rows, length,
    window, scale_log2, DIM: tl.constexpr, BLOCK_TOKENS: tl.constexpr, SCALES: tl.constexpr, SOFTCAP: tl.constexpr,
    TILE: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """The state (maximum, sum, weighted values) after the tiles start .. end - 1."""
    top, total, sums = state
    element = tl.arange(0, sums.shape[1])
    factor = 1.0 if SOFTCAP > 0.0 else scale_log2  # of scores, to multiples of log2(e)
    for tile in tl.range(start, end, TILE):
        token = tile + tl.arange(0, TILE)
        if TMA:
            block = tl.load(table_ptr + tile // BLOCK_TOKENS)
            slot = block * block_rows + first_row + tile % BLOCK_TOKENS
            keys = pool_desc.load([slot, 0])
            if SCALES == TOKEN_SCALES:
                scales = (block.to(tl.int64) * block_rows + first_row) * (DIM // 4) + tile % BLOCK_TOKENS
                scale_place = scale_ptr + scales + tl.arange(0, TILE)
                key_scales = tl.load(scale_place)
                value_scales = tl.load(scale_place + BLOCK_TOKENS)
        else:
            there = token < length
            blocks = tl.load(table_ptr + token // BLOCK_TOKENS, mask=there, other=0).to(tl.int64)
            slots = blocks * block_rows + first_row + token % BLOCK_TOKENS
            place = pool_ptr + slots[:, None] * DIM + element[None, :]
            read = there[:, None] & (element < DIM)[None, :]
            keys = tl.load(place, mask=read, other=0.0)
            if SCALES == TOKEN_SCALES:
                scale_place = scale_ptr + (blocks * block_rows + first_row) * (DIM // 4) + token % BLOCK_TOKENS
                key_scales = tl.load(scale_place, mask=there, other=0.0)
                value_scales = tl.load(scale_place + BLOCK_TOKENS, mask=there, other=0.0)
        scores = tl.dot(query, keys.to(query.dtype).T, input_precision="ieee")
        if SCALES == TOKEN_SCALES:
            scores *= key_scales[None, :]
        if SOFTCAP > 0.0:
            scores = bounded(scores * scale_log2, SOFTCAP)
        if MASKED:
            seen = token[None, :] <= positions[:, None]
            if WINDOWED:
                seen = seen & (token[None, :] > positions[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * factor)
        weights = tl.exp2(scores * factor - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        sums = sums * shrink[:, None]
        if TMA:
            values = pool_desc.load([slot + BLOCK_TOKENS, 0])
        else:
            values = tl.load(place + BLOCK_TOKENS * DIM, mask=read, other=0.0)
        if SCALES == TOKEN_SCALES:
            weights *= value_scales[None, :]
        sums = tl.dot(weights.to(query.dtype), values.to(query.dtype), sums, input_precision="ieee")
        top = new_top
    return top, total, sums


@triton.jit(do_not_specialize=["layer", "unit_rows", "scale_log2", "window"])
def _prefill_attention_kernel(
    query_ptr,
    pool_desc,
    pool_ptr,
    scale_ptr,
    out_ptr,
    work_ptr,
    query_start_ptr,
    length_ptr,
    table_ptr,
    sink_ptr,
    scale_log2,
    layer,
    unit_rows,
    table_stride,
    window,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    LAYER_ROWS: tl.constexpr,
    SCALES: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
    TMA: tl.constexpr,
    WINDOWED: tl.constexpr,
    LOWEST: tl.constexpr,
    PDL: tl.constexpr,
):
    item = work_ptr + tl.program_id(0) * 3
    sequence = tl.load(item)
    first_new = tl.load(item + 1) * BLOCK_M
    head = tl.load(item + 2)
    query_start = tl.load(query_start_ptr + sequence)
    num_new = tl.load(query_start_ptr + sequence + 1) - query_start
    length = tl.load(length_ptr + sequence)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    new = first_new + tl.arange(0, BLOCK_M)
    element = tl.arange(0, DIM_BLOCK)
    inside = (new < num_new)[:, None] & (element < DIM)[None, :]
    place = ((query_start + new).to(tl.int64) * HEADS + head)[:, None] * DIM + element[None, :]
    query = tl.load(query_ptr + place, mask=inside, other=0.0)
    start = length - num_new + first_new
    positions = start + tl.arange(0, BLOCK_M)
    end = tl.minimum(start + BLOCK_M, length)
    table = table_ptr + sequence * table_stride
    kv_head = head // (HEADS // KV_HEADS)
    first_row = kv_head * unit_rows + layer * LAYER_ROWS
    if SCALES == STATIC_SCALES:
        scale_log2 *= tl.load(scale_ptr + layer * 2 * KV_HEADS + kv_head)
    block_rows = KV_HEADS * unit_rows
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    state = (top, tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M, DIM_BLOCK], tl.float32))
    if WINDOWED:
        masked_from = tl.maximum(start - window + 1, 0) // TILE * TILE
    else:
        masked_from = (start + 1) // TILE * TILE
        state = _attend_tiles(
            state, query, 0, masked_from, positions, table, pool_desc, pool_ptr, scale_ptr, first_row, block_rows,
            length, window, scale_log2, DIM, BLOCK_TOKENS, SCALES, SOFTCAP, TILE, TMA, False, False,
        )  # fmt: skip
    top, total, sums = _attend_tiles(
        state, query, masked_from, end, positions, table, pool_desc, pool_ptr, scale_ptr, first_row, block_rows,
        length, window, scale_log2, DIM, BLOCK_TOKENS, SCALES, SOFTCAP, TILE, TMA, True, WINDOWED,
    )  # fmt: skip
    if SCALES == STATIC_SCALES:
        sums *= tl.load(scale_ptr + (layer * 2 + 1) * KV_HEADS + kv_head)
    if SINKS:
        total += tl.exp2(tl.load(sink_ptr + head) * 1.4426950408889634 - top)
    result = (sums / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place, result, mask=inside)


def prefill_attention(
    query: torch.Tensor,
    pool: PagedPool,
    layer: int,
    block_tables: torch.Tensor,
    query_starts: torch.Tensor,
    lengths: torch.Tensor,
    work: torch.Tensor,
    tokens: int,
    out: torch.Tensor,
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    pdl: bool = False,
) -> Callable[[int, torch.Tensor | None], None]:
    """Fills out [N, H, D]; query [N, H, D], pool with KH units, of the query's dtype or of 8-bit floats with scales.

    block_tables int32 [S, blocks of the longest]; query_starts int32 [S + 1], where each sequence's new tokens begin in
    query; lengths int32 [S], tokens in all, the new ones included, whose keys and values are in the pool. work and
    tokens: the list and its tile, `work_list(...)` on the device. window: how many tokens are seen at most, the own one
    included. scale: D**-0.5 unless given; softcap: the limit of scores. sinks: float32 [H]. With `pdl` no
    kernel of the same chain may write the integers. Returns what does the same for another layer and its sinks, in a
    fraction of the host's time.
    """
    _, num_heads, head_dim = query.shape
    kv_heads, block_tokens = pool.num_units, pool.block_tokens
    num_sequences = lengths.shape[0]
    require(query.shape == out.shape and pool.head_dim == head_dim, "query, out and pool differ in shape")
    require(num_heads % kv_heads == 0, f"{num_heads} on {kv_heads} heads")
    require(head_dim % 16 == 0 and head_dim <= 256, f"head_dim {head_dim} is not a multiple of 16 up to 256")
    require(block_tokens & (block_tokens - 1) == 0, f"block_tokens {block_tokens} is no power of two")
    require(query.dtype == out.dtype, "query and out differ in dtype")
    pool.require_reads(query)
    require(query_starts.shape == (num_sequences + 1,), "query_starts needs one more than the sequences")
    require(block_tables.shape[0] == num_sequences and block_tables.stride(1) == 1, "tables need a row a sequence")
    require(work.dim() == 2 and work.shape[1] == 3, "work is not [items, 3]")
    for integers in (block_tables, query_starts, lengths, work):
        require(integers.dtype == torch.int32, "tables, starts, lengths and work must be int32")
    whole = sinks is None or (tuple(sinks.shape) == (num_heads,) and sinks.dtype == torch.float32)
    require(whole, "sinks must be float32 [H]")
    for tensor in (query, out, query_starts, lengths, work, sinks):
        require(tensor is None or tensor.is_contiguous(), "tensors must be contiguous")
    if work.shape[0] == 0:
        return launch_nothing
    dim_block = next_power_of_2(head_dim)
    tma = block_tokens >= TILE and dim_block == head_dim
    stages = 5 if tma and head_dim <= 128 else 3  # of the pipeline, the block table's load included
    launch = Launch(
        _prefill_attention_kernel,
        (work.shape[0],),
        query,
        TensorDescriptor.from_tensor(pool.rows, [TILE, head_dim]) if tma else None,
        pool.tensor,
        pool.scales,
        out,
        work,
        query_starts,
        lengths,
        block_tables,
        query if sinks is None else sinks,
        (head_dim**-0.5 if scale is None else scale) * math.log2(math.e),
        layer,
        pool.unit_rows,
        block_tables.stride(0),
        0 if window is None else window,
        HEADS=num_heads,
        KV_HEADS=kv_heads,
        DIM=head_dim,
        DIM_BLOCK=dim_block,
        BLOCK_TOKENS=block_tokens,
        LAYER_ROWS=pool.layer_rows,
        SCALES=pool.scale_mode,
        SOFTCAP=limit_log2(softcap),
        SINKS=sinks is not None,
        BLOCK_M=tokens,
        TILE=TILE,
        TMA=tma,
        WINDOWED=window is not None,
        LOWEST=LOWEST,
        PDL=pdl,
        **launch_options(8 if tokens >= 64 else 4, pdl, stages),
    )

    def of_layer(layer: int, sinks: torch.Tensor | None) -> None:
        pool.require_layer(layer)
        launch(layer=layer, sink_ptr=query if sinks is None else sinks)

    of_layer(layer, sinks)
    return of_layer
