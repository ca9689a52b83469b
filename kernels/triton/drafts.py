"""What becomes of a step's drafts, and the next ones, on the GPU: models.drafts says what is accepted and proposed.

    accepted = leading j with draft[j] == drawn[j];  the row has drawn drawn[0 .. accepted]
    text[slot] = ... past answers | prediction | known tokens ...      these begin at `begin`
    drafts     = what follows the longest match of the text's end in it

drawn[0] is drawn behind the row's own token, drawn[j] behind its draft number j; draft_inputs says where they are. A
program compares a part of a text, and the last of a row to end writes its drafts; no result depends on which it is.
Bytes: the text once, and up to LONGEST_MATCH times where a token equals the last one.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from baton.kernels.triton.draft_inputs import (
    ANSWERS,
    COLUMNS,
    CURSOR,
    HISTORY,
    LAST,
    LENGTH,
    MISSED,
    NUM_ANSWERS,
    NUM_DRAFTS,
    NUM_PREDICTED,
    PREDICTION,
    SEARCHES,
    SOURCE,
    Places,
)
from baton.kernels.triton.launch import cdiv, next_power_of_2, require
from baton.kernels.triton.sampling_rows import COLUMNS as SAMPLING_COLUMNS
from baton.kernels.triton.sampling_rows import MAX_BAD_WORD_TOKENS, NUM_BAD_WORDS, PENALISED, SlotTables

COMPARED = 1024  # places of a program

# Columns of a result, int32; the drawn tokens follow.
NUM_DRAWN, NUM_VERIFIED, WAS_FROM, NUM_NEXT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
FIRST_PLACE = tl.constexpr(4)  # where in the step the row's first draft is
IDS = tl.constexpr(5)


@dataclass(frozen=True, slots=True)
class SlotDrafts:
    """What is kept of each slot, int32."""

    state: torch.Tensor  # [slots, COLUMNS], see draft_inputs
    drafts: torch.Tensor  # [slots, most drafts]
    text: torch.Tensor  # [slots, room]
    best: torch.Tensor  # [slots, 2]: the best match of a step, and parts of the text that were compared; left zero
    begin: int
    """Place of the first known token in a text; past answers and a prediction end there."""

    @classmethod
    def make(cls, num_slots: int, most_drafts: int, most_before: int, most_known: int, device: str) -> SlotDrafts:
        def zeros(width: int) -> torch.Tensor:
            return torch.zeros(num_slots, width, dtype=torch.int32, device=device)

        text = zeros(most_before + most_known)
        return cls(zeros(COLUMNS.value), zeros(most_drafts), text, zeros(2), most_before)


@triton.jit
def _accept_kernel(
    slot_ptr, taken_ptr, first_ptr, drawn_ptr, state_ptr, draft_ptr, text_ptr, result_ptr, table_ptr, count_ptr,
    recent_ptr, begin, text_stride, vocab_size, COUNTS: tl.constexpr, MAX_BAD_WORD_TOKENS: tl.constexpr,
    DRAFTS: tl.constexpr, DRAFTS_PADDED: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, IDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    taken = tl.load(taken_ptr + row)
    result = result_ptr + row * WIDTH
    tl.store(result + NUM_DRAWN, 0)
    tl.store(result + NUM_VERIFIED, 0)
    tl.store(result + NUM_NEXT, 0)
    if taken < 0:
        return
    slot = tl.load(slot_ptr + row)
    state = state_ptr + slot * COLUMNS
    length = tl.load(state + LENGTH)
    number = tl.arange(0, DRAFTS_PADDED)
    first = tl.load(first_ptr + row)
    place = tl.where(number == 0, row, first + number - 1)
    drawn = tl.load(drawn_ptr + place, mask=number <= taken, other=-1)
    draft = tl.load(draft_ptr + slot * DRAFTS + number, mask=number < taken, other=-2)
    accepted = tl.min(tl.where(draft == drawn, DRAFTS_PADDED, number), 0)
    kept = number <= accepted
    text = text_ptr + slot.to(tl.int64) * text_stride + begin + length
    tl.store(text + number, drawn, mask=kept)
    tl.store(result + IDS + number, drawn, mask=kept)
    tl.store(state + LENGTH, length + accepted + 1)
    tl.store(state + LAST, tl.sum(tl.where(number == accepted, drawn, 0), 0))
    tl.store(result + NUM_DRAWN, accepted + 1)
    tl.store(result + NUM_VERIFIED, taken)
    tl.store(result + WAS_FROM, tl.load(state + SOURCE))
    tl.store(result + FIRST_PLACE, first)
    cursor, missed = tl.load(state + CURSOR), tl.load(state + MISSED)
    misses = (taken > 0) & (accepted == 0)
    if COUNTS:
        rules = table_ptr + slot * SAMPLING_COLUMNS
        if tl.load(rules + PENALISED) != 0:
            tl.atomic_add(count_ptr + slot.to(tl.int64) * vocab_size + drawn, 1, mask=kept, sem="relaxed")
        if tl.load(rules + NUM_BAD_WORDS) != 0:
            turn = (length + number) % MAX_BAD_WORD_TOKENS
            tl.store(recent_ptr + slot * MAX_BAD_WORD_TOKENS + turn, drawn, mask=kept)
    lost = (cursor == 0) | (misses & (missed != 0))
    tl.store(state + CURSOR, tl.where(lost, 0, cursor + accepted + 1))
    tl.store(state + MISSED, tl.where(taken > 0, misses.to(tl.int32), missed))


@triton.jit
def _propose_kernel(
    slot_ptr, taken_ptr, state_ptr, draft_ptr, text_ptr, best_ptr, result_ptr, begin, text_stride, searched,
    DRAFTS: tl.constexpr, DRAFTS_PADDED: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    COMPARED: tl.constexpr, LONGEST: tl.constexpr, LEAST: tl.constexpr, FOLLOWED: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0), tl.program_id(1)
    if tl.load(taken_ptr + row) < 0:
        return
    slot = tl.load(slot_ptr + row)
    state = state_ptr + slot * COLUMNS
    searches = tl.load(state + SEARCHES)
    length = tl.load(state + LENGTH)
    num_predicted = tl.load(state + NUM_PREDICTED)
    num_before = num_predicted + tl.load(state + NUM_ANSWERS)
    oldest = begin + tl.maximum(length - searched, 0)
    end = begin + length
    total = tl.where(searches != 0, num_before + end - oldest, 0)
    num_parts = tl.maximum(tl.cdiv(total, COMPARED), 1)
    if part >= num_parts:
        return
    text = text_ptr + slot.to(tl.int64) * text_stride
    lowest = begin - num_before
    number = part * COMPARED + tl.arange(0, COMPARED)
    place = tl.where(number < num_before, lowest, oldest - num_before) + number  # whose token may come next
    going = (number > 0) & (number < total)
    last = tl.load(text + tl.maximum(end - 1, 0))
    going = going & (tl.load(text + place - 1, mask=going, other=-1) == last)
    best = 0
    if tl.max(going.to(tl.int32), 0) > 0:
        compared = tl.minimum(length, LONGEST)
        matched = going.to(tl.int32)
        for back in tl.static_range(2, LONGEST + 1):
            token = tl.load(text + tl.maximum(end - back, 0))
            before = tl.load(text + place - back, mask=(number < total) & (place - back >= lowest), other=-1)
            going = going & (back <= compared) & (place - back >= lowest) & (before == token)
            matched += going.to(tl.int32)
        rank = tl.where(place >= begin, 1, tl.where(place >= begin - num_predicted, 2, 0))
        key = (matched << 26) + (rank << 24) + place
        best = tl.max(tl.where(matched > 0, key, 0), 0)
    if num_parts > 1:
        tl.atomic_max(best_ptr + slot * 2, best)
        if tl.atomic_add(best_ptr + slot * 2 + 1, 1, sem="acq_rel") < num_parts - 1:
            return
        best = tl.atomic_xchg(best_ptr + slot * 2, 0)
        tl.store(best_ptr + slot * 2 + 1, 0)
    matched = best >> 26
    rank = (best >> 24) & 3
    place = best & ((1 << 24) - 1)
    source = tl.where(rank == 1, HISTORY, tl.where(rank == 2, PREDICTION, ANSWERS))
    cursor, followed = tl.load(state + CURSOR), tl.load(state + SOURCE)
    follows = (cursor > 0) & (cursor < tl.where(followed == HISTORY, end, begin)) & (matched < FOLLOWED)
    count = tl.where(matched >= LEAST, tl.minimum(2 * (matched - 1), DRAFTS), 0)
    source = tl.where(follows, followed, source)
    place = tl.where(follows, cursor, place)
    count = tl.where(follows, DRAFTS, count)
    count = tl.where(searches != 0, count, 0)
    period = tl.maximum(tl.where(source == HISTORY, end, begin) - place, 1)
    count = tl.where(source == HISTORY, count, tl.minimum(count, period))
    each = tl.arange(0, DRAFTS_PADDED)
    tokens = tl.load(text + place + each % period, mask=each < count, other=0)
    tl.store(draft_ptr + slot * DRAFTS + each, tokens, mask=each < count)
    tl.store(state + SOURCE, source)
    tl.store(state + CURSOR, tl.where(count > 0, place, 0))
    tl.store(state + NUM_DRAFTS, count)
    tl.store(result_ptr + row * WIDTH + NUM_NEXT, count)


def accept(
    drawn: torch.Tensor,
    slots: torch.Tensor,
    places: Places,
    kept: SlotDrafts,
    results: torch.Tensor,
    tables: SlotTables | None = None,
) -> None:
    """drawn int32 [tokens]; slots int32 [rows] of those that drew, each once but for padding; results int32
    [rows, IDS + most drafts + 1]: what each row has drawn. Slots know it then as their last tokens, and if `tables` are
    given it counts for penalties and bad words there."""
    num_rows, most = slots.shape[0], kept.drafts.shape[1]
    require(results.shape == (num_rows, IDS.value + most + 1) and results.is_contiguous(), "results need one a row")
    require(drawn.shape[0] >= num_rows and drawn.dtype == slots.dtype == torch.int32, "drawn and slots do not fit")
    counted = (None, None, None) if tables is None else (tables.table, tables.counts, tables.recent)
    _accept_kernel[(num_rows,)](
        slots, places.taken, places.first, drawn, kept.state, kept.drafts, kept.text, results, *counted, kept.begin,
        kept.text.stride(0), 0 if tables is None else tables.counts.stride(0), COUNTS=tables is not None,
        MAX_BAD_WORD_TOKENS=MAX_BAD_WORD_TOKENS, DRAFTS=most, DRAFTS_PADDED=next_power_of_2(most + 1),
        COLUMNS=COLUMNS.value, WIDTH=results.shape[1], IDS=IDS.value, num_warps=1,
    )  # fmt: skip


def propose(
    slots: torch.Tensor,
    places: Places,
    kept: SlotDrafts,
    results: torch.Tensor,
    *,
    searched: int,
    longest: int,
    least: int,
    followed: int,
) -> None:
    """The next drafts of rows that `accept` took in. searched: newest tokens that are compared; longest, least: tokens
    of a match; followed: tokens of one that is better than to go on where the last drafts came from. Texts are shorter
    than 2**24."""
    num_rows, most = slots.shape[0], kept.drafts.shape[1]
    require(results.shape == (num_rows, IDS.value + most + 1) and results.is_contiguous(), "results need one a row")
    require(kept.text.shape[1] < 1 << 24 and longest < 32, "the text is too long")
    parts = cdiv(min(kept.text.shape[1], kept.begin + searched), COMPARED)
    _propose_kernel[(num_rows, parts)](
        slots, places.taken, kept.state, kept.drafts, kept.text, kept.best, results, kept.begin, kept.text.stride(0),
        searched, DRAFTS=most, DRAFTS_PADDED=next_power_of_2(most + 1), COLUMNS=COLUMNS.value,
        WIDTH=results.shape[1], COMPARED=COMPARED, LONGEST=longest, LEAST=least, FOLLOWED=followed, num_warps=4,
    )  # fmt: skip
