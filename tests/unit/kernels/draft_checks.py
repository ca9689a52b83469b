"""Checks of the kernels of drafts on any device: against the rules of models.drafts, row by row."""

from __future__ import annotations

import random

import torch

from baton.kernels.triton import draft_inputs as columns
from baton.kernels.triton.draft_inputs import Places, gather_drafts
from baton.kernels.triton.drafts import IDS, SlotDrafts, accept, propose
from baton.kernels.triton.forced_drafts import offer_drafts
from baton.kernels.triton.step_inputs import StepInputs
from baton.models.cuda.launched import SOURCES
from baton.models.drafts import FOLLOWED_MATCH, LEAST_MATCH, LONGEST_MATCH, Drafts, led_by, num_accepted
from baton.models.drafts import propose as proposed

BLOCK = 16


def share(wanted: list[int], room: int) -> list[int]:
    """One after the other, a draft for each row that wants another."""
    taken = [0] * len(wanted)
    while room and any(have < want for have, want in zip(taken, wanted, strict=True)):
        least = min(have for have, want in zip(taken, wanted, strict=True) if have < want)
        row = next(r for r, (have, want) in enumerate(zip(taken, wanted, strict=True)) if have == least < want)
        taken[row] += 1
        room -= 1
    return taken


def check_step(
    device: str,
    seed: int,
    num_slots: int = 9,
    most_drafts: int = 5,
    num_rows: int = 6,
    spare: int = 7,
    searched: int = 64,
    answered: int = 20,
):
    """One step of gather, accept and propose over random slots; rows at their limit, and of padding, among them.
    searched: newest tokens that are compared, in texts of up to a few more; answered: tokens of past answers at most.
    """
    chance = random.Random(seed)
    kept = SlotDrafts.make(num_slots + 1, most_drafts, 32 + answered, searched + 64, device)
    width = (searched + 64) // BLOCK
    tables = torch.tensor([chance.sample(range(500), width) for _ in range(num_slots + 1)], dtype=torch.int32)
    predictions = [[chance.randrange(3) for _ in range(chance.randrange(20))] for _ in range(num_slots)]
    answers = [[chance.randrange(3) for _ in range(chance.randrange(answered))] for _ in range(num_slots)]
    known = [[chance.randrange(3) for _ in range(chance.randrange(1, searched + 26))] for _ in range(num_slots)]
    for each in known[::2]:  # two of three match nowhere for long
        each[:] = [chance.randrange(999) for _ in each]
    drafts = [[chance.randrange(3) for _ in range(most_drafts)] for _ in range(num_slots)]
    nums = [chance.randrange(most_drafts + 1) for _ in range(num_slots)]
    limits = [len(each) + chance.choice([0, 1, 2, 30]) for each in known]
    sources = [chance.randrange(3) for _ in range(num_slots)]
    missed = [chance.randrange(2) for _ in range(num_slots)]
    firsts = [kept.begin - len(predictions[slot]) - len(answers[slot]) for slot in range(num_slots)]
    cursors = [
        chance.randrange(kept.begin, kept.begin + len(known[slot]))
        if sources[slot] == 0
        else chance.choice([0, chance.randrange(firsts[slot], kept.begin + 1)])
        for slot in range(num_slots)
    ]
    for slot in range(num_slots):
        line = torch.zeros(columns.COLUMNS.value, dtype=torch.int32)
        line[columns.LENGTH.value], line[columns.LIMIT.value] = len(known[slot]), limits[slot]
        line[columns.LAST.value], line[columns.NUM_DRAFTS.value] = known[slot][-1], nums[slot]
        line[columns.SEARCHES.value], line[columns.NUM_PREDICTED.value] = 1, len(predictions[slot])
        line[columns.NUM_ANSWERS.value] = len(answers[slot])
        line[columns.SOURCE.value], line[columns.MISSED.value] = sources[slot], missed[slot]
        line[columns.CURSOR.value] = cursors[slot]
        kept.state[slot] = line.to(device)
        kept.drafts[slot] = torch.tensor(drafts[slot], dtype=torch.int32, device=device)
        text = torch.tensor([*answers[slot], *predictions[slot], *known[slot]], dtype=torch.int32, device=device)
        kept.text[slot, firsts[slot] : firsts[slot] + len(text)] = text
    rows = chance.sample(range(num_slots), num_rows)
    most = [chance.randrange(most_drafts + 1) for _ in rows]
    num_tokens = num_rows + spare
    slots = torch.tensor([*rows, num_slots, num_slots], dtype=torch.int32, device=device)
    mosts = torch.tensor([*most, -1, -1], dtype=torch.int32, device=device)
    inputs, places = StepInputs.make(num_tokens, width, device), Places.make(num_tokens, device)
    gather_drafts(slots, mosts, kept.state, kept.drafts, tables.to(device), BLOCK, inputs, places)

    alive = [limits[slot] > len(known[slot]) for slot in rows]
    wanted = [
        min(nums[slot], limit, limits[slot] - len(known[slot]) - 1) if lives else 0
        for slot, limit, lives in zip(rows, most, alive, strict=True)
    ]
    taken = share(wanted, spare)
    tokens = [
        (slot, known[slot][-1], len(known[slot])) if lives else None for slot, lives in zip(rows, alive, strict=True)
    ]
    for slot, count in zip(rows, taken, strict=True):
        tokens += [(slot, drafts[slot][j], len(known[slot]) + j + 1) for j in range(count)]
    tokens += [None] * (num_tokens - len(tokens))
    for place, token in enumerate(tokens):
        slot, token_id, length = token or (num_slots, 0, 0)
        assert int(places.slots[place]) == slot and int(inputs.lengths[place]) == length
        assert int(inputs.tokens[place]) == token_id and int(inputs.positions[place]) == max(0, length - 1)
        at = max(0, length - 1)
        right = int(tables[slot, at // BLOCK]) * BLOCK + at % BLOCK if token else -1
        assert int(inputs.kv_slots[place]) == right
        used = -(-length // BLOCK)
        assert inputs.tables[place, :used].tolist() == tables[slot, :used].tolist()

    drawn, first = [chance.randrange(3) for _ in range(num_tokens)], num_rows
    results = torch.full((num_tokens, IDS.value + most_drafts + 1), -7, dtype=torch.int32, device=device)
    accept(torch.tensor(drawn, dtype=torch.int32, device=device), places.slots, places, kept, results)
    propose(
        places.slots,
        places,
        kept,
        results,
        searched=searched,
        longest=LONGEST_MATCH,
        least=LEAST_MATCH,
        followed=FOLLOWED_MATCH,
    )
    for place in range(num_rows, num_tokens):
        assert int(results[place, 0]) == 0
    for row, (slot, count, lives) in enumerate(zip(rows, taken, alive, strict=True)):
        own = [drawn[row], *drawn[first : first + count]]
        first += count
        ids = own[: num_accepted(drafts[slot][:count], own) + 1] if lives else []
        result = results[row].tolist()
        assert result[0] == len(ids) and result[IDS.value : IDS.value + len(ids)] == ids
        text = [*known[slot], *ids]
        state = kept.state[slot].tolist()
        assert state[columns.LENGTH.value] == len(text) and state[columns.LAST.value] == text[-1]
        if not lives:
            continue
        assert result[1] == count and result[3] == state[columns.NUM_DRAFTS.value]
        assert result[2] == sources[slot], "drafts of another source were verified"
        oldest = max(0, len(text) - searched)  # of the known tokens
        cursor, misses = cursors[slot] + len(ids), count > 0 and len(ids) == 1
        behind = kept.begin + len(text) if sources[slot] == 0 else kept.begin
        if cursors[slot] == 0 or (misses and missed[slot]) or cursor >= behind:
            cursor = None
        elif cursor >= kept.begin + oldest:
            cursor += len(predictions[slot]) + len(answers[slot]) - kept.begin - oldest
        elif cursor < kept.begin:
            cursor -= firsts[slot]
        else:
            continue  # it goes on with tokens that are no more compared
        next_drafts = proposed(text[oldest:], predictions[slot], most_drafts, answers[slot], cursor)
        assert kept.drafts[slot, : result[3]].tolist() == list(next_drafts.token_ids), (slot, cursor)
        if result[3]:
            assert state[columns.CURSOR.value] > 0
            assert cursor is not None or SOURCES[state[columns.SOURCE.value]] == next_drafts.source
    assert not bool(kept.best.any())


def check_offered(device: str, seed: int, num_slots: int = 40, most_drafts: int = 5, most_forced: int = 12) -> None:
    """Forced tokens before the drafts of random slots: some were drawn since, or others in their place."""
    chance = random.Random(seed)
    kept = SlotDrafts.make(num_slots, most_drafts, 32, 64, device)
    rows = chance.sample(range(num_slots), num_slots - 3)
    known, counts, forced, expected = [], [], torch.zeros(len(rows), most_forced, dtype=torch.int32), []
    for row, slot in enumerate(rows):
        text = [chance.randrange(9) for _ in range(chance.randrange(1, 20))]
        known.append(chance.randrange(max(0, len(text) - 4), len(text) + 1))
        coming = [chance.randrange(9) for _ in range(chance.randrange(most_forced + 1))]
        drawn = text[known[-1] :]
        if chance.random() < 0.7:
            coming[: len(drawn)] = drawn[: len(coming)]
        left = coming[len(drawn) :] if coming[: len(drawn)] == drawn else []
        drafts = [chance.randrange(9) for _ in range(chance.randrange(most_drafts + 1))]
        if chance.random() < 0.5:
            drafts[: len(left)] = left[: len(drafts)]
        counts.append(len(coming))
        forced[row, : len(coming)] = torch.tensor(coming, dtype=torch.int32)
        expected.append(led_by(left, Drafts(tuple(drafts)), most_drafts))
        kept.state[slot, columns.LENGTH.value], kept.state[slot, columns.NUM_DRAFTS.value] = len(text), len(drafts)
        kept.drafts[slot, : len(drafts)] = torch.tensor(drafts, dtype=torch.int32, device=device)
        kept.text[slot, kept.begin : kept.begin + len(text)] = torch.tensor(text, dtype=torch.int32, device=device)
    offered = torch.full((len(rows), 1 + most_drafts), -7, dtype=torch.int32, device=device)
    given = (torch.tensor(each, dtype=torch.int32, device=device) for each in (rows, known, counts))
    offer_drafts(*given, forced.to(device), kept, offered)
    for slot, line, right in zip(rows, offered.tolist(), expected, strict=True):
        assert tuple(line[1 : 1 + line[0]]) == right.token_ids
        state = kept.state[slot].tolist()
        assert state[columns.NUM_DRAFTS.value] == len(right.token_ids)
        assert tuple(kept.drafts[slot, : len(right.token_ids)].tolist()) == right.token_ids
        assert SOURCES[state[columns.SOURCE.value]] == right.source
