"""The kernels of an EAGLE-3 draft: what its layer reads, and where its entries are, against plain rules row by row."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.kernels.triton import draft_inputs as columns
from baton.kernels.triton.draft_inputs import Places
from baton.kernels.triton.drafts import IDS, NUM_DRAWN, NUM_NEXT, SlotDrafts
from baton.kernels.triton.eagle import EntryPlaces, eagle_inputs, entry_inputs
from baton.kernels.triton.step_inputs import StepInputs

ROWS, SLOTS, MOST, BLOCK, WIDTH = 6, 9, 4, 16, 5


@pytest.mark.parametrize("normed", [False, True])
def test_inputs_are_both_norms_side_by_side(device, normed):
    """Guards against the embedding of another token, halves that are exchanged, and a residual in place that is read
    after it was written."""
    torch.manual_seed(3)
    embedding, hidden = torch.randn(40, 48, device=device), torch.randn(ROWS, 48, device=device)
    norms = (torch.rand(48, device=device), torch.rand(48, device=device))
    tokens = torch.tensor([3, 0, 39, 3, 7, 11], dtype=torch.int32, device=device)
    expected = [F.rms_norm(embedding[tokens.long()], (48,), norms[0], 1e-5), F.rms_norm(hidden, (48,), norms[1], 1e-5)]
    x, residual = torch.zeros(ROWS, 96, device=device), hidden.clone()
    eagle_inputs(tokens, embedding, residual, norms, 1e-5, x, residual, normed_residual=normed)
    torch.testing.assert_close(x, torch.cat(expected, 1))
    torch.testing.assert_close(residual, expected[1] if normed else hidden)


@pytest.mark.parametrize("seed", range(4))
def test_entries_of_rows(device, seed):
    """Guards against an entry in a block that the row does not have or past its limit, one behind a draft that was not
    accepted, and drafts of rows that may have none."""
    chance = random.Random(seed)
    kept = SlotDrafts.make(SLOTS + 1, MOST, 8, 90, device)
    tables = torch.tensor([chance.sample(range(500), WIDTH) for _ in range(SLOTS + 1)], dtype=torch.int32)
    places = Places.make(ROWS + 20, device)
    slots = torch.tensor(chance.sample(range(SLOTS), ROWS), dtype=torch.int32)
    results = torch.zeros(ROWS, IDS.value + MOST + 1, dtype=torch.int32)
    known = [chance.randrange(2, 60) for _ in range(ROWS)]
    covered = torch.tensor([chance.choice([-(-n // BLOCK) * BLOCK, n, 80]) for n in known], dtype=torch.int32)
    limits = [n + chance.choice([0, 1, 2, 30]) for n in known]
    searches = [chance.randrange(4) > 0 for _ in range(ROWS)]
    alive = [chance.randrange(5) > 0 for _ in range(ROWS)]
    accepted = [chance.randrange(3) for _ in range(ROWS)]
    drafts = torch.randint(0, 99, kept.drafts.shape, dtype=torch.int32)
    kept.drafts.copy_(drafts)
    for row, slot in enumerate(slots.tolist()):
        kept.state[slot, columns.LENGTH.value], kept.state[slot, columns.LIMIT.value] = known[row], limits[row]
        kept.state[slot, columns.SEARCHES.value] = searches[row]
        places.taken[row], places.first[row] = 2 if alive[row] else -1, 6 + 2 * row
        results[row, NUM_DRAWN.value] = accepted[row] + 1
    on_device = [each.to(device) for each in (slots, covered, results, tables)]
    slots, covered, results, tables = on_device
    inputs, entries = StepInputs.make(ROWS, WIDTH, device), EntryPlaces.make(ROWS, device)
    for number in range(MOST):
        entry_inputs(slots, places, covered, kept, results, tables, BLOCK, number, MOST, inputs, entries)
        for row, slot in enumerate(slots.tolist()):
            place, room = known[row] - 2 + number, min(limits[row], int(covered[row]))
            going = alive[row] and searches[row] and place < room
            found = [int(each[row]) for each in (inputs.lengths, inputs.kv_slots, entries.positions, entries.drafts)]
            if going:
                kv_slot = int(tables[slot, place // BLOCK]) * BLOCK + place % BLOCK
                assert found == [place + 1, kv_slot, known[row] + number, slot * MOST + number]
                assert int(inputs.positions[row]) == place
                assert number == 0 or int(inputs.tokens[row]) == int(drafts[slot, number - 1])
            else:
                assert found[:3] == [0, -1, 1] and found[3] // MOST == SLOTS
            if number == 0:
                count = max(0, min(MOST, room - known[row] + 2)) if alive[row] and searches[row] else 0
                assert int(entries.computed[row]) == (6 + 2 * row + accepted[row] - 1 if accepted[row] else row)
                assert int(results[row, NUM_NEXT.value]) == count
                assert int(kept.state[slot, columns.NUM_DRAFTS.value]) == count
