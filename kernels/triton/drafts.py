"""What becomes of a step's drafts, and the next ones, on the GPU: models.drafts says what is accepted and proposed.

    accepted = leading j with draft[j] == drawn[j];  the row has drawn drawn[0 .. accepted]
    text[slot] = ... prediction | known tokens ...      the prediction ends, and the known tokens begin, at `begin`
    drafts     = what follows the longest match of the text's end in it

drawn[0] is drawn behind the row's own token, drawn[j] behind its draft number j; draft_inputs says where they are.
Bytes: the text once, and LONGEST_MATCH times where a token equals the last one.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from baton.kernels.triton.draft_inputs import (
    COLUMNS,
    LAST,
    LENGTH,
    NUM_DRAFTS,
    NUM_PREDICTED,
    PREDICTED,
    SEARCHES,
    Places,
)
from baton.kernels.triton.launch import require

COMPARED = 2048  # places at a time

# Columns of a result, int32; the drawn tokens follow.
NUM_DRAWN, NUM_VERIFIED, WAS_PREDICTED, NUM_NEXT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
IDS = tl.constexpr(4)


@dataclass(frozen=True, slots=True)
class SlotDrafts:
    """What is kept of each slot, int32."""

    state: torch.Tensor  # [slots, COLUMNS], see draft_inputs
    drafts: torch.Tensor  # [slots, most drafts]
    text: torch.Tensor  # [slots, room]
    begin: int
    """Place of the first known token in a text; a prediction ends there."""

    @classmethod
    def make(cls, num_slots: int, most_drafts: int, most_predicted: int, most_known: int, device: str) -> SlotDrafts:
        def zeros(width: int) -> torch.Tensor:
            return torch.zeros(num_slots, width, dtype=torch.int32, device=device)

        return cls(zeros(COLUMNS.value), zeros(most_drafts), zeros(most_predicted + most_known), most_predicted)


@triton.jit
def _accept_kernel(
    slot_ptr, taken_ptr, first_ptr, drawn_ptr, state_ptr, draft_ptr, text_ptr, result_ptr, begin, text_stride,
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
    place = tl.where(number == 0, row, tl.load(first_ptr + row) + number - 1)
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
    tl.store(result + WAS_PREDICTED, tl.load(state + PREDICTED))


@triton.jit
def _propose_kernel(
    slot_ptr, taken_ptr, state_ptr, draft_ptr, text_ptr, result_ptr, begin, text_stride, searched,
    DRAFTS: tl.constexpr, DRAFTS_PADDED: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    COMPARED: tl.constexpr, LONGEST: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    if tl.load(taken_ptr + row) < 0:
        return
    slot = tl.load(slot_ptr + row)
    state = state_ptr + slot * COLUMNS
    count = 0
    if tl.load(state + SEARCHES) != 0:
        length = tl.load(state + LENGTH)
        num_predicted = tl.load(state + NUM_PREDICTED)
        text = text_ptr + slot.to(tl.int64) * text_stride
        end = begin + length
        oldest = begin + tl.maximum(length - searched, 0)
        lowest = begin - num_predicted
        last = tl.load(text + end - 1)
        compared = tl.minimum(length, LONGEST)
        best = 0
        total = num_predicted + end - oldest
        for start in tl.range(0, total, COMPARED):
            number = start + tl.arange(0, COMPARED)
            inside = number < num_predicted
            place = tl.where(inside, lowest, oldest - num_predicted) + number  # whose token may come next
            going = (number > 0) & (number < total)
            going = going & (tl.load(text + place - 1, mask=going, other=-1) == last)
            if tl.max(going.to(tl.int32), 0) > 0:
                matched = going.to(tl.int32)
                for back in range(2, LONGEST + 1):
                    going = going & (back <= compared) & (place - back >= lowest)
                    token = tl.load(text + tl.maximum(end - back, 0))
                    going = going & (tl.load(text + place - back, mask=going, other=-1) == token)
                    matched += going.to(tl.int32)
                key = (matched << 26) + (inside.to(tl.int32) << 25) + place
                best = tl.maximum(best, tl.max(tl.where(matched > 0, key, 0), 0))
        matched = best >> 26
        if matched >= LEAST:
            predicted = (best >> 25) & 1
            place = best & ((1 << 25) - 1)
            count = tl.minimum(2 * (matched - 1), DRAFTS)
            period = tl.where(predicted != 0, begin - place, end - place)
            count = tl.where(predicted != 0, tl.minimum(count, period), count)
            number = tl.arange(0, DRAFTS_PADDED)
            tokens = tl.load(text + place + number % period, mask=number < count, other=0)
            tl.store(draft_ptr + slot * DRAFTS + number, tokens, mask=number < count)
            tl.store(state + PREDICTED, predicted)
    tl.store(state + NUM_DRAFTS, count)
    tl.store(result_ptr + row * WIDTH + NUM_NEXT, count)


def accept(drawn: torch.Tensor, slots: torch.Tensor, places: Places, kept: SlotDrafts, results: torch.Tensor) -> None:
    """drawn int32 [tokens]; slots int32 [rows] of those that drew, each once but for padding; results int32
    [rows, IDS + most drafts + 1]: what each row has drawn. Slots know it then as their last tokens."""
    num_rows, most = slots.shape[0], kept.drafts.shape[1]
    require(results.shape == (num_rows, IDS.value + most + 1) and results.is_contiguous(), "results need one a row")
    require(drawn.shape[0] >= num_rows and drawn.dtype == slots.dtype == torch.int32, "drawn and slots do not fit")
    _accept_kernel[(num_rows,)](
        slots, places.taken, places.first, drawn, kept.state, kept.drafts, kept.text, results, kept.begin,
        kept.text.stride(0), DRAFTS=most, DRAFTS_PADDED=triton.next_power_of_2(most + 1), COLUMNS=COLUMNS.value,
        WIDTH=results.shape[1], IDS=IDS.value, num_warps=1,
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
) -> None:
    """The next drafts of rows that `accept` took in. searched: newest tokens that are compared; longest, least: tokens
    of a match. Texts are shorter than 2**25."""
    num_rows, most = slots.shape[0], kept.drafts.shape[1]
    require(results.shape == (num_rows, IDS.value + most + 1) and results.is_contiguous(), "results need one a row")
    require(kept.text.shape[1] < 1 << 25 and longest < 32, "the text is too long")
    _propose_kernel[(num_rows,)](
        slots, places.taken, kept.state, kept.drafts, kept.text, results, kept.begin, kept.text.stride(0), searched,
        DRAFTS=most, DRAFTS_PADDED=triton.next_power_of_2(most + 1), COLUMNS=COLUMNS.value, WIDTH=results.shape[1],
        COMPARED=COMPARED, LONGEST=longest, LEAST=least, num_warps=8,
    )  # fmt: skip
