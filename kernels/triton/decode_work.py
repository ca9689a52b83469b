"""The chunks of a decode step, shared out on the GPU from the lengths that it finds there: once a step, for all layers.

    tiles[r] = ceil((length[r] + queries[r] - 1) / TILE);  share = sum(tiles) / (splits * sum(queries))
    most[r] = max(merged, sqrt(tiles[r] * merged / MERGE_COST)), where parts are merged `merged` at a time
    chunk[r] = max(least, ceil(tiles[r] / min(most[r], max(1, round(tiles[r] / share))))), or what is fixed
    parts[r] = ceil(tiles[r] / chunk[r])

The last of p parts to end merges all, so a sequence takes tiles / p + MERGE_COST * p / merged: least with `most` parts.
A row has one query or, with drafts, up to decode_plan.queries_of consecutive tokens of a sequence, which read its keys
and values together; the rows of the others have 0 then. Unless chunks are fixed, a sequence that is much longer than
the others takes no longer than they do; those that differ little stay whole, for a cut costs more than it evens out.
The largest chunks come first (R. L. Graham's rule, 1969), so that the last to end is not one that began late.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from baton.kernels.triton.decode_plan import MERGE_COST, TILE, DecodePlan
from baton.kernels.triton.launch import next_power_of_2, require

WRITTEN = 128  # chunks at a time

# Columns of the work, int32; a row a chunk. START = END: no chunk.
ROW = tl.constexpr(0)
START, END = tl.constexpr(1), tl.constexpr(2)  # tokens; END that of the last query
CHUNK = tl.constexpr(3)  # tokens of all chunks of the sequence but the last
FIRST, PARTS = tl.constexpr(4), tl.constexpr(5)  # place of the first part, one a query and chunk; number of chunks
QUERIES = tl.constexpr(6)
FOLLOWING = tl.constexpr(7)  # row of the second query; those of more follow it
COLUMNS = tl.constexpr(8)


@triton.jit(do_not_specialize=["num_rows", "num_chunks", "splits", "fixed_tiles", "least_tiles", "merged"])
def _share_out_kernel(
    length_ptr, query_ptr, following_ptr, work_ptr, num_rows, num_chunks, splits, fixed_tiles, least_tiles,
    merged, ROWS: tl.constexpr, TILE: tl.constexpr, WRITTEN: tl.constexpr, GROUPED: tl.constexpr,
    MERGE_COST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    each = tl.arange(0, ROWS)
    lengths = tl.load(length_ptr + each, mask=each < num_rows, other=0)
    queries = (lengths > 0).to(tl.int32)
    following = row
    if GROUPED:
        queries *= tl.load(query_ptr + each, mask=each < num_rows, other=0)
        following = tl.load(following_ptr + row)
    lengths = tl.where(queries > 0, lengths + queries - 1, 0)
    tiles = tl.cdiv(lengths, TILE)
    if fixed_tiles > 0:
        chunks = tl.zeros_like(tiles) + fixed_tiles
    else:
        shares = splits * tl.sum(queries, 0)
        all_tiles = tl.maximum(tl.sum(tiles, 0), 1)
        parts = tl.maximum((2 * tiles * shares + all_tiles) // (2 * all_tiles), 1)
        if merged > 0:
            most = tl.sqrt((tiles * merged).to(tl.float32) / MERGE_COST).to(tl.int32)
            parts = tl.minimum(parts, tl.maximum(most, merged))
        chunks = tl.maximum(tl.cdiv(tiles, parts), least_tiles)
    parts = tl.cdiv(tiles, chunks)
    count = tl.sum(tl.where(each == row, parts, 0), 0)
    length = tl.sum(tl.where(each == row, lengths, 0), 0)
    chunk = tl.sum(tl.where(each == row, chunks, 0), 0)
    own_queries = tl.sum(tl.where(each == row, queries, 0), 0)
    before = (chunks > chunk) | ((chunks == chunk) & (each < row))
    first = tl.sum(tl.where(before, parts, 0), 0)
    first_part = tl.sum(tl.where(before, parts * queries, 0), 0)
    chunk *= TILE
    for start in tl.range(0, count, WRITTEN):
        part = start + tl.arange(0, WRITTEN)
        inside = (part < count) & (first + part < num_chunks)
        place = work_ptr + (first + part) * COLUMNS
        zero = tl.zeros_like(part)
        tl.store(place + ROW, zero + row, mask=inside)
        tl.store(place + START, part * chunk, mask=inside)
        tl.store(place + END, tl.minimum((part + 1) * chunk, length), mask=inside)
        tl.store(place + CHUNK, zero + chunk, mask=inside)
        tl.store(place + FIRST, zero + first_part, mask=inside)
        tl.store(place + PARTS, zero + count, mask=inside)
        tl.store(place + QUERIES, zero + own_queries, mask=inside)
        tl.store(place + FOLLOWING, zero + following, mask=inside)
    used = tl.sum(parts, 0)
    for start in tl.range(used + row * WRITTEN, num_chunks, num_rows * WRITTEN):  # places that were used before
        place = start + tl.arange(0, WRITTEN)
        zero = tl.zeros_like(place)
        tl.store(work_ptr + place * COLUMNS + START, zero, mask=place < num_chunks)
        tl.store(work_ptr + place * COLUMNS + END, zero, mask=place < num_chunks)


def share_out(
    lengths: torch.Tensor,
    plan: DecodePlan,
    work: torch.Tensor,
    queries: torch.Tensor | None = None,
    following: torch.Tensor | None = None,
) -> None:
    """Fills the first plan.num_chunks rows of work [chunks, COLUMNS], int32; lengths int32 [rows], 0 for padding.

    queries int32 [rows]: consecutive tokens from a row's on that read together, up to plan.queries, and 0 of those that
    another row counts; following int32 [rows]: the row of the second. By default each reads alone. The rows may be no
    more, and no longer, than the plan was made for: what has no place is not computed.
    """
    require(lengths.dim() == 1 and lengths.dtype == work.dtype == torch.int32, "lengths and work must be int32")
    require(lengths.is_contiguous() and work.is_contiguous(), "tensors must be contiguous")
    require(work.shape[0] >= plan.num_chunks and work.shape[1] == COLUMNS.value, "the work does not fit the plan")
    require((queries is None) == (following is None), "queries come with the rows that follow")
    num_rows = lengths.shape[0]
    if num_rows:
        _share_out_kernel[(num_rows,)](
            lengths, queries, following, work, num_rows, plan.num_chunks, plan.splits, plan.chunk_tokens // TILE,
            plan.least_tokens // TILE, plan.merged, ROWS=next_power_of_2(num_rows), TILE=TILE, WRITTEN=WRITTEN,
            GROUPED=queries is not None, MERGE_COST=MERGE_COST, num_warps=4,
        )  # fmt: skip
