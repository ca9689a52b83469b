"""What an EAGLE-3 draft computes beside products and attention, on the GPU: models.cpu.eagle says what its entries are.

    x[r] = norm(embedding[token[r]]) | norm(hidden[r]);  residual[r] = hidden[r], or its norm

The known tokens of a row are n, the last of them just drawn. Entry number j of a step is at place n - 2 + j, made of
token n - 1 + j, and proposes token n + j:

    token[r]    = drafts[slot, j - 1]                    (j = 0: it is computed already, with all tokens of the step)
    going       = the row computes, may have drafts, and place < covered[r], limit
    length[r]   = place + 1, or 0;   kv_slot[r] as in step_inputs, or -1

Bytes: 5 * hidden size a row; the rest is small.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from baton.kernels.triton.draft_inputs import COLUMNS, EAGLE, LENGTH, LIMIT, NUM_DRAFTS, SEARCHES, SOURCE, Places
from baton.kernels.triton.drafts import NUM_DRAWN, NUM_NEXT, SlotDrafts
from baton.kernels.triton.launch import next_power_of_2, require
from baton.kernels.triton.step_inputs import StepInputs


@dataclass(frozen=True, slots=True)
class EntryPlaces:
    """Of the entries of a step's rows, int32 [rows] each."""

    computed: torch.Tensor  # where in the step entry 0 is
    positions: torch.Tensor  # of the tokens that are proposed
    drafts: torch.Tensor  # where these go, in the slots' drafts

    @classmethod
    def make(cls, num_rows: int, device: str) -> EntryPlaces:
        return cls(*(torch.zeros(num_rows, dtype=torch.int32, device=device) for _ in range(3)))


@triton.jit(do_not_specialize=["eps"])
def _inputs_kernel(
    token_ptr, embedding_ptr, hidden_ptr, input_norm_ptr, hidden_norm_ptr, x_ptr, residual_ptr, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    token = tl.load(token_ptr + row).to(tl.int64)
    embedded = tl.load(embedding_ptr + token * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(embedded * embedded, 0) / WIDTH + eps)
    weight = tl.load(input_norm_ptr + column, mask=inside, other=0.0).to(tl.float32)
    x = x_ptr + row * 2 * WIDTH + column
    tl.store(x, (embedded * scale * weight).to(x_ptr.dtype.element_ty), mask=inside)
    hidden = tl.load(hidden_ptr + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(hidden * hidden, 0) / WIDTH + eps)
    weight = tl.load(hidden_norm_ptr + column, mask=inside, other=0.0).to(tl.float32)
    normed = (hidden * scale * weight).to(x_ptr.dtype.element_ty)
    tl.store(x + WIDTH, normed, mask=inside)
    if NORMED:
        tl.store(residual_ptr + row * WIDTH + column, normed, mask=inside)
    else:
        tl.store(residual_ptr + row * WIDTH + column, hidden.to(residual_ptr.dtype.element_ty), mask=inside)


def eagle_inputs(
    tokens: torch.Tensor,
    embedding: torch.Tensor,
    hidden: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor],
    eps: float,
    x: torch.Tensor,
    residual: torch.Tensor,
    *,
    normed_residual: bool,
) -> None:
    """tokens int32 [N]; embedding [V, H]; hidden and residual [N, H], which may be one; norms [H], of the embedding and
    of hidden; x [N, 2 H]."""
    num_rows, width = hidden.shape
    require(tokens.shape == (num_rows,) and embedding.shape[1] == width, "tokens and embedding do not fit")
    require(x.shape == (num_rows, 2 * width) and residual.shape == hidden.shape, "x and residual do not fit")
    for tensor in (tokens, embedding, hidden, *norms, x, residual):
        require(tensor.is_contiguous(), "tensors must be contiguous")
    if num_rows:
        _inputs_kernel[(num_rows,)](
            tokens, embedding, hidden, *norms, x, residual, eps,
            WIDTH=width, BLOCK=next_power_of_2(width), NORMED=normed_residual, num_warps=8,
        )  # fmt: skip


@triton.jit(do_not_specialize=["padding"])
def _entries_kernel(
    slot_ptr, taken_ptr, first_ptr, covered_ptr, state_ptr, draft_ptr, result_ptr, tables_ptr,
    token_ptr, position_ptr, length_ptr, kv_slot_ptr, computed_ptr, proposed_ptr, place_ptr, padding, tables_stride,
    NUMBER: tl.constexpr, MOST: tl.constexpr, DRAFTS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    taken = tl.load(taken_ptr + row)
    alive = taken >= 0
    slot = tl.where(alive, tl.load(slot_ptr + row), padding)
    state = state_ptr + slot * COLUMNS
    known = tl.load(state + LENGTH)
    most_places = tl.minimum(tl.load(state + LIMIT), tl.load(covered_ptr + row))
    count = tl.minimum(most_places - (known - 2), MOST)
    count = tl.where(alive & (tl.load(state + SEARCHES) != 0), tl.maximum(count, 0), 0)
    going = count > NUMBER
    if NUMBER == 0:
        accepted = tl.load(result_ptr + row * WIDTH + NUM_DRAWN) - 1
        tl.store(computed_ptr + row, tl.where(accepted > 0, tl.load(first_ptr + row) + accepted - 1, row))
        if alive:
            tl.store(state + NUM_DRAFTS, count)
            tl.store(state + SOURCE, EAGLE)
            tl.store(result_ptr + row * WIDTH + NUM_NEXT, count)
    else:
        tl.store(token_ptr + row, tl.load(draft_ptr + slot * DRAFTS + NUMBER - 1, mask=going, other=0))
    at = tl.where(going, known - 2 + NUMBER, 0)
    tl.store(position_ptr + row, at)
    tl.store(length_ptr + row, tl.where(going, at + 1, 0))
    block = tl.load(tables_ptr + slot.to(tl.int64) * tables_stride + at // BLOCK_TOKENS, mask=going, other=0)
    tl.store(kv_slot_ptr + row, tl.where(going, block * BLOCK_TOKENS + at % BLOCK_TOKENS, -1))
    tl.store(proposed_ptr + row, tl.where(going, known + NUMBER, 1))
    tl.store(place_ptr + row, tl.where(going, slot, padding) * DRAFTS + tl.minimum(NUMBER, DRAFTS - 1))


def entry_inputs(
    slots: torch.Tensor,
    places: Places,
    covered: torch.Tensor,
    kept: SlotDrafts,
    results: torch.Tensor,
    tables: torch.Tensor,
    block_tokens: int,
    number: int,
    most: int,
    out: StepInputs,
    entries: EntryPlaces,
) -> None:
    """Entry `number` of rows that `accept` took in, of up to `most`; number 0 also sets how many drafts each has.

    slots and covered int32 [rows]: of each row, how many tokens its blocks have room for; results as of `accept`;
    tables int32 [slots, blocks of the longest]. Of `out` all but the tables is filled."""
    num_rows = out.tokens.shape[0]
    require(slots.shape[0] >= num_rows and covered.shape[0] >= num_rows, "slots and covered need one a row")
    require(results.shape[0] >= num_rows and results.is_contiguous(), "results need one a row")
    _entries_kernel[(num_rows,)](
        slots, places.taken, places.first, covered, kept.state, kept.drafts, results, tables,
        out.tokens, out.positions, out.lengths, out.kv_slots, entries.computed, entries.positions, entries.drafts,
        kept.state.shape[0] - 1, tables.stride(0),
        NUMBER=number, MOST=most, DRAFTS=kept.drafts.shape[1], BLOCK_TOKENS=block_tokens, COLUMNS=COLUMNS.value,
        WIDTH=results.shape[1], num_warps=1,
    )  # fmt: skip
