"""What adapters change of the weight that makes keys and values of latents, W' = c W + B A, where it is used in parts.

    absorb:  out[n, h, :L] = (c query[n, h, :P]) key_up[h] + (query[n, h, :P] B_key[h]) A
    raise:   out[n, h]     = c (value_up[h] merged[n, h]) + B_value[h] (A merged[n, h])
    expand:  keys_values[t] = c (W latent[t]) + B (A latent[t])

c, of magnitudes (DoRA), is 1 where adapters scale nothing. Of rows that decode each head of a row has a program of its
own behind the product, so that a row's bits do not depend on its neighbours; it merges attention's parts once more. Of
prompts each tile of a sequence's context has that sequence's adapter. Bytes: A and B of each row and head, mostly from
the L2 cache.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.triton.decode_attention import DecodeScratch
from baton.kernels.triton.decode_plan import DecodePlan
from baton.kernels.triton.latent_products import merged_latents, parts_of
from baton.kernels.triton.launch import launch_options, next_power_of_2, require
from baton.kernels.triton.low_rank import RANK_STEP, AdapterBank, BankSite
from baton.kernels.triton.pool import PagedPool
from baton.kernels.triton.prefill_attention import TILE

COLUMNS_A_TILE = 64
EXPANDED_COLUMNS, LATENT_STEP = 64, 64
"""Of a tile of keys and values, and of the product with A."""
CHUNKS, AT_ONCE = 256, 4
"""Of attention, that are looked through and merged at a time."""


class LatentPairs(NamedTuple):
    """Of the rows of a step, or of the tokens of its prompts."""

    bank: AdapterBank
    sites: Sequence[BankSite]
    """By layer; outputs as W has rows, of each head its plain key, then its value."""
    adapters: torch.Tensor  # int32 [N]: slots, below 0: none
    first: int = 0
    """Of the tokens that are meant, in `adapters`."""

    def places(self, layer: int) -> tuple[torch.Tensor | int, ...]:
        """What kernels read of a layer: adapters, numbers, ranks, scales and their stride, and where they lie."""
        bank, site = self.bank, self.sites[layer]
        scales = bank.scales_of(site)
        of_scales = (bank.ranks, 0) if scales is None else (scales, scales.stride(0))
        return self.adapters, bank.numbers, bank.ranks, *of_scales, site.number, site.a_offset, site.b_offset

    @property
    def constants(self) -> dict[str, int | bool]:
        bank = self.bank
        return {
            "SLOT_SIZE": bank.numbers.shape[1],
            "SITES": bank.ranks.shape[1],
            "SCALED": bank.scales is not None,
        }


@triton.jit(do_not_specialize=["site", "a_offset", "b_offset"])
def _absorb_pairs_kernel(
    query_ptr, weight_ptr, out_ptr, adapters_ptr, numbers_ptr, ranks_ptr, scales_ptr, scales_stride, site, a_offset,
    b_offset, HEADS: tl.constexpr, PLAIN: tl.constexpr, ROTATED: tl.constexpr, LATENT: tl.constexpr,
    HEAD_ROWS: tl.constexpr, TILE: tl.constexpr, RANK_STEP: tl.constexpr, SLOT_SIZE: tl.constexpr,
    SITES: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.program_id(2) * TILE + tl.arange(0, TILE)
    slot = tl.load(adapters_ptr + row).to(tl.int64)
    rank = tl.load(ranks_ptr + slot * SITES + site, mask=slot >= 0, other=0)
    if rank > 0:
        output = head * HEAD_ROWS + tl.arange(0, PLAIN)
        query_at = query_ptr + (row * HEADS + head) * (PLAIN + ROTATED)
        query = tl.load(query_at + tl.arange(0, PLAIN)).to(tl.float32)
        place = out_ptr + (row * HEADS + head) * (LATENT + ROTATED) + column
        if SCALED:
            scaled = query * tl.load(scales_ptr + slot * scales_stride + output)
            weight = tl.load(weight_ptr + output[:, None] * LATENT + column[None, :]).to(tl.float32)
            total = tl.sum(scaled[:, None] * weight, 0)
        else:
            total = tl.load(place).to(tl.float32)
        a_ptr = numbers_ptr + slot * SLOT_SIZE + rank.to(tl.int64) * a_offset
        b_ptr = numbers_ptr + slot * SLOT_SIZE + rank.to(tl.int64) * b_offset
        for first_r in tl.range(0, rank, RANK_STEP):
            r = first_r + tl.arange(0, RANK_STEP)
            b = tl.load(b_ptr + output[:, None] * rank + r[None, :]).to(tl.float32)
            hidden = tl.sum(query[:, None] * b, 0)
            a = tl.load(a_ptr + r[:, None] * LATENT + column[None, :]).to(tl.float32)
            total += tl.sum(hidden[:, None] * a, 0)
        tl.store(place, total.to(out_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["site", "a_offset", "b_offset", "num_chunks"])
def _raise_pairs_kernel(
    parts_ptr, softmax_ptr, work_ptr, out_ptr, num_chunks, adapters_ptr, numbers_ptr, ranks_ptr, scales_ptr,
    scales_stride, site, a_offset, b_offset, HEADS: tl.constexpr, PLAIN: tl.constexpr, VALUE: tl.constexpr,
    LATENT: tl.constexpr, CHUNKS: tl.constexpr, AT_ONCE: tl.constexpr, RANK_STEP: tl.constexpr,
    SLOT_SIZE: tl.constexpr, SITES: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(adapters_ptr + row).to(tl.int64)
    rank = tl.load(ranks_ptr + slot * SITES + site, mask=slot >= 0, other=0)
    if rank > 0:
        first, count = parts_of(work_ptr, tl.program_id(0) + tl.arange(0, 1), num_chunks, CHUNKS)
        merged = merged_latents(parts_ptr, softmax_ptr, head, first, count, HEADS, LATENT, CHUNKS, 1, AT_ONCE)
        merged = merged.to(out_ptr.dtype.element_ty).to(tl.float32)  # [1, LATENT]
        output = head * (PLAIN + VALUE) + PLAIN + tl.arange(0, VALUE)
        place = out_ptr + (row * HEADS + head) * VALUE + tl.arange(0, VALUE)
        total = tl.load(place).to(tl.float32)
        if SCALED:
            total *= tl.load(scales_ptr + slot * scales_stride + output)
        a_ptr = numbers_ptr + slot * SLOT_SIZE + rank.to(tl.int64) * a_offset
        b_ptr = numbers_ptr + slot * SLOT_SIZE + rank.to(tl.int64) * b_offset
        for first_r in tl.range(0, rank, RANK_STEP):
            r = first_r + tl.arange(0, RANK_STEP)
            a = tl.load(a_ptr + r[:, None] * LATENT + tl.arange(0, LATENT)[None, :]).to(tl.float32)
            hidden = tl.sum(a * merged, 1)
            b = tl.load(b_ptr + output[:, None] * rank + r[None, :]).to(tl.float32)
            total += tl.sum(b * hidden[None, :], 1)
        tl.store(place, total.to(out_ptr.dtype.element_ty))


@triton.jit(
    do_not_specialize=[
        "num_sequences", "first_tile", "slice_tiles", "layer", "unit_rows", "first_token", "site", "a_offset",
        "b_offset",
    ]
)  # fmt: skip
def _expand_latents_kernel(
    pool_ptr, table_ptr, length_ptr, start_ptr, out_ptr, num_sequences, first_tile, slice_tiles, layer, unit_rows,
    table_stride, first_token, adapters_ptr, numbers_ptr, ranks_ptr, scales_ptr, scales_stride, site, a_offset,
    b_offset, COLUMNS: tl.constexpr, LATENT: tl.constexpr, ROTATED: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    LAYER_ROWS: tl.constexpr, SEQUENCES: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr,
    MAX_RANK: tl.constexpr, SLOT_SIZE: tl.constexpr, SITES: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """Tiles are those of latent_prefill's expansion."""
    sequence = tl.arange(0, SEQUENCES)
    lengths = tl.load(length_ptr + sequence, mask=sequence < num_sequences, other=0)
    counts = tl.cdiv(lengths, TILE)
    ends = tl.cumsum(counts, 0)
    used = tl.minimum(tl.maximum(tl.sum(counts, 0) - first_tile, 0), slice_tiles)
    WIDE: tl.constexpr = (COLUMNS + WIDTH - 1) // WIDTH
    r = tl.arange(0, MAX_RANK)
    for item in tl.range(tl.program_id(0), used * WIDE, tl.num_programs(0)):
        number = item // WIDE
        mine = tl.sum((ends <= number + first_tile).to(tl.int32), 0)
        slot = tl.load(adapters_ptr + first_token + tl.load(start_ptr + mine)).to(tl.int64)
        rank = tl.load(ranks_ptr + slot * SITES + site, mask=slot >= 0, other=0)
        if rank > 0:
            before = tl.sum(tl.where(sequence < mine, counts, 0), 0)
            length = tl.sum(tl.where(sequence == mine, lengths, 0), 0)
            token = (number + first_tile - before) * TILE + tl.arange(0, TILE)
            inside = (token < length)[:, None]
            block = tl.load(table_ptr + mine * table_stride + token // BLOCK_TOKENS, mask=token < length, other=0)
            row = block.to(tl.int64) * unit_rows + layer * LAYER_ROWS + token % BLOCK_TOKENS
            latents_at = pool_ptr + row[:, None] * (LATENT + ROTATED)
            matrix = numbers_ptr + slot * SLOT_SIZE + rank.to(tl.int64) * a_offset
            hidden = tl.zeros([TILE, MAX_RANK], tl.float32)
            for start in tl.range(0, LATENT, STEP):
                element = (start + tl.arange(0, STEP))[None, :]
                latents = tl.load(latents_at + element, mask=inside, other=0.0)
                a = tl.load(matrix + r[:, None] * LATENT + element, mask=(r < rank)[:, None], other=0.0)
                hidden = tl.dot(latents, a.T, hidden, input_precision="ieee")
            column = item % WIDE * WIDTH + tl.arange(0, WIDTH)
            known = column < COLUMNS
            matrix = numbers_ptr + slot * SLOT_SIZE + rank.to(tl.int64) * b_offset
            b_at = matrix + column[:, None] * rank + r[None, :]
            b = tl.load(b_at, mask=known[:, None] & (r < rank)[None, :], other=0.0)
            out_row = number.to(tl.int64) * TILE + tl.arange(0, TILE)
            place = out_ptr + out_row[:, None] * COLUMNS + column[None, :]
            total = tl.load(place, mask=known[None, :], other=0.0).to(tl.float32)
            if SCALED:
                total *= tl.load(scales_ptr + slot * scales_stride + column, mask=known, other=1.0)[None, :]
            total = tl.dot(hidden.to(b.dtype), b.T, total, input_precision="ieee")
            tl.store(place, total.to(out_ptr.dtype.element_ty), mask=known[None, :])


def absorb_pairs(
    query: torch.Tensor, kv_up: torch.Tensor, out: torch.Tensor, pairs: LatentPairs, layer: int, *, pdl: bool = False
) -> None:
    """Behind latent_products.absorb, with its query, kv_up and out."""
    (num_rows, heads, dim), (head_rows, latent) = query.shape, kv_up.shape[1:]
    rotated = out.shape[2] - latent
    require(pairs.first == 0, "rows that decode come first")
    _check(pairs, layer, num_rows, latent, heads * head_rows, query, kv_up, out)
    if num_rows:
        tile = min(COLUMNS_A_TILE, latent)
        _absorb_pairs_kernel[(num_rows, heads, latent // tile)](
            query, kv_up, out, *pairs.places(layer), HEADS=heads, PLAIN=dim - rotated, ROTATED=rotated, LATENT=latent,
            HEAD_ROWS=head_rows, TILE=tile, RANK_STEP=RANK_STEP, PDL=pdl, **pairs.constants, **launch_options(4, pdl),
        )  # fmt: skip


def raise_pairs(
    scratch: DecodeScratch,
    plan: DecodePlan,
    kv_up: torch.Tensor,
    out: torch.Tensor,
    pairs: LatentPairs,
    layer: int,
    *,
    pdl: bool = False,
) -> None:
    """Behind latent_products.raise_merged, with the same."""
    (num_rows, heads, value), (head_rows, latent) = out.shape, kv_up.shape[1:]
    _check(pairs, layer, num_rows, latent, heads * head_rows, kv_up, out)
    if num_rows:
        _raise_pairs_kernel[(num_rows, heads)](
            scratch.parts, scratch.softmax, scratch.work, out, plan.num_chunks, *pairs.places(layer), HEADS=heads,
            PLAIN=head_rows - value, VALUE=value, LATENT=latent, CHUNKS=CHUNKS, AT_ONCE=AT_ONCE, RANK_STEP=RANK_STEP,
            PDL=pdl, **pairs.constants, **launch_options(4, pdl),
        )  # fmt: skip


def expand_pairs(
    pool: PagedPool,
    layer: int,
    tables: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    keys_values: torch.Tensor,
    pairs: LatentPairs,
    first_tile: int,
    num_programs: int,
    rotated: int,
) -> None:
    """Behind the expansion of a slice into keys_values [slice tokens, H * (P + V)], whose first tile is number
    first_tile of the step's; the others as latent_prefill_attention has them. pairs: of the new tokens."""
    columns, latent = keys_values.shape[1], pool.head_dim - rotated
    _check(pairs, layer, 0, latent, columns, keys_values, starts, lengths)
    warps = 8 if pairs.bank.max_rank > 64 else 4  # for the registers
    _expand_latents_kernel[(num_programs,)](
        pool.tensor, tables, lengths, starts, keys_values, len(lengths), first_tile, len(keys_values) // TILE, layer,
        pool.unit_rows, tables.stride(0), pairs.first, *pairs.places(layer), COLUMNS=columns, LATENT=latent,
        ROTATED=rotated, BLOCK_TOKENS=pool.block_tokens, LAYER_ROWS=pool.layer_rows,
        SEQUENCES=next_power_of_2(len(lengths)), TILE=TILE, WIDTH=min(EXPANDED_COLUMNS, next_power_of_2(columns)),
        STEP=min(LATENT_STEP, latent), MAX_RANK=pairs.bank.max_rank, **pairs.constants,
        **launch_options(warps, False, 2),
    )  # fmt: skip


def _check(pairs: LatentPairs, layer: int, num_rows: int, latent: int, outputs: int, *tensors: torch.Tensor) -> None:
    site = pairs.sites[layer]
    require(site.inputs == latent and site.ends == (outputs,), f"{latent} inputs, {outputs} outputs, a site of {site}")
    require(len(pairs.adapters) >= num_rows, f"{len(pairs.adapters)} adapters for {num_rows} rows")
    for tensor in (pairs.adapters, pairs.bank.numbers, pairs.bank.ranks, *tensors):
        require(tensor.is_contiguous(), "tensors must be contiguous")
