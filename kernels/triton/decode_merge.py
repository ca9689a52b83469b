"""The parts of a sequence that several programs of decode attention left, merged in the order of its chunks."""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def merge_parts(
    parts_ptr, softmax_ptr, out_ptr, base, first, end, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Writes a group's output from the parts first .. end - 1, which begin at row `base` of the scratch."""
    head = tl.arange(0, GROUP_BLOCK)
    element = tl.arange(0, DIM_BLOCK)
    top = tl.full([GROUP_BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    merged = tl.zeros([GROUP_BLOCK, DIM_BLOCK], tl.float32)
    for start in tl.range(first, end, AT_ONCE):
        chunk = start + tl.arange(0, AT_ONCE)
        there = (chunk < end)[:, None] & (head < GROUP)[None, :]
        place = softmax_ptr + (base + chunk)[:, None] * 2 * GROUP + head[None, :]
        tops = tl.load(place, mask=there, other=float("-inf"), cache_modifier=".cg")
        sums = tl.load(place + GROUP, mask=there, other=0.0, cache_modifier=".cg")
        place = parts_ptr + ((base + chunk)[:, None] * GROUP + head[None, :])[:, :, None] * DIM + element[None, None, :]
        inside = there[:, :, None] & (element < DIM)[None, None, :]
        parts = tl.load(place, mask=inside, other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(tops, 0))
        new_top = tl.where(head < GROUP, new_top, 0.0)
        weights = tl.exp2(tops - new_top[None, :])
        shrink = tl.exp2(top - new_top)
        merged = merged * shrink[:, None] + tl.sum(parts * weights[:, :, None], 0)
        total = total * shrink + tl.sum(sums * weights, 0)
        top = new_top
    inside = (head < GROUP)[:, None] & (element < DIM)[None, :]
    result = merged / total[:, None]
    tl.store(out_ptr + head[:, None] * DIM + element[None, :], result.to(out_ptr.dtype.element_ty), mask=inside)
