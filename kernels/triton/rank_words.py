"""What the ranks of a model send each other inside a step: words that say themselves that they have come.

A rank writes each number straight into the memory of every other rank, in a word with the number of the exchange beside
it, and reads its own memory until all words have that number. So an exchange is one way of the link, and needs neither
a flag nor a fence: a word is stored whole. Where bfloat16 is exchanged a word has 32 bits, of which the upper half is
the number, else 64 with a float32.

Two ranks exchange whole parts of a sum. From TWO_STEPS ranks on a rank gets one piece of each part, adds the pieces up
and sends the sum: a row then crosses the links twice, and not once for each other rank, and a program reads two rows of
words, and not one for each other rank.

An inbox has two places for each sender and row, used in turn. A rank sends exchange k + 2 only after it has taken
k + 1, which the others have sent after they have taken k: so no word is overwritten before it was read. Rows have
counters of their own, which a captured step advances by itself. All ranks make the same exchanges in the same order.

Waiting ends by the clock: then `lost` is set, and nothing waits any more. What is computed behind that is of no use.

No thread waits for a word that another thread waits for too. Where a tensor has fewer elements than there are threads,
Triton gives several threads the same element, and takes for granted that they have the same value. But each reads the
word by itself: one may see it before it has come and one behind that, and a reduction takes the result of either, so a
loop would end with old words in the threads that store. Hence `waiting_warps` and LANES.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import globaltimer

from baton.kernels.triton.launch import next_power_of_2, require

GIVE_UP_NS = 10_000_000_000
TWO_STEPS = 4
POLLS = 3
"""Where there is no clock: in Triton's interpreter, in which all has come before it is looked for."""
LANES = tl.constexpr(32)
"""Threads of a warp: elements of the smallest tensor that a program waits for."""
SHORT_TAG = tl.constexpr(0xFFFF)
STALE, LATE = tl.constexpr(2), tl.constexpr(1)


class ExchangePhase(NamedTuple):
    """What a launch of an exchange does of it."""

    sends: bool
    adds: bool
    """Of an exchange in two steps: the pieces, and sends their sum."""
    takes: bool


WHOLE_EXCHANGE = ExchangePhase(True, True, True)


@dataclass(frozen=True, slots=True)
class RankInbox:
    """Where one rank gets rows of up to `width` words from the others, and where it sends its own."""

    rank: int
    count: int
    """Ranks."""
    words: torch.Tensor  # [places, 2, rows, width], int32 or int64; zeros before the first exchange
    targets: torch.Tensor  # int64 [ranks]: addresses of the words of each, of what this rank sends
    counters: torch.Tensor  # int32 [rows * pieces of a row]: exchanges so far
    lost: torch.Tensor  # int32 [1]: 1 once waiting was given up
    two_steps: bool = False
    """Places: pieces of all senders, then sums of all pieces. Else: one of each sender."""
    meet: Callable[[], None] | None = None
    """Called between steps, where kernels of ranks do not run side by side: each is a launch then."""

    @property
    def rows(self) -> int:
        return self.words.shape[2]

    def check(self, width: int, dtype: torch.dtype) -> None:
        """Rows of this width and dtype can be exchanged."""
        require(width <= self.words.shape[3], f"rows of {width}, an inbox has {self.words.shape[3]}")
        require(self.words.dtype == word_type(dtype), f"words of {self.words.dtype} for numbers of {dtype}")
        require(not self.two_steps or width == self.words.shape[3], "pieces are those of the inbox's rows")

    def phases(self) -> list[ExchangePhase]:
        """Of each launch of an exchange."""
        if self.meet is None:
            return [WHOLE_EXCHANGE]
        added = [ExchangePhase(False, True, False)] if self.two_steps else []
        return [ExchangePhase(True, False, False), *added, ExchangePhase(False, False, True)]

    def between(self, phase: ExchangePhase) -> None:
        """Before the launch of a phase."""
        if self.meet is not None and not phase.sends:
            self.meet()


def word_type(dtype: torch.dtype) -> torch.dtype:
    """Of words with numbers of this type."""
    return torch.int32 if dtype == torch.bfloat16 else torch.int64


def give_up(words: torch.Tensor) -> dict[str, int | bool]:
    """Of the kernels that wait."""
    clock = words.device.type != "cpu"
    return {"CLOCK": clock, "LIMIT": GIVE_UP_NS if clock else POLLS}


def waiting_block(width: int) -> int:
    """Columns of a program that waits for rows of this width."""
    return max(LANES.value, next_power_of_2(width))


def waiting_warps(width: int, most: int) -> int:
    """Of such a program: no more than give each thread columns of its own."""
    return min(most, waiting_block(width) // LANES.value)


@triton.jit
def pack(value, tag, SHORT: tl.constexpr):
    """Words of float32 values, which are rounded already if words are short."""
    bits = value.to(tl.int32, bitcast=True)
    if SHORT:
        return (bits & ~SHORT_TAG) | (tag & SHORT_TAG)
    else:
        return (bits.to(tl.int64) << 32) | (tag.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def unpack(word, SHORT: tl.constexpr):
    """The float32 values."""
    if SHORT:
        return (word & ~SHORT_TAG).to(tl.float32, bitcast=True)
    else:
        return (word >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def is_stale(word, tag, SHORT: tl.constexpr):
    if SHORT:
        return (word & SHORT_TAG) != (tag & SHORT_TAG)
    else:
        return (word & 0xFFFFFFFF) != (tag.to(tl.int64) & 0xFFFFFFFF)


@triton.jit
def send(words, targets_ptr, place, column, inside, RANK: tl.constexpr, RANKS: tl.constexpr):
    """To all other ranks, each beginning with the one behind it. place: of the row in what a sender has."""
    for step in tl.static_range(1, RANKS):
        other = (RANK + step) % RANKS
        base = tl.multiple_of(tl.load(targets_ptr + other).to(tl.pointer_type(words.dtype)), 16)
        tl.store(base + place + column, words, mask=inside)


@triton.jit
def now(polls, CLOCK: tl.constexpr):
    if CLOCK:
        return globaltimer()
    else:
        return polls.to(tl.int64)


@triton.jit
def status_of(stale, polls, began, lost_ptr, CLOCK: tl.constexpr, LIMIT: tl.constexpr):
    """STALE: go on; more: give up; less: all has come. Threads read the clock and `lost` each for itself, and what ends
    a loop must be one for all."""
    late = (now(polls, CLOCK) - began > LIMIT) | (tl.load(lost_ptr, volatile=True) != 0)
    found = stale.to(tl.int32) * STALE + late.to(tl.int32) * LATE
    status = tl.max(found)
    return tl.where(status == LATE, 0, status)


@triton.jit
def _sum_in_one_step(
    own, tag, place, column, inside, words_ptr, lost_ptr, ROWS: tl.constexpr, WIDTH: tl.constexpr, RANK: tl.constexpr,
    RANKS: tl.constexpr, SHORT: tl.constexpr, CLOCK: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Of the whole rows of all ranks, in their order."""
    total = own
    status = tl.full([], 2, tl.int32)
    polls = tl.full([], 0, tl.int32)
    began = now(polls, CLOCK)
    while status == STALE:
        total = tl.zeros(own.shape, tl.float32)
        stale = tl.zeros(own.shape, tl.int1)
        for other in tl.static_range(RANKS):
            if other == RANK:
                total += own
            else:
                at = words_ptr + other * 2 * ROWS * WIDTH + place + column
                word = tl.load(at, mask=inside, other=0, volatile=True)
                stale = stale | (inside & is_stale(word, tag, SHORT))
                total += unpack(word, SHORT)
        polls += 1
        status = status_of(stale, polls, began, lost_ptr, CLOCK, LIMIT)
    if status > STALE:
        tl.store(lost_ptr, 1)
    return total


@triton.jit
def _send_pieces(
    words, targets_ptr, place, column, inside, PIECE: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr
):
    """Each to the rank that adds it up."""
    for step in tl.static_range(1, RANKS + 1):
        other = (RANK + step) % RANKS
        base = tl.multiple_of(tl.load(targets_ptr + other).to(tl.pointer_type(words.dtype)), 16)
        of_other = inside & (column >= other * PIECE) & (column < (other + 1) * PIECE)
        tl.store(base + place + RANK * PIECE + column - other * PIECE, words, mask=of_other)


@triton.jit
def _add_pieces(
    tag, place, targets_ptr, words_ptr, lost_ptr, ROWS: tl.constexpr, WIDTH: tl.constexpr, PIECE: tl.constexpr,
    BLOCK: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, SHORT: tl.constexpr, CLOCK: tl.constexpr,
    LIMIT: tl.constexpr,
):  # fmt: skip
    """Those of this rank, and send their sum to all. BLOCK: at least PIECE."""
    part = tl.arange(0, BLOCK)
    inside = (part < PIECE)[None, :]
    at = words_ptr + place + (tl.arange(0, RANKS) * PIECE)[:, None] + part[None, :]
    status = tl.full([], 2, tl.int32)
    polls = tl.full([], 0, tl.int32)
    began = now(polls, CLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    while status == STALE:
        word = tl.load(at, mask=inside, other=0, volatile=True)
        total = tl.sum(unpack(word, SHORT), 0)
        polls += 1
        status = status_of(inside & is_stale(word, tag, SHORT), polls, began, lost_ptr, CLOCK, LIMIT)
    if status > STALE:
        tl.store(lost_ptr, 1)
    if SHORT:
        total = total.to(tl.bfloat16).to(tl.float32)
    words = pack(total, tag, SHORT)
    for step in tl.static_range(1, RANKS + 1):
        base = tl.load(targets_ptr + (RANK + step) % RANKS).to(tl.pointer_type(words.dtype))
        base = tl.multiple_of(base, 16) + 2 * ROWS * WIDTH + place + RANK * PIECE
        tl.store(base + part, words, mask=part < PIECE)


@triton.jit
def sum_over_ranks(
    own, row, column, inside, targets_ptr, words_ptr, counters_ptr, lost_ptr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    PIECE_BLOCK: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, SENDS: tl.constexpr, ADDS: tl.constexpr,
    TAKES: tl.constexpr, CLOCK: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """The sum, float32, of the float32 rows `own` of all ranks, each rounded to what is exchanged.

    row: of the inbox, which is WIDTH wide. PIECE_BLOCK: 0 in one step, else a rank's part of the program's columns.
    """
    SHORT: tl.constexpr = words_ptr.dtype.element_ty == tl.int32
    tag = tl.load(counters_ptr + row) + 1
    place = ((tag & 1).to(tl.int64) * ROWS + row) * WIDTH
    if SHORT:
        own = own.to(tl.bfloat16).to(tl.float32)
    total = own
    if PIECE_BLOCK > 0:
        PIECE: tl.constexpr = WIDTH // RANKS
        if SENDS:
            _send_pieces(pack(own, tag, SHORT), targets_ptr, place, column, inside, PIECE, RANK, RANKS)
        if ADDS:
            _add_pieces(
                tag, place, targets_ptr, words_ptr, lost_ptr, ROWS, WIDTH, PIECE, PIECE_BLOCK, RANK, RANKS, SHORT,
                CLOCK, LIMIT,
            )  # fmt: skip
        if TAKES:
            status = tl.full([], 2, tl.int32)
            polls = tl.full([], 0, tl.int32)
            began = now(polls, CLOCK)
            while status == STALE:
                word = tl.load(words_ptr + 2 * ROWS * WIDTH + place + column, mask=inside, other=0, volatile=True)
                total = unpack(word, SHORT)
                polls += 1
                status = status_of(inside & is_stale(word, tag, SHORT), polls, began, lost_ptr, CLOCK, LIMIT)
            if status > STALE:
                tl.store(lost_ptr, 1)
    else:
        if SENDS:
            send(pack(own, tag, SHORT), targets_ptr, place, column, inside, RANK, RANKS)
        if TAKES:
            total = _sum_in_one_step(
                own, tag, place, column, inside, words_ptr, lost_ptr, ROWS, WIDTH, RANK, RANKS, SHORT, CLOCK, LIMIT
            )
    if TAKES:
        tl.store(counters_ptr + row, tag)
    return total
