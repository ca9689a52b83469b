"""Speculation on a GPU: captured steps with drafts draw the tokens of steps without, over 10^5 of them.

Run it in a separate process, as tests/gpu/test_runner.py.
"""

from __future__ import annotations

import random

import pytest
import torch

pytest.importorskip("triton", reason="Triton is made for Linux only")

from baton.models.cuda.runner import CudaRunner
from baton.node.modelhub import locate_model
from baton.tests.gpu.test_runner import make, table
from baton.tests.unit.kernels.draft_checks import check_offered, check_step
from baton.tests.unit.models.cuda.ahead import GRAMMAR, Ahead

pytestmark = pytest.mark.gpu

ROWS, COUNT, DRAFTS = 64, 500, 7
EXTRAS: list[dict] = [
    {"logprobs": True, "top_logprobs": 2},
    {"frequency_penalty": 0.4, "repetition_penalty": 1.1, "bad_words": ((300, 301), (305,))},
    {},
    {},
]
MODES = {"n-gram": 0, "oracle": 1, "adversarial": 2}


def predicted(mode: str, known: list[int], prompt_len: int) -> list[int]:
    """What a mode lets the client predict, of a sequence that goes on so."""
    if mode == "oracle":
        return known[prompt_len - 3 :]
    wrong = [(known[n], known[n + 1], (known[n + 2] + 1) % 4000) for n in range(prompt_len - 2, len(known) - 2)]
    return [token for each in wrong for token in each] if mode == "adversarial" else []


def answers(runner: CudaRunner, prompts: list[list[int]], predictions: list[list[int]], most: int) -> Ahead:
    """COUNT tokens after each prompt and more, every other row greedy; prompts are taken in beside what decodes."""
    run = Ahead(runner, most_drafts=most)
    run.predictions = dict(enumerate(predictions))
    for slot, prompt in enumerate(prompts):
        asked = EXTRAS[slot // 2 % len(EXTRAS)]
        run.start(slot, prompt, table(slot), temperature=slot % 2 * 0.8, seed=slot + 1, max_tokens=COUNT, **asked)
        run.launch([*range(slot + 1)], chunk=64)
    for _ in range(2 * COUNT):
        live = [slot for slot in range(len(prompts)) if len(run.known[slot]) < len(prompts[slot]) + COUNT]
        if not live:
            break
        run.launch(live)
    return run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_with_and_without_drafts_are_the_same(dtype):
    """Guards the whole of it on a GPU: more than 10^5 tokens, greedy and seeded, of drafts of all kinds. Log
    probabilities of a quarter of the rows are equal too, to the bit."""
    chance, folder = random.Random(4), locate_model("demo")
    prompts = [[chance.randrange(2, 2000) for _ in range(chance.randrange(3, 60))] for _ in range(ROWS)]
    prompts = [[*prompt, *prompt] for prompt in prompts]
    limits = {"max_rows": ROWS, "deterministic": True}
    off = answers(make(folder, dtype, **limits), prompts, [[] for _ in prompts], 0)
    expected = [off.generated(slot)[:COUNT] for slot in range(ROWS)]
    drafting = make(folder, dtype, **limits, most_drafts=DRAFTS)
    for mode in MODES:
        predictions = [
            predicted(mode, [*prompt, *answer], len(prompt)) for prompt, answer in zip(prompts, expected, strict=True)
        ]
        run = answers(drafting, prompts, predictions, DRAFTS)
        found = [run.generated(slot) for slot in range(ROWS)]
        assert found == expected, mode
        assert all(run.logprobs[slot][:COUNT] == off.logprobs[slot][:COUNT] for slot in range(ROWS)), mode
        assert run.num_verified > 100
        if mode == "oracle":
            assert run.num_accepted > run.num_verified // 2 and run.num_steps < off.num_steps - COUNT // 2
        print({"mode": mode, "dtype": str(dtype), "steps": run.num_steps, "off_steps": off.num_steps,
               "verified": run.num_verified, "accepted": run.num_accepted})  # fmt: skip


def test_drafts_beside_masks():
    """Guards masks of drafted places, forced tokens, and the drafts that the host is given in time to make masks:
    every other row has masks, and prompts are taken in beside them."""
    chance, folder, rows, count = random.Random(5), locate_model("demo"), 8, 120
    prompts = [[chance.randrange(2, 2000) for _ in range(chance.randrange(3, 60))] for _ in range(rows)]
    found: list[list[list[int]]] = []
    for most in (0, DRAFTS):
        runner = make(folder, torch.bfloat16, max_rows=rows, deterministic=True, most_drafts=most)
        run = Ahead(runner, most_drafts=most)
        run.forced = {place: 2 + 7 * place % 999 for place in range(400) if place % 20 < 8}
        for slot, prompt in enumerate(prompts):
            if found and slot % 2 == 0:
                run.predictions[slot] = [*prompt, *found[0][slot]]
            masked = {"grammar": GRAMMAR} if slot % 2 else {}
            run.start(slot, prompt, table(slot), temperature=slot % 4 * 0.3, seed=slot + 1, max_tokens=count, **masked)
            run.launch([*range(slot + 1)], chunk=16)
        while live := [slot for slot in range(rows) if len(run.known[slot]) < len(prompts[slot]) + count]:
            run.launch(live)
        found.append([run.generated(slot)[:count] for slot in range(rows)])
    assert found[0] == found[1]
    assert run.num_accepted > run.num_verified // 2 and run.sources["grammar"] > rows, run.sources
    print({"steps": run.num_steps, "verified": run.num_verified, "accepted": run.sources})


@pytest.mark.parametrize("seed", range(4))
def test_kernels_of_drafts(seed):
    """Guards what a GPU's kernels do where the interpreter is more lenient."""
    check_step("cuda:0", seed, spare=(0, 3, 7, 40)[seed % 4])
    check_offered("cuda:0", seed)
