"""Drafts on the GPU's runner, its kernels interpreted and run as late as can be: the CPU's tokens, in fewer steps."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.models.batch import PromptTargets, Row
from baton.models.cuda.draft_budget import DraftBudget, DraftResult
from baton.tests.unit.models.cuda.ahead import GRAMMAR, Ahead, one_after_the_other
from baton.tests.unit.models.cuda.test_runner import make

SEEDED = {"temperature": 0.2, "seed": 6}
BIAS = tuple((20 + number, 9.0 - 0.3 * number) for number in range(9))
"""Few tokens are likely, so that the last ones of them say which is next."""
PENALISED = {"frequency_penalty": 1.1, "presence_penalty": 0.5, "repetition_penalty": 1.3, "logit_bias": BIAS}
NAMED = {"logprobs": True, "top_logprobs": 2}


def test_tokens_are_those_of_steps_without_drafts(make_model):
    """Guards against drafts that are kept though another token is drawn, positions that the host knows a step late, KV
    of rejected drafts, a row that gets the drafts, tokens or log probabilities of another, and penalties and bad words
    that drafts before a token, or rejected ones, change. Right drafts of one sequence, and wrong ones of the other;
    then drafts beside parts of a prompt and masks, and up to a last token."""
    folder = make_model("llama", num_hidden_layers=1).folder
    late, plain = make(folder, max_rows=2, most_drafts=3, mixed_tokens=8, deterministic=True)
    ahead, count, prompts = Ahead(late, most_drafts=3), 10, [[9, 8, 7, 6, 5, 4], [1, 2, 3]]
    free = one_after_the_other(plain, prompts[0], [20, 21], count, **SEEDED, **PENALISED)
    edits = {**PENALISED, "bad_words": tuple(pairwise(free))[::3]}
    right = [one_after_the_other(plain, prompts[0], [20, 21], count, **SEEDED, **edits)]
    right.append(one_after_the_other(plain, prompts[1], [20, 21], count, **PENALISED))
    assert right[0] != free
    known = [*prompts[1], *right[1]]
    wrong = [(known[n], known[n + 1], (known[n + 2] + 1) % 131) for n in range(1, len(known) - 2)]
    ahead.predictions = {0: [*prompts[0], *right[0]], 1: [token for each in wrong for token in each]}
    ahead.start(0, prompts[0], [1, 0], max_tokens=count, **SEEDED, **NAMED, **edits)
    ahead.start(1, prompts[1], [4, 3], **PENALISED)
    while len(ahead.known[1]) < len(prompts[1]) + count:
        ahead.launch([0, 1])
    assert ahead.generated(0) == right[0][:count]  # and no token behind the last
    assert ahead.generated(1)[:count] == right[1]
    assert count // 2 <= ahead.num_accepted < ahead.num_verified
    known = [*prompts[0], *right[0]]
    row = Row(known[:-1], 0, [20, 21], None, targets=PromptTargets(0, known[1:], 2))
    launched = plain.launch([row])
    launched.read()
    for found, scored in zip(ahead.logprobs[0], launched.prompt_logprobs[0][-count:], strict=True):
        assert found.logprob == pytest.approx(scored.logprob, abs=1e-3)
        assert [token for token, _ in found.top] == [token for token, _ in scored.top]

    other = [*range(30, 62)]
    masked = one_after_the_other(plain, other, [20, 21, 22], 3, grammar=GRAMMAR)
    ahead.start(0, prompts[0], [6, 7], max_tokens=count, **SEEDED, **edits)
    ahead.launch([0])
    ahead.start(1, other, [8, 9, 10], grammar=GRAMMAR)
    for _ in range(4):
        ahead.launch([0, 1], chunk=16)
    ahead.launch([0])
    ahead.launch([0])
    assert ahead.generated(0) == right[0][: len(ahead.generated(0))]
    assert ahead.generated(1)[:3] == masked


def test_drafts_beside_masks(make_model):
    """Guards masks of drafts against those of another place, row or step, drafts that the host does not know in time,
    and forced tokens that are not where the sequence is: beside a free row, alone, and beside a part of a prompt whose
    logits lie where those of the drafts were."""
    folder = make_model("llama", num_hidden_layers=1).folder
    late, plain = make(folder, max_rows=3, most_drafts=3, mixed_tokens=64, deterministic=True)
    ahead, count, prompt = Ahead(late, most_drafts=3), 14, [9, 8, 7, 6, 5, 4]
    ahead.forced = {place: (7 * place) % 131 for place in (*range(8, 11), *range(13, 18))}
    params = {"grammar": GRAMMAR, "temperature": 1.1, "seed": 6, "frequency_penalty": 0.9}
    masked = one_after_the_other(plain, prompt, [20, 21], count, ahead.forced, **params)
    free = one_after_the_other(plain, [1, 2, 3], [20, 21], count, **SEEDED)
    other = one_after_the_other(plain, [*range(30, 62)], [20, 21, 22], 3)
    unforced = [(token + (place in ahead.forced)) % 131 for place, token in enumerate(masked, len(prompt))]
    ahead.predictions = {0: [*prompt, *unforced], 1: [1, 2, 3, *free]}
    ahead.start(0, prompt, [1, 0], **params)
    ahead.start(1, [1, 2, 3], [4, 3], **SEEDED)
    for _ in range(3):
        ahead.launch([0, 1])
    ahead.start(2, [*range(30, 62)], [8, 9, 10])
    for _ in range(3):
        ahead.launch([2, 0, 1], chunk=16)
    while len(ahead.known[0]) < len(prompt) + count:
        ahead.launch([0])
    assert ahead.generated(0)[:count] == masked
    for slot, right in ((1, free), (2, other)):
        found = ahead.generated(slot)
        assert found[: len(right)] == right[: len(found)]
    assert ahead.sources["grammar"] >= 3 and ahead.sources["prediction"] >= 2, ahead.sources


SIZES = {1: 4.2, 2: 4.2, 4: 4.2, 8: 4.3, 16: 4.3, 24: 4.4, 32: 4.5, 48: 4.6, 64: 4.8, 96: 5.2, 128: 5.8}
TOKEN = 0.03
"""Of a step without context, and of a token of a sequence with some: about those of an 8B model on an H200."""


def steps_with(budget: DraftBudget, rows: int, most: int, right: Callable[[int], bool]) -> tuple[float, float]:
    """Of 60 steps in which each row has drafts, all right or all wrong: what they take, and tokens of a row, as
    multiples of those without. Each is read behind the launch of the next."""
    in_flight, spent, tokens = [], 0.0, 0
    for _ in range(60):
        choice = budget.choose([(slot, most) for slot in range(rows)])
        each, more = divmod(choice.tokens - rows, rows)
        taken = [min(most, each + (slot < more)) for slot in range(rows)]
        drawn = [count + 1 if right(slot) else 1 for slot, count in enumerate(taken)]
        took = SIZES[choice.tokens] + TOKEN * (rows + sum(taken))
        in_flight.append((choice, [DraftResult(*counts, 12) for counts in zip(drawn, taken, strict=True)], took))
        spent, tokens = spent + took, tokens + sum(drawn)
        if len(in_flight) > 1:
            budget.read(*in_flight.pop(0))
    return spent / 60 / (SIZES[rows] + TOKEN * rows), tokens / 60 / rows


@pytest.mark.parametrize(("rows", "most", "gain"), [(1, 12, 10.0), (8, 7, 5.0), (32, 3, 2.1)])
def test_a_step_has_places_for_drafts_that_pay(rows, most, gain):
    """Guards against larger steps for drafts that are never right, also where those of sequences before were, and none
    for drafts that are."""
    budget = DraftBudget(list(SIZES), 12)
    for size, seconds in SIZES.items():
        budget.measured(size, seconds)
    cost, tokens = steps_with(budget, rows, most, lambda slot: True)
    assert tokens / cost > gain
    for slot in range(rows):
        budget.begin(slot)
    cost, _ = steps_with(budget, rows, most, lambda slot: False)
    assert cost < 1.03
    cost, _ = steps_with(budget, rows, most, lambda slot: False)
    assert cost < 1.02
    cost, tokens = steps_with(budget, rows, most, lambda slot: True)
    assert tokens / cost > gain / 2  # they are tried again


def test_drafts_of_a_model_are_left_out_where_they_do_not_pay():
    """Guards against a model that proposes at each step what no step has places for, and against one that never
    proposes again."""
    budget = DraftBudget(list(SIZES), 3, by_model=True)
    for size, seconds in SIZES.items():
        budget.measured(size, seconds)
        budget.measured_chain(size, 0.4)
    spent = []
    for right in (False, True):
        in_flight, proposed = [], [0, 0]
        for step in range(400):
            choice = budget.choose([(slot, 3) for slot in range(8)])
            proposed = [*proposed, 3 * choice.proposes]
            taken = min(proposed[-2], (choice.tokens - 8) // 8)
            took = SIZES[choice.tokens] + 0.4 * choice.proposes
            results = [DraftResult(1 + taken * right, taken, proposed[-1])] * 8
            in_flight.append((choice, results, took))
            if step >= 300:
                spent.append((took, 1 + taken * right))
            if len(in_flight) > 1:
                budget.read(*in_flight.pop(0))
    wrong, good = (sum(a for a, _ in part) / sum(b for _, b in part) / SIZES[8] for part in (spent[:100], spent[100:]))
    assert wrong < 1.02
    assert good < 0.35
