"""The parts of a sequence that several programs of decode attention left, merged in the order of its chunks by the one
that ends last."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sink_weights(sink_ptr, head, inside, top):
    """What each head's sink adds to the sum of its weights, which are relative to `top`, in base 2."""
    sinks = tl.load(sink_ptr + head, mask=inside, other=float("-inf"))
    return tl.exp2(sinks * 1.4426950408889634 - top)


@triton.jit
def _merge_parts(
    parts_ptr, softmax_ptr, out_ptr, base, first, end, queries, row, following, ROW_STRIDE: tl.constexpr,
    DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, GROUP: tl.constexpr, GROUP_BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
    sink_ptr, SINKS: tl.constexpr,
):  # fmt: skip
    """Writes a group's output for each query from the parts of chunks first .. end - 1: that of query q and chunk c is
    at base + q * end + c of the scratch. Parts of chunks that a query sees no token of weigh 0, and leave its bits as
    they are. Query 0 is of row `row`, and query q of row following + q - 1. sink_ptr: of
    the group's first head."""
    head = tl.arange(0, GROUP_BLOCK)
    element = tl.arange(0, DIM_BLOCK)
    top = tl.full([GROUP_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    merged = tl.zeros([GROUP_BLOCK, DIM_BLOCK], tl.float32)
    first_start = first // AT_ONCE * AT_ONCE
    rounds = tl.cdiv(end - first_start, AT_ONCE)
    for number in tl.range(0, queries * rounds):  # one loop: two would take more registers
        query = number // rounds
        start = first_start + number % rounds * AT_ONCE
        top = tl.where(start > first_start, top, float("-inf"))
        merged = tl.where(start > first_start, merged, 0.0)
        chunk = start + tl.arange(0, AT_ONCE)
        there = ((chunk >= first) & (chunk < end))[:, None] & (head < GROUP)[None, :]
        part = base + query * end + chunk
        place = softmax_ptr + part[:, None] * 2 * GROUP + head[None, :]
        tops = tl.load(place, mask=there, other=float("-inf"), cache_modifier=".cg")
        sums = tl.load(place + GROUP, mask=there, other=0.0, cache_modifier=".cg")
        place = parts_ptr + (part[:, None] * GROUP + head[None, :])[:, :, None] * DIM + element[None, None, :]
        inside = there[:, :, None] & (element < DIM)[None, None, :]
        parts = tl.load(place, mask=inside, other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(tops, 0))
        bound = tl.where(new_top > float("-inf"), new_top, 0.0)
        weights = tl.exp2(tops - bound[None, :])
        shrink = tl.exp2(top - bound)
        merged = merged * shrink[:, None] + tl.sum(parts * weights[:, :, None], 0)
        total = total * shrink + tl.sum(sums * weights, 0)
        top = new_top
        if start + AT_ONCE >= end:
            own = tl.where(query == 0, row, following + query - 1)
            whole = total + sink_weights(sink_ptr, head, head < GROUP, bound) if SINKS else total
            result = (merged / whole[:, None]).to(out_ptr.dtype.element_ty)
            out_at = out_ptr + own * ROW_STRIDE + head[:, None] * DIM + element[None, :]
            tl.store(out_at, result, mask=(head < GROUP)[:, None] & (element < DIM)[None, :])


@triton.jit
def merge_by_the_last(
    arrived_ptr, parts_ptr, softmax_ptr, out_ptr, base, first, end, queries, row, following,
    ROW_STRIDE: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr, AT_ONCE: tl.constexpr, sink_ptr, SINKS: tl.constexpr,
):  # fmt: skip
    """Counts a program that has left its part, and sets the counter of the sequence and key head back to zero; the
    other arguments are those of _merge_parts."""
    tl.debug_barrier()
    before = tl.atomic_add(arrived_ptr, 1, sem="acq_rel")
    if before == end - first - 1:
        tl.store(arrived_ptr, 0)
        _merge_parts(
            parts_ptr, softmax_ptr, out_ptr, base, first, end, queries, row, following, ROW_STRIDE, DIM, DIM_BLOCK,
            GROUP, GROUP_BLOCK, AT_ONCE, sink_ptr, SINKS,
        )  # fmt: skip
