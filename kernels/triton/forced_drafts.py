"""Forced tokens in front of drafts, on the GPU, and what is to be verified in the end, for a host that makes masks.

    drawn   = LENGTH - known                         tokens that were drawn since the host looked
    forced' = forced[row, drawn:]                    if text[slot] says that forced[row, :drawn] were drawn
    drafts[slot] = forced'                           unless they begin with all of it
    offered[row] = number of drafts | drafts

models.drafts.led_by says the same. Bytes: the forced tokens of a row twice.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl

from baton.kernels.triton.draft_inputs import COLUMNS, CURSOR, GRAMMAR, LENGTH, NUM_DRAFTS, SOURCE
from baton.kernels.triton.drafts import SlotDrafts
from baton.kernels.triton.launch import next_power_of_2, require


@triton.jit
def _offer_kernel(
    slot_ptr, known_ptr, count_ptr, forced_ptr, state_ptr, draft_ptr, text_ptr, offered_ptr, begin, text_stride,
    FORCED: tl.constexpr, FORCED_PADDED: tl.constexpr, DRAFTS: tl.constexpr, DRAFTS_PADDED: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    slot = tl.load(slot_ptr + row)
    state = state_ptr + slot * COLUMNS
    known, count = tl.load(known_ptr + row), tl.load(count_ptr + row)
    drawn = tl.load(state + LENGTH) - known
    number = tl.arange(0, FORCED_PADDED)
    inside = number < tl.minimum(drawn, count)
    text = text_ptr + slot.to(tl.int64) * text_stride + begin + known
    was_forced = tl.load(forced_ptr + row * FORCED + number, mask=inside, other=0)
    was_drawn = tl.load(text + number, mask=inside, other=0)
    fits = (drawn >= 0) & (tl.min((was_forced == was_drawn).to(tl.int32), 0) != 0)
    left = tl.where(fits, tl.minimum(tl.maximum(count - drawn, 0), DRAFTS), 0)

    each = tl.arange(0, DRAFTS_PADDED)
    forced = tl.load(forced_ptr + row * FORCED + drawn + each, mask=each < left, other=0)
    own_count = tl.load(state + NUM_DRAFTS)
    own = tl.load(draft_ptr + slot * DRAFTS + each, mask=each < own_count, other=-1)
    begins = (own_count >= left) & (tl.min(((own == forced) | (each >= left)).to(tl.int32), 0) != 0)
    if not begins:
        tl.store(draft_ptr + slot * DRAFTS + each, forced, mask=each < left)
        tl.store(state + NUM_DRAFTS, left)
        tl.store(state + SOURCE, GRAMMAR)
        tl.store(state + CURSOR, 0)
    offered = offered_ptr + row * (1 + DRAFTS)
    tl.store(offered, tl.where(begins, own_count, left))
    tl.store(offered + 1 + each, tl.where(begins, own, forced), mask=each < DRAFTS)


def offer_drafts(
    slots: torch.Tensor,
    known: torch.Tensor,
    counts: torch.Tensor,
    forced: torch.Tensor,
    kept: SlotDrafts,
    offered: torch.Tensor,
) -> None:
    """slots, known and counts int32 [rows]: whose forced tokens, behind how many known ones, and how many; forced int32
    [rows, most]; offered int32 [rows, 1 + most drafts]. A slot is there once."""
    num_rows, most = forced.shape
    drafts = kept.drafts.shape[1]
    require(slots.shape == known.shape == counts.shape == (num_rows,), "one of each a row")
    require(offered.shape[0] >= num_rows and offered.shape[1] == 1 + drafts, "offered has no room")
    for tensor in (slots, known, counts, forced, offered):
        require(tensor.dtype == torch.int32 and tensor.is_contiguous(), "tensors must be int32 and contiguous")
    if num_rows:
        _offer_kernel[(num_rows,)](
            slots, known, counts, forced, kept.state, kept.drafts, kept.text, offered, kept.begin, kept.text.stride(0),
            FORCED=most, FORCED_PADDED=next_power_of_2(most), DRAFTS=drafts,
            DRAFTS_PADDED=next_power_of_2(drafts), COLUMNS=COLUMNS.value, num_warps=1,
        )  # fmt: skip
