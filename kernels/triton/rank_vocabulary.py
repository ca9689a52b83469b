"""Exchanges of ranks that have a part of the vocabulary each: the best token of all, and all logits, by `rank_words`.

The best of a row is one word of 8 bytes a rank: its value, its token (24 bits) and the number of the exchange (8
bits). Of equals the lowest token wins, so all ranks draw what one rank would. Logits are exchanged for the rows alone
that need all of them at one place.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from baton.kernels.triton.launch import cdiv, launch_options, next_power_of_2, require
from baton.kernels.triton.rank_words import (
    LANES,
    STALE,
    RankInbox,
    give_up,
    is_stale,
    now,
    pack,
    send,
    status_of,
    unpack,
)

BLOCK = 1024
TOKEN_TAG = tl.constexpr(0xFF)
MOST_TOKENS = 1 << 24


@triton.jit
def best_over_ranks(
    value, token, row, targets_ptr, words_ptr, counters_ptr, lost_ptr, ROWS: tl.constexpr, RANK: tl.constexpr,
    RANKS: tl.constexpr, SENDS: tl.constexpr, TAKES: tl.constexpr, CLOCK: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """The token of the largest value of all ranks, of float32 scalars and tokens; row: of the inbox, whose rows are one
    word wide."""
    tag = tl.load(counters_ptr + row) + 1
    place = (tag & 1).to(tl.int64) * ROWS + row
    own = (value.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (token.to(tl.int64) << 8) | (tag & TOKEN_TAG)
    other = tl.arange(0, LANES)
    is_other = (other < RANKS) & (other != RANK)
    if SENDS:
        bases = tl.load(targets_ptr + other, mask=is_other, other=0).to(tl.pointer_type(tl.int64))
        tl.store(bases + place, own + tl.zeros([LANES], tl.int64), mask=is_other)
    best = token.to(tl.int32)
    if TAKES:
        status = tl.full([], 2, tl.int32)
        polls = tl.full([], 0, tl.int32)
        began = now(polls, CLOCK)
        word = tl.zeros([LANES], tl.int64)
        while status == STALE:
            word = tl.load(words_ptr + other * 2 * ROWS + place, mask=is_other, other=0, volatile=True)
            stale = is_other & ((word & TOKEN_TAG) != (tag & TOKEN_TAG))
            polls += 1
            status = status_of(stale, polls, began, lost_ptr, CLOCK, LIMIT)
        if status > STALE:
            tl.store(lost_ptr, 1)
        tl.store(counters_ptr + row, tag)
        word = tl.where(other == RANK, own, word)
        values = (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        values = tl.where(other < RANKS, values, float("-inf"))
        _, winner = tl.max(values, 0, return_indices=True)
        tokens = ((word >> 8) & 0xFFFFFF).to(tl.int32)
        best = tl.sum(tl.where(other == winner, tokens, 0), 0)
    return best


@triton.jit
def _best_of_rows_kernel(
    value_ptr, token_ptr, out_ptr, targets_ptr, words_ptr, counters_ptr, lost_ptr, first_row, BLOCKS: tl.constexpr,
    BLOCKS_PADDED: tl.constexpr, ROWS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, SENDS: tl.constexpr,
    TAKES: tl.constexpr, CLOCK: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    row = first_row + tl.program_id(0)
    block = tl.arange(0, BLOCKS_PADDED)
    values = tl.load(value_ptr + row * BLOCKS + block, mask=block < BLOCKS, other=float("-inf"))
    best, place = tl.max(values, 0, return_indices=True)
    token = best_over_ranks(
        best, tl.load(token_ptr + row * BLOCKS + place), tl.program_id(0), targets_ptr, words_ptr, counters_ptr,
        lost_ptr, ROWS, RANK, RANKS, SENDS, TAKES, CLOCK, LIMIT,
    )  # fmt: skip
    if TAKES:
        tl.store(out_ptr + row, token.to(out_ptr.dtype.element_ty))


def best_of_rows(values: torch.Tensor, tokens: torch.Tensor, blocks: int, ranks: RankInbox, out: torch.Tensor) -> None:
    """out [M]: of each row the token of the best value of all ranks; values and tokens [M, blocks] are this rank's."""
    for first_row in range(0, len(out), ranks.rows):
        for phase in ranks.phases():
            ranks.between(phase)
            _best_of_rows_kernel[(min(ranks.rows, len(out) - first_row),)](
                values,
                tokens,
                out,
                ranks.targets,
                ranks.words,
                ranks.counters,
                ranks.lost,
                first_row,
                BLOCKS=blocks,
                BLOCKS_PADDED=next_power_of_2(blocks),
                ROWS=ranks.rows,
                RANK=ranks.rank,
                RANKS=ranks.count,
                SENDS=phase.sends,
                TAKES=phase.takes,
                **give_up(ranks.words),
                **launch_options(1, False),
            )


@triton.jit
def _meet_kernel(
    targets_ptr, words_ptr, counters_ptr, lost_ptr, ROWS: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr,
    SENDS: tl.constexpr, TAKES: tl.constexpr, CLOCK: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    zero = tl.full([], 0.0, tl.float32)
    best_over_ranks(
        zero, tl.full([], 0, tl.int32), 0, targets_ptr, words_ptr, counters_ptr, lost_ptr, ROWS, RANK, RANKS, SENDS,
        TAKES, CLOCK, LIMIT,
    )  # fmt: skip


def meet(ranks: RankInbox) -> None:
    """Nothing behind it runs before all ranks have come here. ranks: an inbox of single words."""
    for phase in ranks.phases():
        ranks.between(phase)
        _meet_kernel[(1,)](
            ranks.targets,
            ranks.words,
            ranks.counters,
            ranks.lost,
            ROWS=ranks.rows,
            RANK=ranks.rank,
            RANKS=ranks.count,
            SENDS=phase.sends,
            TAKES=phase.takes,
            **give_up(ranks.words),
            **launch_options(1, False),
        )


@triton.jit
def _gather_kernel(
    logits_ptr, out_ptr, targets_ptr, words_ptr, counters_ptr, lost_ptr, VOCAB: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, SENDS: tl.constexpr,
    TAKES: tl.constexpr, CLOCK: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    SHORT: tl.constexpr = words_ptr.dtype.element_ty == tl.int32
    FIRST: tl.constexpr = RANK * VOCAB // RANKS
    SHARE: tl.constexpr = (RANK + 1) * VOCAB // RANKS - FIRST
    row = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    column = piece * BLOCK + tl.arange(0, BLOCK)
    counter = counters_ptr + row * tl.num_programs(1) + piece
    tag = tl.load(counter) + 1
    place = ((tag & 1).to(tl.int64) * ROWS + row) * WIDTH
    own = tl.load(logits_ptr + row * SHARE + column, mask=column < SHARE, other=0.0)
    if SENDS:
        # As many from each rank: one that sends to itself finds what the widest would send.
        words, sent = pack(own.to(tl.float32), tag, SHORT), column < (VOCAB + RANKS - 1) // RANKS
        send(words, targets_ptr, place, column, sent, RANK, RANKS)
    if TAKES:
        tl.store(out_ptr + row * VOCAB + FIRST + column, own, mask=column < SHARE)
        status = tl.full([], 2, tl.int32)
        polls = tl.full([], 0, tl.int32)
        began = now(polls, CLOCK)
        while status == STALE:
            stale = tl.zeros([BLOCK], tl.int1)
            for other in tl.static_range(RANKS):
                if other != RANK:
                    inside = column < (other + 1) * VOCAB // RANKS - other * VOCAB // RANKS
                    word = tl.load(
                        words_ptr + other * 2 * ROWS * WIDTH + place + column, mask=inside, other=0, volatile=True
                    )
                    stale = stale | (inside & is_stale(word, tag, SHORT))
                    value = unpack(word, SHORT).to(out_ptr.dtype.element_ty)
                    tl.store(out_ptr + row * VOCAB + other * VOCAB // RANKS + column, value, mask=inside)
            polls += 1
            status = status_of(stale, polls, began, lost_ptr, CLOCK, LIMIT)
        if status > STALE:
            tl.store(lost_ptr, 1)
        tl.store(counter, tag)


def pieces_of(width: int) -> int:
    """Counters that a row of logits needs in an inbox."""
    return cdiv(width, BLOCK)


def gather_logits(logits: torch.Tensor, ranks: RankInbox, out: torch.Tensor) -> None:
    """out [M, vocab]: the parts [M, this rank's tokens] of all ranks side by side. All contiguous."""
    num_rows, vocab_size = out.shape
    require(logits.is_contiguous() and out.is_contiguous(), "tensors must be contiguous")
    share = (ranks.rank + 1) * vocab_size // ranks.count - ranks.rank * vocab_size // ranks.count
    require(tuple(logits.shape) == (num_rows, share), f"logits {tuple(logits.shape)}, not {(num_rows, share)}")
    require(logits.dtype == out.dtype, f"logits of {logits.dtype} and {out.dtype}")
    widest = cdiv(vocab_size, ranks.count)
    ranks.check(widest, logits.dtype)
    pieces = pieces_of(widest)
    require(ranks.counters.numel() >= ranks.rows * pieces, "the inbox has too few counters")
    for first in range(0, num_rows, ranks.rows):
        count = min(ranks.rows, num_rows - first)
        for phase in ranks.phases():
            ranks.between(phase)
            _gather_kernel[(count, pieces)](
                logits[first : first + count],
                out[first : first + count],
                ranks.targets,
                ranks.words,
                ranks.counters,
                ranks.lost,
                VOCAB=vocab_size,
                BLOCK=BLOCK,
                ROWS=ranks.rows,
                WIDTH=ranks.words.shape[3],
                RANK=ranks.rank,
                RANKS=ranks.count,
                SENDS=phase.sends,
                TAKES=phase.takes,
                **give_up(ranks.words),
                **launch_options(4, False),
            )
