"""Decode attention over 8-bit floats at the speed of their bytes: the fast path of decode_attention.

A row of head_dim bytes is read as words of four, and a product goes over all of them in four turns, j = 0 .. 3:

    scores = sum_j sum_c query[d(c, j)] . key[d(c, j)],  d(c, j) = 4 (c - c % 2) + 2 j + c % 2
    out[4 c + j] = sum_t weights[t] value[t, 4 c + j]

because of how a matrix instruction wants its operands. Two elements of a key share a register, and those of half a word
come there by one instruction; for values it is two tokens' elements, and bytes of two words come there by two. Single
bytes of shared memory would need many. Stored numbers become float16, which holds all of them exactly, as do a query
and the weights: a query is divided by a power of two, so that its largest element is between 1 and 2, and weights are
multiplied by the value's scale and by 64: values of 2**-13 to 2**18 leave them ten bits or more.

Formula, chunks and merged parts: see decode_attention. Blocks of 64 tokens and more, head_dim a power of two.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.triton.decode_merge import merge_by_the_last, sink_weights
from baton.kernels.triton.decode_work import CHUNK, COLUMNS, END, FIRST, FOLLOWING, PARTS, QUERIES, ROW, START
from baton.kernels.triton.pool import STATIC_SCALES, TOKEN_SCALES

WEIGHT_UNIT = tl.constexpr(64.0)
SMALLEST_UNIT = tl.constexpr(1e-37)
MOST = tl.constexpr(65000.0)
"""What a weight may be multiplied by: float16 ends a little above."""
_CONVERT = """
    {{
        .reg .b32 both;
        .reg .b16 low, high;
        prmt.b32 both, $1, $2, {selected};
        mov.b32 {{low, high}}, both;
        cvt.rn.f16x2.e4m3x2 $0, low;
    }}
    """
BYTE_0, BYTE_1, BYTE_2, BYTE_3 = (tl.constexpr(_CONVERT.format(selected=(4 + j) << 4 | j)) for j in range(4))
"""Byte j of two words as float16. An operation each: Triton reads words where the product wants them only before
operations with one result."""
_CONVERT_HALF = """
    {{
        .reg .b16 half, other;
        mov.b32 {{{halves}}}, {word};
        cvt.rn.f16x2.e4m3x2 $0, half;
    }}
    """
HALF_0, HALF_1, HALF_2, HALF_3 = (
    tl.constexpr(_CONVERT_HALF.format(halves="other, half" if j % 2 else "half, other", word=f"${1 + j // 2}"))
    for j in range(4)
)
"""Half j of two words, which is two bytes of one of them. That an operation gets neighbouring words at a time is up to
the compiler; what it makes of them for Hopper is asserted in tests/unit/kernels/test_triton_compiles.py."""


@triton.jit
def _byte(words, number: tl.constexpr, asm: tl.constexpr, ASM: tl.constexpr):
    """Byte `number` of each word, an 8-bit float, as float16."""
    if ASM:
        return tl.inline_asm_elementwise(asm, "=r,r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    else:
        return ((words >> (8 * number)) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)


@triton.jit
def _half(words, number: tl.constexpr, asm: tl.constexpr, ASM: tl.constexpr):
    """Half `number` of each pair of neighbouring words, its two 8-bit floats in the places of both, as float16."""
    if ASM:
        return tl.inline_asm_elementwise(asm, "=r,r,r", [words], dtype=tl.float16, is_pure=True, pack=2)
    else:
        first, second = tl.split(tl.reshape(words, [words.shape[0], words.shape[1] // 2, 2]))
        bits = (second if number // 2 else first) >> (16 * (number % 2))
        bytes_ = tl.reshape(tl.join(bits & 0xFF, (bits >> 8) & 0xFF), [words.shape[0], words.shape[1]])
        return bytes_.to(tl.uint8).to(tl.float8e4nv, bitcast=True).to(tl.float16)


@triton.jit
def _halves(words, ASM: tl.constexpr):
    """What keys are multiplied as: element d(c, j) of each, see above."""
    return (
        _half(words, 0, HALF_0, ASM),
        _half(words, 1, HALF_1, ASM),
        _half(words, 2, HALF_2, ASM),
        _half(words, 3, HALF_3, ASM),
    )


@triton.jit
def _numbers(words, ASM: tl.constexpr):
    """The four 8-bit floats of each word."""
    return (
        _byte(words, 0, BYTE_0, ASM),
        _byte(words, 1, BYTE_1, ASM),
        _byte(words, 2, BYTE_2, ASM),
        _byte(words, 3, BYTE_3, ASM),
    )


@triton.jit(do_not_specialize=["layer", "unit_rows", "scale_log2", "window", "num_parts"])
def decode_fp8_attention_kernel(
    query_ptr,
    words_desc,
    scale_ptr,
    table_ptr,
    length_ptr,
    work_ptr,
    out_ptr,
    parts_ptr,
    softmax_ptr,
    arrived_ptr,
    sink_ptr,
    scale_log2,
    layer,
    unit_rows,
    table_stride,
    window,
    num_parts,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    LAYER_ROWS: tl.constexpr,
    SCALES: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    AT_ONCE: tl.constexpr,
    SINKS: tl.constexpr,
    WINDOWED: tl.constexpr,
    ASM: tl.constexpr,
    PDL: tl.constexpr,
):
    kv_head = tl.program_id(0) % KV_HEADS
    number = tl.program_id(0) // KV_HEADS
    GROUP: tl.constexpr = HEADS // KV_HEADS
    WORDS: tl.constexpr = DIM // 4
    each = tl.arange(0, ROWS)  # head of a query
    number_of_query = each // GROUP
    element = tl.arange(0, WORDS) * 4
    chunk = work_ptr + number * COLUMNS  # not written by the kernels of a layer, nor are lengths: before the wait
    row = tl.load(chunk + ROW)
    start = tl.load(chunk + START)
    end = tl.load(chunk + END)
    chunk_tokens = tl.load(chunk + CHUNK)
    first_part = tl.load(chunk + FIRST)
    num_chunks = tl.load(chunk + PARTS)
    queries = tl.load(chunk + QUERIES)
    following = tl.load(chunk + FOLLOWING)
    own_chunk, first, first_chunk = 0, 0, 0
    limit = tl.zeros_like(each)
    if start < end:
        own_chunk = start // chunk_tokens
        limit = tl.load(length_ptr + row) + number_of_query
        if WINDOWED:
            first = tl.maximum(tl.min(limit, 0) - window, 0)
            first_chunk = first // chunk_tokens
            start = tl.maximum(start, first)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if start < end:
        oldest = limit - window
        limit = tl.minimum(limit, end)
        own_row = tl.where(number_of_query == 0, row, following + number_of_query - 1)
        heads_at = (own_row * HEADS + kv_head * GROUP + each % GROUP) * DIM
        computes = each < queries * GROUP
        inside = computes[:, None] & (element < DIM)[None, :]
        word = tl.arange(0, WORDS)
        query_at = query_ptr + heads_at[:, None] + (word // 2 * 8 + word % 2)[None, :]
        query_0 = tl.load(query_at, mask=inside, other=0.0).to(tl.float32)
        query_1 = tl.load(query_at + 2, mask=inside, other=0.0).to(tl.float32)
        query_2 = tl.load(query_at + 4, mask=inside, other=0.0).to(tl.float32)
        query_3 = tl.load(query_at + 6, mask=inside, other=0.0).to(tl.float32)
        largest = tl.maximum(tl.maximum(tl.abs(query_0), tl.abs(query_1)), tl.maximum(tl.abs(query_2), tl.abs(query_3)))
        largest = tl.maximum(tl.max(largest, 1), 1e-30)
        unit = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)  # without its mantissa
        query_0 = (query_0 / unit[:, None]).to(tl.float16)
        query_1 = (query_1 / unit[:, None]).to(tl.float16)
        query_2 = (query_2 / unit[:, None]).to(tl.float16)
        query_3 = (query_3 / unit[:, None]).to(tl.float16)
        score_units = unit * scale_log2
        if SCALES == STATIC_SCALES:
            score_units *= tl.load(scale_ptr + layer * 2 * KV_HEADS + kv_head)
        score_units = tl.maximum(score_units, SMALLEST_UNIT)  # -inf times 0 is no score
        top = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS, TILE], tl.float32)  # summed at the end: warps would wait for each other in each tile
        sums_0 = tl.zeros([ROWS, WORDS], tl.float32)
        sums_1 = tl.zeros([ROWS, WORDS], tl.float32)
        sums_2 = tl.zeros([ROWS, WORDS], tl.float32)
        sums_3 = tl.zeros([ROWS, WORDS], tl.float32)
        block_rows = KV_HEADS * unit_rows
        first_row = kv_head * unit_rows + layer * LAYER_ROWS
        for tile in tl.range(start // TILE * TILE, end, TILE):
            token = tile + tl.arange(0, TILE)
            seen = token[None, :] < limit[:, None]
            if WINDOWED:
                seen = seen & (token[None, :] >= oldest[:, None])
            block = tl.load(table_ptr + row * table_stride + tile // BLOCK_TOKENS)
            slot = block * block_rows + first_row + tile % BLOCK_TOKENS
            key_words = words_desc.load([slot, 0])
            value_words = words_desc.load([slot + BLOCK_TOKENS, 0])
            if SCALES == TOKEN_SCALES:
                scales = (block.to(tl.int64) * block_rows + first_row) * WORDS + tile % BLOCK_TOKENS
                scales_at = scale_ptr + scales + tl.arange(0, TILE)
                key_scales = tl.load(scales_at)
                value_scales = tl.load(scales_at + BLOCK_TOKENS)
            key_0, key_1, key_2, key_3 = _halves(key_words, ASM)
            scores = tl.dot(query_0, key_0.T)
            scores = tl.dot(query_1, key_1.T, scores)
            scores = tl.dot(query_2, key_2.T, scores)
            scores = tl.dot(query_3, key_3.T, scores)
            if SCALES == TOKEN_SCALES:
                scores *= key_scales[None, :]
            scores = tl.where(seen, scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1) * score_units)
            bound = tl.where(new_top > float("-inf"), new_top, 0.0)  # a query may see none of a tile that others do
            weights = tl.exp2(scores * score_units[:, None] - bound[:, None])
            shrink = tl.exp2(top - bound)
            total = total * shrink[:, None] + weights
            if SCALES == TOKEN_SCALES:
                weights *= tl.minimum(value_scales * WEIGHT_UNIT, MOST)[None, :]
            weights = weights.to(tl.float16)
            value_0, value_1, value_2, value_3 = _numbers(value_words, ASM)
            sums_0 = tl.dot(weights, value_0, sums_0 * shrink[:, None])
            sums_1 = tl.dot(weights, value_1, sums_1 * shrink[:, None])
            sums_2 = tl.dot(weights, value_2, sums_2 * shrink[:, None])
            sums_3 = tl.dot(weights, value_3, sums_3 * shrink[:, None])
            top = new_top
        all_weights = tl.sum(total, 1)
        unit_of_sums = 1.0 / WEIGHT_UNIT
        if SCALES == STATIC_SCALES:
            unit_of_sums = tl.load(scale_ptr + (layer * 2 + 1) * KV_HEADS + kv_head)
        if num_chunks - first_chunk > 1:
            first_part += kv_head * num_parts
            part = first_part + number_of_query * num_chunks + own_chunk
            parts_at = parts_ptr + (part * GROUP + each % GROUP)[:, None] * DIM + element[None, :]
            tl.store(parts_at, sums_0 * unit_of_sums, mask=inside)
            tl.store(parts_at + 1, sums_1 * unit_of_sums, mask=inside)
            tl.store(parts_at + 2, sums_2 * unit_of_sums, mask=inside)
            tl.store(parts_at + 3, sums_3 * unit_of_sums, mask=inside)
            softmax_at = softmax_ptr + part * 2 * GROUP + each % GROUP
            tl.store(softmax_at, top, mask=computes)
            tl.store(softmax_at + GROUP, all_weights, mask=computes)
            merge_by_the_last(
                arrived_ptr + row * KV_HEADS + kv_head, parts_ptr, softmax_ptr, out_ptr + kv_head * GROUP * DIM,
                first_part, first_chunk, num_chunks, queries, row, following, HEADS * DIM, DIM, DIM, GROUP,
                GROUP_BLOCK, AT_ONCE, sink_ptr + kv_head * GROUP, SINKS,
            )  # fmt: skip
        else:
            out_at = out_ptr + heads_at[:, None] + element[None, :]
            if SINKS:
                all_weights += sink_weights(sink_ptr + kv_head * GROUP, each % GROUP, computes, top)
            units = (unit_of_sums / all_weights)[:, None]
            tl.store(out_at, (sums_0 * units).to(out_ptr.dtype.element_ty), mask=inside)
            tl.store(out_at + 1, (sums_1 * units).to(out_ptr.dtype.element_ty), mask=inside)
            tl.store(out_at + 2, (sums_2 * units).to(out_ptr.dtype.element_ty), mask=inside)
            tl.store(out_at + 3, (sums_3 * units).to(out_ptr.dtype.element_ty), mask=inside)
