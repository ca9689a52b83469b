"""Whole KV blocks: their checksums, and copies between the pool and a contiguous staging buffer.

    checks[i] = mix(words + sum over j of (lo_j ^ a_j) * (hi_j ^ b_j) + w_j)   w: the words of row ids[i]
                a_j = (2 j + 1) * 0x9E3779B1, b_j = (2 j + 1) * 0x85EBCA77     mod 2**32
    gather:  staging[i] = pool[ids[i]]          scatter:  pool[ids[i]] = staging[i]

Blocks are seen as rows of 64-bit words, of which lo and hi are the halves and mix is SplitMix64's finaliser; a program
does SLICE words of one row. Rows of checksums may be longer or shorter than the distance between two ids. Bytes: a
checksum reads each row once, a copy reads and writes each block once.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from baton.kernels.triton.launch import Launch, cdiv, next_power_of_2, require

WORD_BYTES = 8
SLICE, WARPS = 8192, 8  # 64 KiB a program
STEP = 2048  # words that a program holds at a time: 64 bytes a thread in flight, four times over


@triton.jit
def _checksum_parts_kernel(
    pool_ptr,
    id_ptr,
    part_ptr,
    WORDS: tl.constexpr,
    STRIDE: tl.constexpr,
    FIRST: tl.constexpr,
    SLICE: tl.constexpr,
    STEP: tl.constexpr,
):
    part = tl.program_id(0)
    row = tl.load(id_ptr + tl.program_id(1)).to(tl.int64) * STRIDE
    total = tl.zeros([STEP], tl.int64)
    for start in tl.static_range(0, SLICE, STEP):
        index = part * SLICE + start + tl.arange(0, STEP)
        inside = index < WORDS
        word = tl.load(pool_ptr + row + index, mask=inside, other=0)
        odd = (2 * (FIRST + index) + 1).to(tl.uint32)
        low = (word & 0xFFFFFFFF).to(tl.uint32) ^ (odd * 0x9E3779B1)
        high = (word >> 32).to(tl.uint32) ^ (odd * 0x85EBCA77)
        term = (low.to(tl.uint64) * high.to(tl.uint64)).to(tl.int64) + word
        total += tl.where(inside, term, 0)
    tl.store(part_ptr + tl.program_id(1) * tl.num_programs(0) + part, tl.sum(total, 0))


@triton.jit
def _checksum_ends_kernel(
    part_ptr, check_ptr, WORDS: tl.constexpr, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr, MIX: tl.constexpr
):
    part = tl.arange(0, PARTS_BLOCK)
    parts = tl.load(part_ptr + tl.program_id(0) * PARTS + part, mask=part < PARTS, other=0)
    if MIX:
        x = (tl.sum(parts, 0) + WORDS).to(tl.uint64)
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB
        tl.store(check_ptr + tl.program_id(0), (x ^ (x >> 31)).to(tl.int64))
    else:
        tl.store(check_ptr + tl.program_id(0), tl.sum(parts, 0))


@triton.jit
def _copy_blocks_kernel(
    pool_ptr, staging_ptr, id_ptr, WORDS: tl.constexpr, SLICE: tl.constexpr, STEP: tl.constexpr, GATHER: tl.constexpr
):
    place = tl.program_id(1).to(tl.int64) * WORDS
    block = tl.load(id_ptr + tl.program_id(1)).to(tl.int64) * WORDS
    for start in tl.static_range(0, SLICE, STEP):
        index = tl.program_id(0) * SLICE + start + tl.arange(0, STEP)
        inside = index < WORDS
        if GATHER:
            tl.store(staging_ptr + place + index, tl.load(pool_ptr + block + index, mask=inside), mask=inside)
        else:
            tl.store(pool_ptr + block + index, tl.load(staging_ptr + place + index, mask=inside), mask=inside)


def checksum_scratch(max_rows: int, pool: torch.Tensor, row_bytes: int | None = None) -> torch.Tensor:
    """Room for the parts of block_checksums of up to max_rows rows, by default blocks: int64 [max_rows, parts]."""
    words = _words(pool).shape[1] if row_bytes is None else _num_words(row_bytes)
    return torch.empty(max_rows, cdiv(words, SLICE), dtype=torch.int64, device=pool.device)


class BlockChecksums:
    """out int64 [n]: the checksums of pool[ids] or, with row_bytes, of so many bytes from the begin of pool[ids] on;
    each call makes those of the first few.

    With first_byte each row is a part of a larger one, which begins so far inside it: out has the sums of its terms,
    which checksum.checksums_of_parts makes checksums of.
    """

    def __init__(
        self,
        pool: torch.Tensor,
        ids: torch.Tensor,
        scratch: torch.Tensor,
        out: torch.Tensor,
        row_bytes: int | None = None,
        first_byte: int | None = None,
    ) -> None:
        """pool [blocks, ...] of any dtype, contiguous; a block, and a row, have a multiple of 8 bytes. ids int32 or
        int64 [n]; scratch from checksum_scratch."""
        blocks = _words(pool)
        self._most, stride = ids.shape[0], blocks.shape[1]
        words = stride if row_bytes is None else _num_words(row_bytes)
        self._parts = parts = cdiv(words, SLICE)
        sizes = tuple(scratch.shape)
        require(sizes[0] >= self._most and sizes[1] == parts, f"scratch {sizes} is too small")
        integers = out.dtype == scratch.dtype == torch.int64
        require(out.shape == (self._most,) and integers, "out must be int64, one a row")
        step = min(STEP, next_power_of_2(words))
        size = min(SLICE, cdiv(words, step) * step)
        cut = words, stride, _num_words(first_byte or 0), size, step
        self._make_parts = Launch(_checksum_parts_kernel, (parts, 1), blocks, ids, scratch, *cut, num_warps=WARPS)
        ended = words, parts, next_power_of_2(parts), first_byte is None
        self._end = Launch(_checksum_ends_kernel, (1,), scratch, out, *ended, num_warps=1)

    def __call__(self, count: int) -> None:
        """Launches those of the first `count` ids."""
        require(count <= self._most, f"{count} checksums, there is room for {self._most}")
        if count:
            self._make_parts.over((self._parts, count))()
            self._end.over((count,))()


def block_checksums(
    pool: torch.Tensor,
    ids: torch.Tensor,
    scratch: torch.Tensor,
    out: torch.Tensor,
    row_bytes: int | None = None,
    first_byte: int | None = None,
) -> None:
    """BlockChecksums of all ids, once."""
    BlockChecksums(pool, ids, scratch, out, row_bytes, first_byte)(ids.shape[0])


def gather_blocks(pool: torch.Tensor, ids: torch.Tensor, staging: torch.Tensor) -> None:
    """staging[i] = pool[ids[i]]; both contiguous, blocks of one shape and dtype; ids int32 or int64 [n]."""
    _copy(pool, ids, staging, gather=True)


def scatter_blocks(staging: torch.Tensor, ids: torch.Tensor, pool: torch.Tensor) -> None:
    """pool[ids[i]] = staging[i]; ids must differ."""
    _copy(pool, ids, staging, gather=False)


def _copy(pool: torch.Tensor, ids: torch.Tensor, staging: torch.Tensor, gather: bool) -> None:
    require(pool.shape[1:] == staging.shape[1:] and pool.dtype == staging.dtype, "blocks differ in shape or dtype")
    require(ids.dim() == 1 and staging.shape[0] >= ids.shape[0], "staging holds fewer blocks than ids")
    words, target = _words(pool), _words(staging)
    if ids.shape[0] == 0:
        return
    step = min(STEP, next_power_of_2(words.shape[1]))
    size = min(SLICE, cdiv(words.shape[1], step) * step)
    grid = (cdiv(words.shape[1], size), ids.shape[0])
    _copy_blocks_kernel[grid](words, target, ids, words.shape[1], size, step, gather, num_warps=WARPS)


def _words(blocks: torch.Tensor) -> torch.Tensor:
    """[blocks, words]: each block as 64-bit words."""
    require(blocks.is_contiguous(), "blocks must be contiguous")
    _num_words(blocks[0].numel() * blocks.element_size())
    return blocks.flatten(1).view(torch.int64)


def _num_words(size_bytes: int) -> int:
    require(size_bytes % WORD_BYTES == 0, f"{size_bytes} bytes are no whole number of 64-bit words")
    return size_bytes // WORD_BYTES
