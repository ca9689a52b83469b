"""Drafts on the GPU's runner, its kernels interpreted and run as late as can be: the CPU's tokens, in fewer steps."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.models.cuda.draft_budget import PROBE_EVERY, DraftBudget
from baton.tests.unit.models.cuda.ahead import GRAMMAR, Ahead, one_after_the_other
from baton.tests.unit.models.cuda.test_runner import make

SEEDED = {"temperature": 1.1, "seed": 6}


def test_tokens_are_those_of_steps_without_drafts(make_model):
    """Guards against drafts that are kept though another token is drawn, positions that the host knows a step late, KV
    of rejected drafts, and a row that gets the drafts or tokens of another. Right drafts of one sequence, and wrong
    ones of the other; then drafts beside parts of a prompt and masks, and up to a last token."""
    folder = make_model("llama", num_hidden_layers=1).folder
    late, plain = make(folder, max_rows=2, most_drafts=3, mixed_tokens=8, deterministic=True)
    ahead, count, prompts = Ahead(late, most_drafts=3), 10, [[9, 8, 7, 6, 5, 4], [1, 2, 3]]
    right = [one_after_the_other(plain, prompts[0], [20, 21], count, **SEEDED)]
    right.append(one_after_the_other(plain, prompts[1], [20, 21], count))
    known = [*prompts[1], *right[1]]
    wrong = [(known[n], known[n + 1], (known[n + 2] + 1) % 131) for n in range(1, len(known) - 2)]
    ahead.predictions = {0: [*prompts[0], *right[0]], 1: [token for each in wrong for token in each]}
    ahead.start(0, prompts[0], [1, 0], max_tokens=count, **SEEDED)
    ahead.start(1, prompts[1], [4, 3])
    while len(ahead.known[1]) < len(prompts[1]) + count:
        ahead.launch([0, 1])
    assert ahead.generated(0) == right[0][:count]  # and no token behind the last
    assert ahead.generated(1)[:count] == right[1]
    assert count // 2 <= ahead.num_accepted < ahead.num_verified

    other = [*range(30, 62)]
    masked = one_after_the_other(plain, other, [20, 21, 22], 3, grammar=GRAMMAR)
    ahead.start(0, prompts[0], [6, 7], max_tokens=count, **SEEDED)
    ahead.launch([0])
    ahead.start(1, other, [8, 9, 10], grammar=GRAMMAR)
    for _ in range(4):
        ahead.launch([0, 1], chunk=16)
    ahead.launch([0])
    ahead.launch([0])
    assert ahead.generated(0) == right[0][: len(ahead.generated(0))]
    assert ahead.generated(1)[:3] == masked


def test_a_step_has_places_for_drafts_that_pay():
    """Guards against larger steps for drafts that are not accepted, none for those that are, and drafts that are never
    tried again."""
    budget = DraftBudget((1, 2, 4, 8, 16), 7)
    for size, seconds in ((1, 1.0), (2, 1.01), (4, 1.03), (8, 1.06), (16, 1.3)):
        budget.measured(size, seconds)
    rows = [(0, 7)]
    budget.read(budget.choose(rows), [(1, 0, 7)], 1.0)
    for _ in range(20):
        choice = budget.choose(rows)
        budget.read(choice, [(8, 7, 7)], 1.06)
    assert choice.tokens == 8
    sizes = []
    for _ in range(400):
        choice = budget.choose(rows)
        budget.read(choice, [(1, choice.tokens - 1, 7)], 1.0 + 0.01 * choice.tokens)
        sizes.append(choice.tokens)
    late = sizes[-4 * PROBE_EVERY :]
    assert set(late) == {1, 2} and 3 <= late.count(2) <= 5
    budget.begin(0)
    assert budget.choose(rows).tokens == 1
