"""The inputs of a decode step whose rows may have drafts behind their token, from what the GPU keeps for each slot.

A step has R rows and `tokens` places for tokens. Row r's own token is at place r; what is left is shared out evenly:

    wanted[r] = min(NUM_DRAFTS[slot[r]], most[r], LIMIT - LENGTH - 1)
    taken[r]  = min(wanted[r], level),  level the largest with sum(taken) <= tokens - R;  one more for the first rows
    first[r]  = R + sum(taken[:r])                 place of its first draft

Token j of a row (0: its own) is at position LENGTH - 1 + j, sees that many tokens and itself, and writes its key there.
The rest is as in step_inputs. A row whose sequence has reached its limit, and one of padding (most < 0), computes
nothing: taken is -1. Bytes: the tables in use, twice, once a token.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from baton.kernels.triton.launch import next_power_of_2, require
from baton.kernels.triton.step_inputs import COPIED, StepInputs

# Columns of what is kept of a slot, int32.
LENGTH = tl.constexpr(0)  # known tokens
LIMIT = tl.constexpr(1)  # there are never more
LAST = tl.constexpr(2)  # the last of them
NUM_DRAFTS = tl.constexpr(3)  # drafts behind it
SEARCHES = tl.constexpr(4)  # 1: drafts are looked for
NUM_PREDICTED = tl.constexpr(5)  # tokens of the client's prediction
SOURCE = tl.constexpr(6)  # where the drafts come from: HISTORY, PREDICTION, ANSWERS, EAGLE or GRAMMAR
CURSOR = tl.constexpr(7)  # place in the text of the first draft; behind the tokens accepted since; 0: none
MISSED = tl.constexpr(8)  # 1: the last drafts that were verified were not accepted
NUM_ANSWERS = tl.constexpr(9)  # tokens of past answers, in front of the prediction
COLUMNS = tl.constexpr(16)
HISTORY, PREDICTION, ANSWERS, EAGLE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
GRAMMAR = tl.constexpr(4)


@dataclass(frozen=True, slots=True)
class Places:
    """Where the tokens of a step's rows are, int32."""

    slots: torch.Tensor  # [tokens]: whose token is at a place
    taken: torch.Tensor  # [tokens]: of each row, how many drafts it has; -1: it computes nothing
    first: torch.Tensor  # [tokens]: of each row, the place of its first draft; of each draft, the next place
    queries: (
        torch.Tensor
    )  # [tokens]: so many of its sequence's tokens from a place's on read together; 0: see one before

    @classmethod
    def make(cls, num_tokens: int, device: str) -> Places:
        return cls(*(torch.zeros(num_tokens, dtype=torch.int32, device=device) for _ in range(4)))


@triton.jit
def _gather_drafts_kernel(
    slot_ptr,
    most_ptr,
    state_ptr,
    draft_ptr,
    tables_ptr,
    token_out_ptr,
    position_out_ptr,
    length_out_ptr,
    kv_slot_out_ptr,
    table_out_ptr,
    slot_out_ptr,
    taken_out_ptr,
    first_out_ptr,
    queries_out_ptr,
    num_rows,
    padding,
    tables_stride,
    table_out_stride,
    ROWS: tl.constexpr,
    DRAFTS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    COPIED: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr,
):
    place, num_places = tl.program_id(0), tl.num_programs(0)
    each = tl.arange(0, ROWS)
    most = tl.load(most_ptr + each, mask=each < num_rows, other=-1)
    there = most >= 0
    slots = tl.load(slot_ptr + each, mask=there, other=0)
    state = state_ptr + slots * COLUMNS
    known = tl.load(state + LENGTH, mask=there, other=0)
    left = tl.load(state + LIMIT, mask=there, other=0) - known
    alive = there & (left > 0)
    wanted = tl.minimum(tl.load(state + NUM_DRAFTS, mask=alive, other=0), tl.minimum(most, left - 1))
    wanted = tl.where(alive, tl.maximum(wanted, 0), 0)
    count = tl.sum(there.to(tl.int32), 0)
    room = num_places - count
    level = 0
    for tried in range(1, DRAFTS + 1):
        level += (tl.sum(tl.minimum(wanted, tried), 0) <= room).to(tl.int32)
    more = (wanted > level).to(tl.int32)
    room -= tl.sum(tl.minimum(wanted, level), 0)
    taken = tl.minimum(wanted, level) + tl.where(tl.cumsum(more, 0) <= room, more, 0)
    ends = count + tl.cumsum(taken, 0)

    own = place < count
    behind = tl.sum((there & (ends <= place)).to(tl.int32), 0)  # rows whose drafts end before this place
    row = tl.where(own, place, behind)
    mine = each == row
    first = tl.sum(tl.where(mine, ends - taken, 0), 0)
    tl.store(taken_out_ptr + place, tl.sum(tl.where((each == place) & alive, taken + 1, 0), 0) - 1)
    tl.store(first_out_ptr + place, tl.where(own, first, place + 1))
    number = tl.where(own, 0, place - first + 1)
    computes = tl.sum((mine & alive).to(tl.int32), 0) > 0
    rest = tl.sum(tl.where(mine, taken, 0), 0) + 1 - number
    leads = computes & (number % QUERIES == 0)
    queries = tl.where(leads, tl.minimum(rest, QUERIES), 0)
    tl.store(queries_out_ptr + place, queries)
    slot = tl.where(computes, tl.sum(tl.where(mine, slots, 0), 0), padding)
    length = tl.where(computes, tl.sum(tl.where(mine, known, 0), 0) + number, 0)
    drafted = tl.load(draft_ptr + slot * DRAFTS + tl.maximum(number - 1, 0))
    token = tl.where(number == 0, tl.load(state_ptr + slot * COLUMNS + LAST), drafted)
    at = tl.maximum(length - 1, 0)
    tl.store(token_out_ptr + place, tl.where(computes, token, 0))
    tl.store(position_out_ptr + place, at)
    tl.store(length_out_ptr + place, length)
    tl.store(slot_out_ptr + place, slot)
    table = tables_ptr + slot.to(tl.int64) * tables_stride
    block = tl.load(table + at // BLOCK_TOKENS)
    tl.store(kv_slot_out_ptr + place, tl.where(computes, block * BLOCK_TOKENS + at % BLOCK_TOKENS, -1))
    used = tl.where(leads, tl.cdiv(length + queries - 1, BLOCK_TOKENS), 0)
    for start in tl.range(0, used, COPIED):
        column = start + tl.arange(0, COPIED)
        blocks = tl.load(table + column, mask=column < used, other=0)
        tl.store(table_out_ptr + place.to(tl.int64) * table_out_stride + column, blocks, mask=column < used)


def gather_drafts(
    slots: torch.Tensor,
    most: torch.Tensor,
    state: torch.Tensor,
    drafts: torch.Tensor,
    tables: torch.Tensor,
    block_tokens: int,
    out: StepInputs,
    places: Places,
    queries: int = 1,
) -> None:
    """slots and most int32 [rows], rows of padding last; state int32 [slots, COLUMNS], the last slot that of padding;
    drafts int32 [slots, most drafts]; tables int32 [slots, blocks of the longest]. `out` has as many places as the step
    has tokens, `places` at least as many. queries: tokens of a sequence that read its keys and values together at most;
    only the first of them gets the sequence's table."""
    num_tokens, num_slots = out.tokens.shape[0], state.shape[0]
    require(slots.shape == most.shape, "slots and most need one a row")
    require(state.shape == (num_slots, COLUMNS.value) and drafts.shape[0] == num_slots, "state and drafts do not fit")
    require(tables.shape[0] == num_slots and tables.shape[1] <= out.tables.shape[1], "tables do not fit")
    for tensor in (slots, most, state, drafts, tables):
        require(tensor.dtype == torch.int32 and tensor.stride(-1) == 1, "inputs must be int32 and contiguous")
    _gather_drafts_kernel[(num_tokens,)](
        slots,
        most,
        state,
        drafts,
        tables,
        out.tokens,
        out.positions,
        out.lengths,
        out.kv_slots,
        out.tables,
        places.slots,
        places.taken,
        places.first,
        places.queries,
        slots.shape[0],
        num_slots - 1,
        tables.stride(0),
        out.tables.stride(0),
        ROWS=next_power_of_2(slots.shape[0]),
        DRAFTS=drafts.shape[1],
        BLOCK_TOKENS=block_tokens,
        COPIED=COPIED,
        COLUMNS=COLUMNS.value,
        QUERIES=queries,
        num_warps=4,
    )
